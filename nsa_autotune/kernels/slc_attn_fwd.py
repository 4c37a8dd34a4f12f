"""Selected attention, forward: o and lse over the keys of the selected blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import NSAConfig
from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from . import _gluon as g
from . import _key_major as k
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout

BLOCK_T = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = {  # a tile's, by loop order; a union has a bit a token
    "query_major": BLOCK_T[:1],
    "union": BLOCK_T[1:6],
    "pair": (2,),
    k.ORDER: BLOCK_T,
}
WIDE_GROUP = Problem(  # the group that pair needs, with blocks that only some tokens of a tile chose
    seq_q=70,
    seq_k=70,
    num_q_heads=9,
    num_kv_heads=1,
    d_qk=48,
    d_v=32,
    dtype="float16",
    locality=0.0,
    nsa=NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected=4),
)


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **c.tile_constants(problem, config),
        "N": problem.nsa.num_selected,
        "N_POW2": c.next_power_of_2(problem.nsa.num_selected),
        "SELECT_BLOCK": problem.nsa.select_block_size,
    }


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches, the loop order among them."""
    own = {"loop_order": config["loop_order"], "carry": config["carry"], **g.structure(g.FORWARD, config)}
    return {**c.attention_structure(problem, config), **own}


def defaults(problem: Problem) -> Config:
    """Query-major, pointer loads: never worse than the number of selected blocks, whatever the locality."""
    wide = problem.d_qk + problem.d_v > 256 or problem.dtype == "float32"
    return {
        "loop_order": "query_major",
        "BLOCK_T": 1,
        "BLOCK_N": min(problem.nsa.select_block_size, 32 if wide else 64),
        "swap": False,
        "use_tma": False,
        "split_mask": False,
        "lean_softmax": False,
        "carry": False,
        **g.defaults(g.FORWARD),
        **k.defaults(),
        "num_warps": 4 if wide or problem.group_size > 16 else 2,
        "num_stages": 2,
        "maxnreg": 0,
    }


def tile_blocks(problem: Problem, config: Config) -> float:
    """Expected blocks that a tile reads: the union, or what both its tokens chose and then each token's others."""
    nsa, tokens = problem.nsa, int(config["BLOCK_T"])
    if config["loop_order"] != "pair":
        return c.union_blocks(problem, tokens)
    chosen = min(nsa.num_selected, nsa.num_select_blocks(problem.seq_k))
    forced = min(nsa.num_initial + nsa.num_local, chosen)
    shared = forced + (chosen - forced) * problem.locality ** (tokens - 1)
    return shared + tokens * (chosen - shared)


def cost(problem: Problem, config: Config) -> Cost:
    """QK and PV products over n blocks a token; a union tile multiplies all its rows with every block of the union."""
    nsa, size, width = problem.nsa, ELEMENT_BYTES[problem.dtype], problem.d_qk + problem.d_v
    tokens, block_t = c.num_tokens(problem, "seq_q"), int(config["BLOCK_T"])
    seen = min(c.total_positions(problem), float(tokens) * nsa.num_selected * nsa.select_block_size)
    flops = 2 * seen * problem.num_q_heads * width
    reads = tile_blocks(problem, config) / min(nsa.num_selected, nsa.num_select_blocks(problem.seq_k))
    waste = 1.0 if config["loop_order"] == "pair" else reads
    keys = c.num_tokens(problem, "seq_k") * problem.num_kv_heads * width
    tile_rows, tile_columns = c.score_tile(problem, config)
    found = Cost(
        flops=flops,
        bytes_moved=size * (tokens * problem.num_q_heads * width + keys) + 4 * tokens * problem.num_q_heads,
        on_chip_bytes=seen * reads / block_t * problem.num_kv_heads * width * size,
        mma_flops=flops * waste * c.block_g(problem, config) / problem.group_size,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
    )
    return k.work(problem, config, found, problem.d_qk, problem.d_v) if k.is_on(config) else found


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch."""
    q, k, v, blocks = inputs["q"], inputs["k"], inputs["v"], inputs["blocks"]
    o, lse = reference.selected_attention(q, k, v, blocks, problem.nsa, positions=positions, layout=layout)
    return {"o": o, "lse": lse}


SPEC = KernelSpec(
    family="slc_attn_fwd",
    doc="attention over the selected blocks and its log-sum-exp",
    arguments=c.attention_arguments("K", "k_start", Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks")),
    scalars=("scale",),
    problem_fields=(
        "batch",
        "seq_q",
        "seq_k",
        "num_q_heads",
        "num_kv_heads",
        "d_qk",
        "d_v",
        "dtype",
        "layout",
        "locality",
    ),
    nsa_fields=("select_block_size", "num_selected"),
    params=(
        Param(
            "loop_order",
            tuple(TOKENS),
            "one token a tile; the union of adjacent ones; two, what both chose first; or a block and who chose it",
            structural=True,
        ),
        Param("BLOCK_T", BLOCK_T, "query tokens a tile"),
        Param("BLOCK_N", (16, 32, 64, 128), "keys a tile"),
        c.SWAP,
        c.USE_TMA,
        replace(c.SPLIT_MASK, former=False),
        c.LEAN_SOFTMAX,
        Param("carry", (False, True), "load the next block one step ahead", structural=True, former=False),
        *g.FORWARD,
        k.CHUNK,
        k.NUM_RUNS,
        Param("num_warps", (1, 2, 4, 8), "warps of a program", reserve=(16,)),
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        *c.TILE_CONSTRAINTS,
        Constraint(
            "query_major takes one token a tile, union 2 to 32 and pair 2",
            lambda p, config: int(config["BLOCK_T"]) in TOKENS[str(config["loop_order"])],
        ),
        Constraint(
            "pair needs 9 query heads or more a kv head, so that one token fills a matrix instruction",
            lambda p, config: config["loop_order"] != "pair" or c.next_power_of_2(p.group_size) >= 16,
        ),
        Constraint(
            "pair holds its lists in registers, and key_major carries in any case: nothing to switch",
            lambda p, config: config["loop_order"] in ("query_major", "union") or not config["carry"],
        ),
        *g.constraints(g.FORWARD, loop_order="union", use_tma=True, lean_softmax=True, swap=False, carry=False),
        *k.constraints("d_v", 1),
        Constraint(
            "split_mask splits one list of blocks, which query_major and union have",
            lambda p, config: config["loop_order"] in ("query_major", "union") or not config["split_mask"],
        ),
        Constraint(
            "BLOCK_N must divide select_block_size (l')",
            lambda p, config: p.nsa.select_block_size % int(config["BLOCK_N"]) == 0,
        ),
    ),
    rules=(*c.ATTENTION_RULES, *c.SELECTION_RULES),
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=(*c.small_cases(), WIDE_GROUP),
)
