"""Sliding-window attention and the gated sum of the branches, forward, in one kernel: o_win is not read again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Cost, Problem
from . import _common as c
from . import gate_sum_fwd, win_attn_fwd
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def cost(problem: Problem, config: Config) -> Cost:
    """Those of the two kernels, but for the window's output, which stays in registers for the sum."""
    window, total = win_attn_fwd.cost(problem, config), gate_sum_fwd.cost(problem, config)
    kept = c.num_tokens(problem, "seq_q") * problem.num_q_heads * problem.d_v * ELEMENT_BYTES[problem.dtype]
    return replace(
        window,
        flops=window.flops + total.flops,
        bytes_moved=window.bytes_moved + total.bytes_moved - kept,
        on_chip_bytes=window.on_chip_bytes + total.on_chip_bytes - kept,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equations in PyTorch."""
    found = win_attn_fwd.run_reference(problem, inputs, layout, positions)
    out = reference.combine(inputs["gates"], inputs["o_cmp"], inputs["o_slc"], found["o"])
    return {**found, "out": out}


SPEC = replace(
    win_attn_fwd.SPEC,
    family="win_sum_fwd",
    doc="sliding-window attention, its log-sum-exp and the gated sum of the three branches",
    arguments=(
        *c.attention_arguments("K", "k_start"),
        Argument("o_cmp", ("Q", "HQ", "D_V")),
        Argument("o_slc", ("Q", "HQ", "D_V")),
        Argument("gates", ("Q", "HQ", 3), fill="gates"),
        Argument("out", ("Q", "HQ", "D_V"), fill="out"),
    ),
    cost=cost,
    reference=run_reference,
    library="",
)
