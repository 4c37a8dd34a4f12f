"""Selected attention, backward: dk and dv, gathered over the tokens that selected each block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, ProblemRule, Value
from . import _backward as b
from . import _common as c


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    nsa = problem.nsa
    return {
        **c.tile_constants(problem, config),
        "N": nsa.num_selected,
        "N_POW2": c.next_power_of_2(nsa.num_selected),
        "RATIO": nsa.select_block_size // nsa.compress_stride,
        "SELECT_BLOCK": nsa.select_block_size,
        "CHUNK": config["CHUNK"],
    }


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """What all attention templates read; keys and values are loaded once, with pointers."""
    switches = c.attention_structure(problem, {**config, "use_tma": False})
    kept = {name: value for name, value in switches.items() if name != "store_lse"}
    return {**kept, "dp_first": config["dp_first"]}


def defaults(problem: Problem) -> Config:
    """Tiles of 32 rows: dk and dv stay in registers; one item a block unless over 2048 tokens selected it."""
    exact = problem.dtype == "float32"
    wide = problem.d_qk + problem.d_v > 256 or exact
    config: Config = {"BLOCK_T": min(c.default_block_t(problem, 16 if exact else 32), 64)}
    crowded = exact or problem.d_qk + problem.d_v > 384 or c.block_m(problem, config) > 32  # or a large group
    return {
        **config,
        "BLOCK_N": min(problem.nsa.select_block_size, 32 if wide or crowded else 64),
        "CHUNK": 2048,
        "dp_first": False,
        "split_mask": False,  # two loops can make ptxas serialize the matrix instructions
        "num_warps": 8 if crowded else 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Products over n blocks a token, the inversion's lists, and partial sums of the blocks of several items."""
    nsa, tokens = problem.nsa, c.num_tokens(problem, "seq_q")
    pairs = min(c.total_positions(problem), float(tokens) * nsa.num_selected * nsa.select_block_size)
    base = b.dkv_cost(problem, {**config, "num_splits": 1}, pairs, c.num_tokens(problem, "seq_k"))
    entries = pairs / nsa.select_block_size * problem.num_kv_heads
    items = entries / int(config["CHUNK"])
    extra = 16 * entries + 8 * items * nsa.select_block_size * (problem.d_qk + problem.d_v)
    return replace(base, bytes_moved=base.bytes_moved + extra, on_chip_bytes=base.on_chip_bytes + extra)


SPEC = KernelSpec(
    family="slc_attn_bwd_dkv",
    doc="gradients of the keys and values of attention over the selected blocks",
    arguments=(
        *b.arguments("slc", "K", b.dkv("K"), "q_pos", "cmp_start", "slc_first", "slc_end"),
        Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks"),
    ),
    scalars=("scale",),
    problem_fields=(*b.ATTENTION_FIELDS, "locality"),
    nsa_fields=("compress_stride", "select_block_size", "num_selected"),
    params=(
        Param("BLOCK_T", (1, 2, 4, 8, 16, 32, 64), "query tokens a tile"),
        Param("BLOCK_N", (16, 32, 64, 128), "keys a tile"),
        Param(
            "CHUNK",
            (256, 512, 1024, 2048, 4096),
            "entries of a block's token list that one program walks",
            reserve=(8192,),
        ),
        b.SPLIT_QUERIES,
        b.DP_FIRST,
        b.NUM_WARPS,
        b.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        *b.DKV_TILES,
        Constraint(
            "BLOCK_N must divide select_block_size (l')",
            lambda p, config: p.nsa.select_block_size % int(config["BLOCK_N"]) == 0,
        ),
    ),
    rules=(
        *c.ATTENTION_RULES,
        *c.SELECTION_RULES,
        ProblemRule(
            "query tokens times kv heads times num_selected must be below 2^31: the lists of tokens count in int32",
            lambda p: c.num_tokens(p, "seq_q") * p.num_kv_heads * p.nsa.num_selected < 2**31,
            "Split the batch.",
        ),
    ),
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=b.reference("slc", "dk", "dv"),
    cases=c.small_cases(),
)
