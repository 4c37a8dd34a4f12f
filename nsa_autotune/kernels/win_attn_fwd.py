"""Sliding-window attention, forward: o and lse over the last w tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Config, Cost, KernelSpec, Problem, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **c.tile_constants(problem, config),
        "WINDOW": problem.nsa.window_size,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """QK and PV products over the window; a tile of BLOCK_T tokens reads w + BLOCK_T - 1 keys, padded to BLOCK_N."""
    tokens = c.num_tokens(problem, "seq_q")
    seen = min(c.total_positions(problem), float(tokens) * problem.nsa.window_size)
    width, size = problem.d_qk + problem.d_v, ELEMENT_BYTES[problem.dtype]
    flops = 2 * seen * problem.num_q_heads * width
    block_t, block_n = int(config["BLOCK_T"]), int(config["BLOCK_N"])
    tile_keys = -(-(problem.nsa.window_size + block_t - 1) // block_n) * block_n
    waste = tile_keys / problem.nsa.window_size * c.block_g(problem, config) / problem.group_size
    keys = c.num_tokens(problem, "seq_k") * problem.num_kv_heads * width
    return Cost(
        flops=flops,
        bytes_moved=size * (tokens * problem.num_q_heads * width + keys) + 4 * tokens * problem.num_q_heads,
        on_chip_bytes=seen / block_t * problem.num_kv_heads * width * size,
        mma_flops=flops * waste,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    o, lse = reference.window_attention(q, k, v, problem.nsa, positions=positions, layout=layout)
    return {"o": o, "lse": lse}


SPEC = KernelSpec(
    family="win_attn_fwd",
    doc="sliding-window attention and its log-sum-exp",
    arguments=c.attention_arguments("K", "k_start"),
    scalars=("scale",),
    problem_fields=("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "layout"),
    nsa_fields=("window_size",),
    params=(
        *c.TILE_PARAMS,
        c.USE_TMA,
        c.SPLIT_MASK,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=c.TILE_CONSTRAINTS,
    rules=c.ATTENTION_RULES,
    defaults=partial(c.range_defaults, split_mask=False),
    cost=cost,
    structure=c.attention_structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
    library="flex_attention",
)
