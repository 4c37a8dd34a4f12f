"""Compressed attention, backward: dq."""

from __future__ import annotations

from functools import partial

from ..spec import Config, Cost, KernelSpec, Problem, Value
from . import _backward as b
from . import _common as c


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **c.tile_constants(problem, config),
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Products over the visible blocks."""
    stride = problem.nsa.compress_stride
    pairs = c.total_positions(problem) / stride
    return b.dq_cost(problem, config, pairs, c.num_tokens(problem, "seq_k") // stride)


SPEC = KernelSpec(
    family="cmp_attn_bwd_dq",
    doc="gradient of the queries of compressed attention",
    arguments=b.arguments("cmp", "C", b.DQ, "q_pos", "cmp_start"),
    scalars=("scale", "seq_k"),
    problem_fields=b.ATTENTION_FIELDS,
    nsa_fields=("compress_block_size", "compress_stride"),
    params=b.DQ_PARAMS,
    constraints=b.RANGE_DQ_CONSTRAINTS,
    rules=c.ATTENTION_RULES,
    defaults=partial(b.dq_defaults, split_mask=True),
    cost=cost,
    structure=b.dq_structure,
    constants=constants,
    reference=b.reference("cmp", "dq"),
    cases=c.small_cases(),
)
