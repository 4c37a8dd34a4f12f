"""Selected attention, backward: dq."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _backward as b
from . import _common as c
from . import _gluon as g
from . import _key_major as k

BLOCK_T = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = {"query_major": BLOCK_T[:1], "union": BLOCK_T[1:6], k.ORDER: BLOCK_T}  # a tile's; a union has a bit a token


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
    return {**c.attention_structure(problem, config), "loop_order": config["loop_order"], **g.structure(g.DQ, config)}


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
        **g.defaults(g.DQ),
        **k.defaults(),
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Products over n blocks a token; a union tile multiplies all its rows with every block of the union."""
    nsa, tokens = problem.nsa, c.num_tokens(problem, "seq_q")
    pairs = min(c.total_positions(problem), float(tokens) * nsa.num_selected * nsa.select_block_size)
    chosen = min(nsa.num_selected, nsa.num_select_blocks(problem.seq_k))
    waste = c.union_blocks(problem, int(config["BLOCK_T"])) / chosen
    found = b.dq_cost(problem, config, pairs, c.num_tokens(problem, "seq_k"), waste)
    read = problem.d_qk + problem.d_v
    return k.work(problem, config, found, read, problem.d_qk) if k.is_on(config) else found


SPEC = KernelSpec(
    family="slc_attn_bwd_dq",
    doc="gradient of the queries of attention over the selected blocks",
    arguments=(
        *b.arguments("slc", "K", b.DQ, "q_pos", "k_start"),
        Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks"),
    ),
    scalars=("scale",),
    problem_fields=(*b.ATTENTION_FIELDS, "locality"),
    nsa_fields=("select_block_size", "num_selected"),
    params=(
        Param(
            "loop_order",
            tuple(TOKENS),
            "one token a tile, the union of adjacent ones, or a block and who chose it",
            structural=True,
        ),
        Param("BLOCK_T", BLOCK_T, "query tokens a tile"),
        Param("BLOCK_N", (16, 32, 64, 128), "keys a tile"),
        replace(c.SWAP, former=False),
        c.USE_TMA,
        replace(c.SPLIT_MASK, former=False),
        *g.DQ,
        k.CHUNK,
        k.NUM_RUNS,
        Param("num_warps", (1, 2, 4, 8), "warps of a program", reserve=(16,)),
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        *b.DQ_CONSTRAINTS,
        Constraint(
            "query_major takes one token a tile, union 2 to 32",
            lambda p, config: int(config["BLOCK_T"]) in TOKENS[str(config["loop_order"])],
        ),
        Constraint(
            "BLOCK_N must divide select_block_size (l')",
            lambda p, config: p.nsa.select_block_size % int(config["BLOCK_N"]) == 0,
        ),
        *g.constraints(g.DQ, loop_order="union", use_tma=True, swap=False),
        *k.constraints("d_qk", 2),
    ),
    rules=(*c.ATTENTION_RULES, *c.SELECTION_RULES),
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=b.reference("slc", "dq"),
    cases=c.small_cases(),
)
