"""What makes compiling processes quick and changes nothing of what they compile."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Collector", "WithoutSympy", "prepare_parent"]

COLLECT_EVERY = 16  # variants; each leaves up to 2 MB of cycles


def prepare_parent() -> None:
    """Do once, before processes are forked, what else each of them would: they inherit modules and what is cached."""
    import triton.compiler.code_generator
    import triton.tools.tensor_descriptor  # noqa: F401
    from triton.runtime.cache import triton_key

    triton_key()  # hashes Triton's installation, 0.3 s


class Collector:
    """Cycles are looked for between variants, seldom, and not among what was there before the first.

    Python would do so a hundred times a variant, in all of torch and Triton: 7 % of a compilation.
    """

    def __init__(self) -> None:
        gc.disable()
        gc.freeze()
        self._compiled = 0

    def count(self) -> None:
        """Call after each variant."""
        self._compiled += 1
        if self._compiled % COLLECT_EVERY == 0:
            gc.collect()


class WithoutSympy(TorchFunctionMode):
    """Within it `cumsum_` of a tensor without storage returns it: torch imports sympy to do that, for 1 s a process."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cumsum_:
            return args[0]
        return func(*args, **(kwargs or {}))
