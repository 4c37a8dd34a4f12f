"""Compressed attention, forward: o and lse over the visible compressed blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Config, Cost, KernelSpec, Problem, Value
from . import _common as c
from . import _gluon as g
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    return {**c.attention_structure(problem, config), **g.structure(g.FORWARD, config)}


def defaults(problem: Problem) -> Config:
    """Half-size tiles and pointer loads: works on every GPU from sm_80 on."""
    return {**c.range_defaults(problem, split_mask=True), **g.defaults(g.FORWARD)}


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **c.tile_constants(problem, config),
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """QK and PV products over the visible blocks; each tile reads its visible keys and values through L2 once."""
    visible = c.total_positions(problem) / problem.nsa.compress_stride  # (token, block) pairs a kv head
    width, size = problem.d_qk + problem.d_v, ELEMENT_BYTES[problem.dtype]
    flops = 2 * visible * problem.num_q_heads * width
    tokens = c.num_tokens(problem, "seq_q")
    rows = c.num_tokens(problem, "seq_k") // problem.nsa.compress_stride
    moved = size * (tokens * problem.num_q_heads * width + rows * problem.num_kv_heads * width)
    tile_rows, tile_columns = c.score_tile(problem, config)
    return Cost(
        flops=flops,
        bytes_moved=moved + 4 * tokens * problem.num_q_heads,
        on_chip_bytes=visible / int(config["BLOCK_T"]) * problem.num_kv_heads * width * size,
        mma_flops=flops * c.block_g(problem, config) / problem.group_size,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch."""
    o, lse = reference.compressed_attention(
        inputs["q"], inputs["k"], inputs["v"], problem.nsa, seq_k=problem.seq_k, positions=positions, layout=layout
    )
    return {"o": o, "lse": lse}


SPEC = KernelSpec(
    family="cmp_attn_fwd",
    doc="compressed attention and its log-sum-exp",
    arguments=c.attention_arguments("C", "cmp_start"),
    scalars=("scale", "seq_k"),
    problem_fields=("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "layout"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        *c.TILE_PARAMS,
        c.USE_TMA,
        c.SPLIT_MASK,
        c.LEAN_SOFTMAX,
        *g.FORWARD,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(*c.TILE_CONSTRAINTS, *g.constraints(g.FORWARD, use_tma=True, lean_softmax=True)),
    rules=c.ATTENTION_RULES,
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
