"""What a launch function starts: grids and run-time arguments, seen by standing between it and its kernels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch


@dataclass
class Launches:
    """The kernels that one call of a launch function started, in order."""

    programs: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # grid and arguments of each, as text

    @property
    def call_sha(self) -> str:
        """Equal for launches of the same machine code that do the same: grids, numbers, shapes; 20 hex digits."""
        return hashlib.sha256("\n".join(self.calls).encode()).hexdigest()[:20]


class _Watched:
    """A kernel that notes each `run`."""

    def __init__(self, kernel: Any, seen: Launches) -> None:
        self._kernel, self._seen = kernel, seen

    def run(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        """As the kernel's own; options are compiled in, so the machine code tells them."""
        self._seen.programs.append(math.prod(grid))
        self._seen.calls.append(f"{grid} {[_described(argument) for argument in arguments]}")
        return self._kernel.run(*arguments, grid=grid, **options)


def _described(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {tuple(argument.shape)} {argument.stride()}"
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return f"{_described(argument.base)} {argument.shape} {argument.strides} {argument.block_shape}"
    return repr(argument)


def watch_launches(module: ModuleType) -> tuple[Callable[..., Any], Launches]:
    """The module's launch function, and what gets to know the kernels that it starts.

    The function is a copy with globals of its own: the module, which other threads may be using, is left as it is.
    """
    seen = Launches()
    names: dict[str, Any] = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            names[name] = copied = FunctionType(value.__code__, names, name, value.__defaults__, value.__closure__)
            copied.__kwdefaults__ = value.__kwdefaults__
        elif name.endswith("_kernel"):
            names[name] = _Watched(value, seen)
    return names["launch"], seen
