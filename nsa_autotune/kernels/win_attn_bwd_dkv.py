"""Sliding-window attention, backward: dk and dv."""

from __future__ import annotations

from functools import partial

from ..spec import Config, Cost, KernelSpec, Problem, Value
from . import _backward as b
from . import _common as c


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {**b.dkv_constants(problem, config), "WINDOW": problem.nsa.window_size}


def cost(problem: Problem, config: Config) -> Cost:
    """Products over the window; a tile of BLOCK_N rows walks w + BLOCK_N - 1 of the other side, padded to BLOCK_T."""
    tokens, window = c.num_tokens(problem, "seq_q"), problem.nsa.window_size
    pairs = min(c.total_positions(problem), float(tokens) * window)
    held, walked = int(config["BLOCK_N"]), int(config["BLOCK_T"])
    waste = -(-(window + held - 1) // walked) * walked / window
    return b.dkv_cost(problem, config, pairs, c.num_tokens(problem, "seq_k"), waste)


SPEC = KernelSpec(
    family="win_attn_bwd_dkv",
    doc="gradients of the keys and values of sliding-window attention",
    arguments=b.arguments("win", "K", b.dkv("K"), "q_pos", "k_start", "win_begin", "win_end"),
    scalars=("scale",),
    problem_fields=b.ATTENTION_FIELDS,
    nsa_fields=("window_size",),
    params=b.DKV_PARAMS,
    constraints=b.DKV_CONSTRAINTS,
    rules=c.ATTENTION_RULES,
    defaults=partial(b.dkv_defaults, split_mask=True, num_splits=1),
    cost=cost,
    structure=b.dkv_structure,
    constants=constants,
    reference=b.reference("win", "dk", "dv"),
    cases=c.small_cases(),
)
