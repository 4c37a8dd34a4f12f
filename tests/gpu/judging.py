"""How tests/gpu judges: the equations in place of kernels, one selection for all of them, the policy of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from equations import reference_attention
from torch import Tensor

from nsa_autotune import ops
from nsa_autotune.bench.compare import compare_floats
from nsa_autotune.ops import launches, serve

PATCH = pytest.MonkeyPatch


@contextmanager
def equations() -> Iterator[None]:
    """Attention is the reference on the device, under autograd, instead of kernels."""
    with PATCH.context() as patch:
        patch.setattr(ops, "nsa_attention", reference_attention)
        patch.setattr(serve, "on_kernels", lambda x: False)
        yield


class SharedBlocks:
    """The first forward selects, the others take its blocks over."""

    def __init__(self) -> None:
        self.blocks: Tensor | None = None
        self.reused = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it, nsa_attention selects here."""
        real = launches.launch_select

        def select(*args: Any, **kwargs: Any) -> Tensor:
            if self.blocks is None:
                self.blocks = real(*args, **kwargs)
            else:
                self.reused += 1
            return self.blocks.clone()  # an operator's output is its own

        with PATCH.context() as patch:
            patch.setattr(launches, "launch_select", select)
            yield


def close(name: str, ours: Tensor, wide: Tensor, base: Tensor, rows: bool = True) -> None:
    """Assert that our error is within the policy."""
    report = compare_floats(name, ours, wide, base, has_rows=rows)
    assert report.ok, report.reason
