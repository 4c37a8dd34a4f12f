"""Gated sum of the branches, backward: gradients of the gates and the delta of every branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from ._lazy import gradients

if TYPE_CHECKING:
    from ..layout import PackedLayout

TENSORS = 4  # do and the three branches, held at once


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """A head dim that is no power of two needs a mask."""
    return {"dtype": problem.dtype, "exact_d": problem.d_v == c.next_power_of_2(problem.d_v)}


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {"D": problem.d_v, "D_POW2": c.next_power_of_2(problem.d_v), "BLOCK_R": config["BLOCK_R"]}


def cost(problem: Problem, config: Config) -> Cost:
    """Three dot products a row; everything crosses device memory once."""
    rows = c.num_tokens(problem, "seq_q") * problem.num_q_heads
    moved = float(rows * (ELEMENT_BYTES[problem.dtype] * (TENSORS * problem.d_v + 6) + 3 * 4))
    return Cost(flops=6.0 * rows * problem.d_v, bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The gradients in PyTorch."""
    names = ("do", "gates", "o_cmp", "o_slc", "o_win")
    return dict(gradients.gate_gradients(*(inputs[name] for name in names)))


def _tiles_fit(problem: Problem, config: Config) -> bool:
    elements = int(config["BLOCK_R"]) * c.next_power_of_2(problem.d_v) * TENSORS
    return elements / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


SPEC = KernelSpec(
    family="gate_sum_bwd",
    doc="gradients of the gates and delta of each branch",
    arguments=(
        Argument("do", ("Q", "HQ", "D_V")),
        Argument("gates", ("Q", "HQ", 3), fill="gates"),
        Argument("o_cmp", ("Q", "HQ", "D_V")),
        Argument("o_slc", ("Q", "HQ", "D_V")),
        Argument("o_win", ("Q", "HQ", "D_V")),
        Argument("dgates", ("Q", "HQ", 3), fill="out"),
        Argument("delta_cmp", ("Q", "HQ"), "float32", fill="out"),
        Argument("delta_slc", ("Q", "HQ"), "float32", fill="out"),
        Argument("delta_win", ("Q", "HQ"), "float32", fill="out"),
    ),
    problem_fields=("batch", "seq_q", "num_q_heads", "d_v", "dtype"),
    nsa_fields=(),
    params=(
        Param("BLOCK_R", (1, 2, 4, 8, 16, 32, 64), "rows a program, each one token of one query head"),
        Param("num_warps", (1, 2, 4, 8), "warps of a program", reserve=(16,)),
    ),
    constraints=(Constraint("four tiles must fit in 240 registers a thread", _tiles_fit),),
    rules=(),
    defaults=lambda problem: {"BLOCK_R": max(1, min(64, 2048 // c.next_power_of_2(problem.d_v))), "num_warps": 4},
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
