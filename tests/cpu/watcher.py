"""Watches every address that Triton's interpreter touches: an access beside a tensor is an error, not a lucky read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to no tensor of its launch."""


class Watcher:
    """The address ranges that kernels may touch, and how many accesses were checked."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.keep: list[Tensor] = []  # no range is given to another tensor meanwhile
        self.checked = 0

    def allow(self, tensor: Tensor) -> Tensor:
        """Let kernels touch the elements of a tensor, from its first to its last."""
        if tensor.numel():
            extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            self.ranges.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
            self.keep.append(tensor)
        return tensor

    def check(self, kind: str, pointers: Any, mask: Any) -> None:
        """Raise OutOfBounds unless every pointer under the mask lies in a range."""
        touched = np.asarray(pointers if mask is None else pointers[mask]).reshape(-1).astype(np.uint64)
        inside = np.zeros(touched.shape, dtype=bool)
        for start, stop in self.ranges:
            inside |= (touched >= start) & (touched < stop)
        self.checked += touched.size
        if not inside.all():
            stray = int(touched[~inside][0])
            near = min(self.ranges, key=lambda r: min(abs(stray - r[0]), abs(stray - r[1])))
            where = f"byte {stray - near[0]} of a tensor of {near[1] - near[0]} bytes"
            raise OutOfBounds(f"{kind} of {(~inside).sum()} addresses outside, one at {where}")


@contextmanager
def watched(module: ModuleType) -> Iterator[tuple[Watcher, Callable[..., Any]]]:
    """The module's launch, in which each access is checked against its tensors and the scratch that it allocates."""
    from triton.runtime import interpreter

    watcher, real = Watcher(), interpreter._interpreter

    class Checked:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            watcher.check("load", pointers, mask)
            return real.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, value: Any, mask: Any) -> Any:
            watcher.check("store", pointers, mask)
            return real.store(pointers, value, mask)

    def launch(**arguments: Any) -> Any:
        watcher.ranges.clear()
        watcher.keep.clear()
        for value in arguments.values():
            if isinstance(value, Tensor):
                watcher.allow(value)
        return module.launch(**arguments)

    def scratch(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            made = watcher.allow(maker(*args, **kwargs))
            return made.fill_(float("nan") if made.is_floating_point() else -(1 << 30))  # nobody may count on zeros

        return make

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_interpreter", Checked())
    if hasattr(module, "torch"):
        names = {"empty": scratch(torch.empty), "empty_like": scratch(torch.empty_like)}
        known = {name: getattr(torch, name) for name in ("int32", "float32", "uint8", "cuda")}
        patch.setattr(module, "torch", SimpleNamespace(**known, **names))
    try:
        yield watcher, launch
    finally:
        patch.undo()
        sys.modules.pop(module.__name__, None)
