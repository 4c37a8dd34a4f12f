"""How many programs a launch starts, seen by standing between a module's launch function and its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any


class _Watched:
    """A kernel that notes the grid of each `run`."""

    def __init__(self, kernel: Any, programs: list[int]) -> None:
        self._kernel, self._programs = kernel, programs

    def run(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        """As the kernel's own."""
        self._programs.append(math.prod(grid))
        return self._kernel.run(*arguments, grid=grid, **options)


def watch_programs(module: ModuleType) -> tuple[Callable[..., Any], list[int]]:
    """The module's launch function and a list that gets the number of programs of each kernel it starts.

    The function is a copy with globals of its own: the module, which other threads may be using, is left as it is.
    """
    programs: list[int] = []
    names: dict[str, Any] = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            names[name] = copied = FunctionType(value.__code__, names, name, value.__defaults__, value.__closure__)
            copied.__kwdefaults__ = value.__kwdefaults__
        elif name.endswith("_kernel"):
            names[name] = _Watched(value, programs)
    return names["launch"], programs
