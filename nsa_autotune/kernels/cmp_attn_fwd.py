"""Compressed attention, forward: o and lse over the visible compressed blocks."""

from __future__ import annotations

from typing import Any

from .. import reference
from ..layout import PackedLayout
from ..spec import ELEMENT_BYTES, Argument, Config, Cost, KernelSpec, Param, Problem, Value
from . import _common as c

ARGUMENTS = (
    Argument("q", ("Q", "HQ", "D_QK")),
    Argument("k", ("C", "H", "D_QK")),
    Argument("v", ("C", "H", "D_V")),
    Argument("o", ("Q", "HQ", "D_V"), fill="out"),
    Argument("lse", ("Q", "HQ"), "float32", fill="out"),
    c.PACKED_ARGUMENTS["q_pos"],
    c.PACKED_ARGUMENTS["cmp_start"],
)


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        "D_QK": problem.d_qk,
        "D_V": problem.d_v,
        "G": problem.group_size,
        "BLOCK_G": c.block_g(problem, config),
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_N": config["BLOCK_N"],
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def defaults(problem: Problem) -> Config:
    """Half-size tiles and pointer loads: works on every GPU from sm_80 on."""
    wide = problem.d_qk + problem.d_v > 256 or problem.dtype == "float32"
    return {
        "BLOCK_T": c.default_block_t(problem, 64),
        "BLOCK_N": 32 if wide else 64,
        "use_tma": False,
        "split_mask": True,
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """QK and PV products over the visible blocks; each tile reads its visible keys and values through L2 once."""
    visible = c.total_positions(problem) / problem.nsa.compress_stride  # (token, block) pairs a kv head
    width, size = problem.d_qk + problem.d_v, ELEMENT_BYTES[problem.dtype]
    flops = 2 * visible * problem.num_q_heads * width
    tokens = c.num_tokens(problem, "seq_q")
    rows = c.num_tokens(problem, "seq_k") // problem.nsa.compress_stride
    moved = size * (tokens * problem.num_q_heads * width + rows * problem.num_kv_heads * width)
    return Cost(
        flops=flops,
        bytes_moved=moved + 4 * tokens * problem.num_q_heads,
        on_chip_bytes=visible / int(config["BLOCK_T"]) * problem.num_kv_heads * width * size,
        mma_flops=flops * c.block_g(problem, config) / problem.group_size,
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
    arguments=ARGUMENTS,
    scalars=("scale", "seq_k"),
    problem_fields=("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "layout"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_T", (1, 2, 4, 8, 16, 32, 64, 128), "query tokens a tile"),
        Param("BLOCK_N", (16, 32, 64, 128), "compressed keys a tile"),
        c.USE_TMA,
        c.SPLIT_MASK,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        c.ROWS_16_TO_128,
        c.NO_IDLE_TOKENS,
        c.ACCUMULATORS_FIT,
        c.TILES_FIT,
        c.TMA_16_BIT,
        c.REGISTER_CAP_FITS,
    ),
    rules=c.ATTENTION_RULES,
    defaults=defaults,
    cost=cost,
    structure=c.attention_structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
