"""Sliding-window attention, forward: o and lse over the last w tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout

TAIL_N = 16  # keys a narrow tile, the fewest that a matrix instruction of P V takes


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    narrow = {"TAIL_N": TAIL_N} if config["narrow_tail"] else {}
    return {**c.tile_constants(problem, config), "WINDOW": problem.nsa.window_size, **narrow}


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches, the narrow tail among them."""
    return {**c.attention_structure(problem, config), "narrow_tail": config["narrow_tail"]}


def defaults(problem: Problem) -> Config:
    """As every attention over a range of keys, in one masked loop."""
    return {**c.range_defaults(problem, split_mask=False), "narrow_tail": False}


def tile_keys(problem: Problem, config: Config) -> int:
    """Keys that a tile of BLOCK_T tokens multiplies with, w + BLOCK_T - 1 of them needed."""
    needed = problem.nsa.window_size + int(config["BLOCK_T"]) - 1
    block_n = int(config["BLOCK_N"])
    if not config["narrow_tail"]:
        return -(-needed // block_n) * block_n
    return needed // block_n * block_n + -(-(needed % block_n) // TAIL_N) * TAIL_N


def cost(problem: Problem, config: Config) -> Cost:
    """QK and PV products over the window; a tile of BLOCK_T tokens reads w + BLOCK_T - 1 keys, padded to BLOCK_N."""
    tokens = c.num_tokens(problem, "seq_q")
    seen = min(c.total_positions(problem), float(tokens) * problem.nsa.window_size)
    width, size = problem.d_qk + problem.d_v, ELEMENT_BYTES[problem.dtype]
    flops = 2 * seen * problem.num_q_heads * width
    block_t = int(config["BLOCK_T"])
    waste = tile_keys(problem, config) / problem.nsa.window_size * c.block_g(problem, config) / problem.group_size
    keys = c.num_tokens(problem, "seq_k") * problem.num_kv_heads * width
    tile_rows, tile_columns = c.score_tile(problem, config)
    return Cost(
        flops=flops,
        bytes_moved=size * (tokens * problem.num_q_heads * width + keys) + 4 * tokens * problem.num_q_heads,
        on_chip_bytes=seen / block_t * problem.num_kv_heads * width * size,
        mma_flops=flops * waste,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
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
        c.LEAN_SOFTMAX,
        Param(
            "narrow_tail",
            (False, True),
            f"tiles of {TAIL_N} keys after the last whole one",
            structural=True,
            former=False,
        ),
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        *c.TILE_CONSTRAINTS,
        Constraint(
            "a narrow tail follows the tiles that split_mask peels, and is narrower than they are",
            lambda p, config: (
                not config["narrow_tail"] or (bool(config["split_mask"]) and int(config["BLOCK_N"]) > TAIL_N)
            ),
        ),
    ),
    rules=c.ATTENTION_RULES,
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
    library="flex_attention",
)
