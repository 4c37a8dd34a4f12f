"""Guard bytes around what a launch allocates for itself, while it is checked; a timed launch allocates plainly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import GUARD_BYTES, empty_guarded, storage_bytes


@dataclass(frozen=True)
class Scratch:
    """One tensor that a launch made, and the bytes that lie on either side of it."""

    tensor: Tensor
    guard: Tensor

    @property
    def is_whole(self) -> bool:
        """True unless something was written beside the tensor."""
        around = storage_bytes(self.tensor)
        return torch.equal(around[:GUARD_BYTES], self.guard) and torch.equal(around[-GUARD_BYTES:], self.guard)


@contextmanager
def guarded_scratch(launch: Callable[..., Any], which: int = 0) -> Iterator[list[Scratch]]:
    """Inside, `torch.empty` and `torch.empty_like` of a generated module give poison between guards; yields them.

    A launch that is no function of a module that imported torch is left alone.
    """
    made: list[Scratch] = []
    names = getattr(inspect.unwrap(launch), "__globals__", {})
    if names.get("torch") is not torch:
        yield made
        return
    names["torch"] = _GuardedTorch(made, which)
    try:
        yield made
    finally:
        names["torch"] = torch


class _GuardedTorch:
    """torch as a generated module sees it."""

    def __init__(self, made: list[Scratch], which: int) -> None:
        self._made, self._which = made, which

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.empty, whose shape is numbers or one sequence."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        tensor = empty_guarded(tuple(sizes), dtype, device, self._which)
        self._made.append(Scratch(tensor, storage_bytes(tensor)[:GUARD_BYTES].clone()))
        return tensor

    def empty_like(self, other: Tensor) -> Tensor:
        """As torch.empty_like."""
        return self.empty(other.shape, dtype=other.dtype, device=other.device)
