"""Selected and window attention of a decode step over a paged cache, and the gated sum of the three branches."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from . import _paged as g
from ._lazy import paged


def block_g(problem: Problem) -> int:
    """Rows of a program's tile: the heads of a group, padded to what a matrix instruction needs."""
    return max(16, c.next_power_of_2(problem.group_size))


def splits(config: Config) -> int:
    """Programs that share one token and kv head."""
    return int(config["SLC_SPLITS"]) + int(config["WIN_SPLITS"])


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernels."""
    nsa, block_s = problem.nsa, c.next_power_of_2(splits(config))
    return {
        "D_QK": problem.d_qk,
        "D_V": problem.d_v,
        "G": problem.group_size,
        "BLOCK_G": block_g(problem),
        "BLOCK_T": 1,
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_S": block_s,
        "BLOCK_D": g.block_d(problem, block_g(problem), block_s),
        "SLC_SPLITS": config["SLC_SPLITS"],
        "WIN_SPLITS": config["WIN_SPLITS"],
        "PAGE": problem.page_size,
        "SELECT_BLOCK": nsa.select_block_size,
        "N": nsa.num_selected,
        "N_POW2": c.next_power_of_2(nsa.num_selected),
        "WINDOW": nsa.window_size,
    }


def defaults(problem: Problem) -> Config:
    """Shares of about 256 keys, small tiles: works on every GPU from sm_80 on."""
    wide = problem.d_qk + problem.d_v > 256 or problem.dtype == "float32"
    nsa = problem.nsa
    keys = nsa.num_selected * nsa.select_block_size
    return {
        "BLOCK_N": min(32 if wide else 64, nsa.select_block_size),
        "SLC_SPLITS": min(8, c.next_power_of_2(max(1, keys // 256)), c.next_power_of_2(nsa.num_selected)),
        "WIN_SPLITS": min(8, c.next_power_of_2(max(1, nsa.window_size // 256))),
        "finish": "ticket",
        "carry_page": False,
        "heads_first": False,
        "num_warps": 4,
        "num_stages": 2,
        "launch_pdl": False,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Every visible key and value is read once a token; blocks that two new tokens share come from L2."""
    nsa = problem.nsa
    selected = min(nsa.num_selected * nsa.select_block_size, problem.seq_k)
    keys = problem.batch * problem.num_kv_heads * (selected + min(nsa.window_size, problem.seq_k))
    width, heads = problem.d_qk + problem.d_v, problem.batch * problem.seq_q * problem.num_q_heads
    vectors = heads * (problem.d_qk + 2 * problem.d_v) * ELEMENT_BYTES[problem.dtype]
    pages = float(keys * width * g.cache_bytes(problem))
    partial = (
        8.0 * problem.batch * problem.seq_q * problem.num_kv_heads * splits(config) * block_g(problem) * problem.d_v
    )
    flops = 2.0 * keys * problem.seq_q * width
    return Cost(
        flops * problem.group_size,
        pages + vectors,
        on_chip_bytes=pages * problem.seq_q + vectors + partial,
        mma_flops=flops * block_g(problem),
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: object = None, positions: object = None
) -> dict[str, Any]:
    """The paper's equations in PyTorch, for the pages of each sequence."""
    names = ("k_slc", "v_slc", "k_win", "v_win")
    k_slc, v_slc, k_win, v_win = (paged.Pages(inputs[name], inputs.get(f"{name}_scale")) for name in names)
    blocks, o_cmp, gates = inputs["blocks"], inputs["o_cmp"], inputs["gates"]
    where = (inputs["table"], inputs["lengths"], problem.nsa)
    return {"out": paged.selected_window_decode(inputs["q"], k_slc, v_slc, k_win, v_win, blocks, o_cmp, gates, *where)}


def _fits(problem: Problem, config: Config) -> bool:
    width = block_g(problem) * (int(config["BLOCK_N"]) + problem.d_v)
    return width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


SPEC = KernelSpec(
    family="slc_win_decode_fwd",
    doc="selected and window attention and the gated sum of a decode step",
    arguments=(
        Argument("q", ("Q", "HQ", "D_QK")),
        *g.page_arguments("k_slc", "PAGE", "tokens", "D_QK"),
        *g.page_arguments("v_slc", "PAGE", "tokens", "D_V"),
        *g.page_arguments("k_win", "PAGE", "tokens", "D_QK"),
        *g.page_arguments("v_win", "PAGE", "tokens", "D_V"),
        *g.TABLE_ARGUMENTS,
        Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks"),
        Argument("o_cmp", ("Q", "HQ", "D_V")),
        Argument("gates", ("Q", "HQ", 3), fill="gates"),
        Argument("out", ("Q", "HQ", "D_V"), fill="out"),
        g.COUNTERS,
    ),
    scalars=("scale", "seq_k"),
    problem_fields=(*g.PROBLEM_FIELDS, "locality"),
    nsa_fields=("select_block_size", "num_selected", "num_initial", "num_local", "window_size"),
    params=(
        Param("BLOCK_N", (16, 32, 64, 128), "keys a tile", reserve=(256,)),
        Param("SLC_SPLITS", (1, 2, 4, 8, 16), "programs that share the selected blocks of a token"),
        Param("WIN_SPLITS", (1, 2, 4, 8), "programs that share the window of a token", reserve=(16,)),
        g.FINISH,
        g.CARRY_PAGE,
        g.HEADS_FIRST,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.LAUNCH_PDL,
    ),
    constraints=(
        Constraint(
            "BLOCK_N must divide select_block_size (l')",
            lambda p, x: p.nsa.select_block_size % int(x["BLOCK_N"]) == 0,
        ),
        Constraint(
            "there must be at least as many blocks (n) as programs that share them",
            lambda p, x: int(x["SLC_SPLITS"]) <= c.next_power_of_2(p.nsa.num_selected),
        ),
        Constraint("accumulators and scores must fit in 240 registers a thread", _fits),
        g.HEADS_SHARE,
        g.TILES_FIT,
    ),
    rules=g.RULES,
    defaults=defaults,
    cost=cost,
    structure=g.structure,
    constants=constants,
    reference=run_reference,
    cases=g.small_cases(),
    layouts=("paged",),
)
