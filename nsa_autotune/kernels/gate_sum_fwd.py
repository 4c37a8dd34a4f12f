"""Gated sum of the branches, forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """No switches: the sum is over flat elements."""
    return {"dtype": problem.dtype}


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {"D": problem.d_v, "BLOCK": config["BLOCK"]}


def cost(problem: Problem, config: Config) -> Cost:
    """Three products an element; everything crosses device memory once."""
    rows = c.num_tokens(problem, "seq_q") * problem.num_q_heads
    moved = float(ELEMENT_BYTES[problem.dtype] * rows * (4 * problem.d_v + 3))
    return Cost(flops=5.0 * rows * problem.d_v, bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch."""
    return {"out": reference.combine(inputs["gates"], inputs["o_cmp"], inputs["o_slc"], inputs["o_win"])}


SPEC = KernelSpec(
    family="gate_sum_fwd",
    doc="gated sum of the three branches",
    arguments=(
        Argument("o_cmp", ("Q", "HQ", "D_V")),
        Argument("o_slc", ("Q", "HQ", "D_V")),
        Argument("o_win", ("Q", "HQ", "D_V")),
        Argument("gates", ("Q", "HQ", 3), fill="gates"),
        Argument("out", ("Q", "HQ", "D_V"), fill="out"),
    ),
    problem_fields=("batch", "seq_q", "num_q_heads", "d_v", "dtype"),
    nsa_fields=(),
    params=(
        Param("BLOCK", (512, 1024, 2048, 4096, 8192), "elements a program", reserve=(256, 16384)),
        Param("num_warps", (2, 4, 8), "warps of a program", reserve=(1, 16)),
    ),
    constraints=(),
    rules=(),
    defaults=lambda problem: {"BLOCK": 2048, "num_warps": 4},
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
