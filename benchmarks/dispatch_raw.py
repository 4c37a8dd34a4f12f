"""What a launch calls, arguments ready: Triton's C launcher and PyTorch's operators; no Python before them saves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from nsa_autotune.dispatch.recording import AllocationStep, KernelStep, Mapped, Place, record


def raw_launch(launch: FunctionType, arguments: Mapping[str, Any], stream: int) -> Callable[[], object]:
    """Launches every kernel of the call again, and runs the operators between them."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    calls: list[Callable[[], object]] = []
    for step in record(launch, arguments).steps:
        if isinstance(step, AllocationStep):
            tensors.append(torch.empty(step.shape, dtype=step.dtype, device=step.device))
        elif isinstance(step, KernelStep):
            calls.append(_ready(step, tensors, stream))
        else:
            given = [_tensor(value, tensors) for value in step.arguments]
            named = {name: _tensor(value, tensors) for name, value in step.named.items()}
            calls.append(partial(step.function, *given, **named))
            if step.makes:
                tensors.append(step.function(*given, **named))

    def again(_alive: Sequence[Tensor] = tensors) -> None:  # their memory stays theirs as long as this can be called
        for call in calls:
            call()

    return again


def _ready(step: KernelStep, tensors: list[Tensor], stream: int) -> Callable[[], object]:
    values = [_value(value, tensors) for value in step.arguments]
    given = values if step.launcher.flat else [tuple(values)]
    return partial(step.launcher.raw, *step.grid, stream, *step.launcher.middle, *given)


def _tensor(value: Any, tensors: list[Tensor]) -> Any:
    """What an operator takes."""
    return tensors[value.number] if isinstance(value, Place) else value


def _value(value: Any, tensors: list[Tensor]) -> Any:
    """An address, a tensor map or a constant."""
    if isinstance(value, Mapped):
        return value.tensor_map.at(tensors[value.place.number].data_ptr())
    return tensors[value.number].data_ptr() if isinstance(value, Place) else value
