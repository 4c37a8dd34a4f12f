"""A toolchain whose one family copies a tensor, or commits a real fault on the device; see test_faults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from cpu.bench_fakes import make_spec

from nsa_autotune.bench.health import check_device
from nsa_autotune.spec import Argument, Config, KernelSpec, Problem

__all__ = ["check_device", "explain", "get_spec", "load", "render"]

FAMILY = "faulty_copy"
BLOCK = 1024
SPEC = make_spec(
    FAMILY,
    lambda problem, inputs, layout, positions: {"out": inputs["x"]},
    Argument("x", ("K", "H", "D_QK"), "float32"),
    Argument("out", ("K", "H", "D_QK"), "float32", fill="out"),
)


@triton.jit(debug=True)  # else device_assert is nothing
def copy_kernel(x_ptr, out_ptr, address, size, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if FAULT == "illegal":
        value += tl.load((address * 0 + 64).to(tl.pointer_type(tl.float32)))
    if FAULT == "misaligned":
        value += tl.load((address + 1).to(tl.pointer_type(tl.float32)))
    if FAULT == "assert":
        tl.device_assert(value > 1e30, "no value is so large")
    if FAULT == "hang":
        while tl.load(x_ptr, volatile=True) < 1e30:  # for ever
            value += 1.0
    tl.store(out_ptr + offsets, value, mask=inside)


def launch_with(fault: str, x: torch.Tensor, out: torch.Tensor, warmup: bool = False) -> list[Any]:
    """Copy, or fail as told."""
    if fault == "oom":
        torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    arguments = (x, out, x.data_ptr(), x.numel())
    return [copy_kernel.run(*arguments, FAULT=fault, BLOCK=BLOCK, grid=grid, warmup=warmup)]


def get_spec(family: str) -> KernelSpec:
    """The one family."""
    assert family == FAMILY
    return SPEC


def render(spec: KernelSpec, problem: Problem, config: Config) -> SimpleNamespace:
    """What `load` needs."""
    return SimpleNamespace(fault=config["fault"])


def load(rendered: SimpleNamespace) -> SimpleNamespace:
    """A module with `launch`."""
    return SimpleNamespace(launch=lambda x, out: launch_with(rendered.fault, x, out))


def explain(error: BaseException, rendered: SimpleNamespace) -> str:
    """The error's text."""
    return f"{type(error).__name__}: {error}"
