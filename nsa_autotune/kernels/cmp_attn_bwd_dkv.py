"""Compressed attention, backward: dk and dv."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ELEMENT_BYTES, Config, Constraint, Cost, KernelSpec, Problem, Value
from . import _backward as b
from . import _common as c

L2_BYTES = 50 << 20  # of sm_90


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **b.dkv_constants(problem, config),
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Products over the visible blocks."""
    stride = problem.nsa.compress_stride
    pairs = c.total_positions(problem) / stride
    base = b.dkv_cost(problem, config, pairs, c.num_tokens(problem, "seq_k") // stride)
    row_bytes = problem.group_size * (problem.d_qk + problem.d_v) * ELEMENT_BYTES[problem.dtype]
    if config["lockstep"] or problem.seq_q * row_bytes < L2_BYTES:
        return base
    # each key tile streams its own query tiles from memory
    streamed = pairs / int(config["BLOCK_N"]) * problem.num_kv_heads * row_bytes
    return replace(base, bytes_moved=base.bytes_moved + streamed)


def defaults(problem: Problem) -> Config:
    """Four splits of interleaved tiles: key tiles of any number keep the GPU busy."""
    return {**b.dkv_defaults(problem, split_mask=True, num_splits=4), "lockstep": False}


SPEC = KernelSpec(
    family="cmp_attn_bwd_dkv",
    doc="gradients of the keys and values of compressed attention",
    arguments=b.arguments("cmp", "C", b.dkv("C"), "q_pos", "cmp_start", "cmp_begin", "cmp_end"),
    scalars=("scale", "seq_k"),
    problem_fields=b.ATTENTION_FIELDS,
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(*b.DKV_PARAMS, b.LOCKSTEP),
    constraints=(
        *b.DKV_CONSTRAINTS,
        Constraint(
            "lockstep needs two splits or more, to split the tokens in runs",
            lambda _, config: not config["lockstep"] or int(config["num_splits"]) > 1,
        ),
    ),
    rules=c.ATTENTION_RULES,
    defaults=defaults,
    cost=cost,
    structure=b.dkv_structure,
    constants=constants,
    reference=b.reference("cmp", "dk", "dv"),
    cases=c.small_cases(),
)
