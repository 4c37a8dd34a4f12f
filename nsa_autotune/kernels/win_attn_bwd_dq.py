"""Sliding-window attention, backward: dq."""

from __future__ import annotations

from functools import partial

from ..spec import Config, Cost, KernelSpec, Problem, Value
from . import _backward as b
from . import _common as c


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {**c.tile_constants(problem, config), "WINDOW": problem.nsa.window_size}


def cost(problem: Problem, config: Config) -> Cost:
    """Products over the window; a tile of BLOCK_T rows walks w + BLOCK_T - 1 of the other side, padded to BLOCK_N."""
    tokens, window = c.num_tokens(problem, "seq_q"), problem.nsa.window_size
    pairs = min(c.total_positions(problem), float(tokens) * window)
    held, walked = int(config["BLOCK_T"]), int(config["BLOCK_N"])
    waste = -(-(window + held - 1) // walked) * walked / window
    return b.dq_cost(problem, config, pairs, c.num_tokens(problem, "seq_k"), waste)


SPEC = KernelSpec(
    family="win_attn_bwd_dq",
    doc="gradient of the queries of sliding-window attention",
    arguments=b.arguments("win", "K", b.DQ, "q_pos", "k_start"),
    scalars=("scale",),
    problem_fields=b.ATTENTION_FIELDS,
    nsa_fields=("window_size",),
    params=b.DQ_PARAMS,
    constraints=b.RANGE_DQ_CONSTRAINTS,
    rules=c.ATTENTION_RULES,
    defaults=partial(b.dq_defaults, split_mask=False),
    cost=cost,
    structure=b.dq_structure,
    constants=constants,
    reference=b.reference("win", "dq"),
    cases=c.small_cases(),
)
