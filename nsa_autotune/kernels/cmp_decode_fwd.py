"""Compressed attention and selection of a decode step, in one pass over the compressed keys of a paged cache."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, ProblemRule, Value
from . import _common as c
from . import _paged as g
from ._lazy import paged
from .slc_select_fwd import POWERS_TO_128, ratio, span

ONE_TOP = 128  # the BLOCK_TOP of configs that have no use for it
ONE_FINISH = 4  # their finish_warps


def rows(problem: Problem) -> int:
    """Rows of a program's tile: all new tokens of a sequence times the heads of a group."""
    return c.block_m(problem, {"BLOCK_T": c.next_power_of_2(problem.seq_q)})


def slots(problem: Problem) -> int:
    """Candidates that the running top-n keeps; at least 2, since Triton 3.6 can't rank a [1, 1] tensor."""
    return max(2, c.next_power_of_2(problem.nsa.num_selected))


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernels."""
    nsa, block_t = problem.nsa, c.next_power_of_2(problem.seq_q)
    return {
        **c.tile_constants(problem, {**config, "BLOCK_T": block_t}),
        "BLOCK_M": rows(problem),
        "SPLIT": config["SPLIT"],
        "BLOCK_S": config["BLOCK_S"],
        "BLOCK_J": config["BLOCK_J"],
        "BLOCK_TOP": config["BLOCK_TOP"],
        "BLOCK_D": g.block_d(problem, rows(problem), int(config["BLOCK_S"])),
        "CELLS": problem.page_size // nsa.compress_stride,
        "FIRST_CELL": paged.first_cell(nsa),
        "CMP_BLOCK": nsa.compress_block_size,
        "CMP_STRIDE": nsa.compress_stride,
        "SELECT_BLOCK": nsa.select_block_size,
        "RATIO": ratio(problem),
        "SPAN": span(problem),
        "N": nsa.num_selected,
        "N_POW2": slots(problem),
        "NUM_INITIAL": nsa.num_initial,
        "NUM_LOCAL": nsa.num_local,
    }


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches; `overlap`: windows reach into the next selection block, `exact_n`: n are kept."""
    exact = problem.nsa.num_selected == slots(problem)
    shared = g.structure(problem, config)
    return {**shared, "overlap": span(problem) > 1, "exact_n": exact}


def defaults(problem: Problem) -> Config:
    """Splits of about 4096 tokens, small tiles; a long list of blocks is ranked by several programs."""
    wide = problem.d_qk + problem.d_v > 256 or problem.dtype == "float32"
    block_n = max(32 if wide or rows(problem) > 64 else 64, ratio(problem))
    block_j = 64 if rows(problem) > 64 else 128
    pipelined = g.tiles_fit(problem, {"BLOCK_N": block_n, "num_stages": 2})
    return {
        "BLOCK_N": block_n,
        "SPLIT": max(256, block_n),
        "BLOCK_S": 4 if rows(problem) > 64 else 8,
        "BLOCK_J": block_j,
        "BLOCK_TOP": ONE_TOP,
        "finish": "kernel" if problem.nsa.num_select_blocks(problem.seq_k) > block_j else "ticket",
        "finish_warps": ONE_FINISH,
        "carry_page": False,
        "heads_first": False,
        "num_warps": 4,
        "num_stages": 2 if pipelined else 1,
        "launch_pdl": False,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Every compressed key and value crosses device memory once; so do the partial results, through L2."""
    cells = problem.batch * problem.nsa.num_compressed(problem.seq_k) * problem.num_kv_heads
    width, heads = problem.d_qk + problem.d_v, problem.seq_q * problem.num_q_heads
    moved = cells * width * g.cache_bytes(problem) + problem.batch * heads * width * ELEMENT_BYTES[problem.dtype]
    flops = 2.0 * cells * width * problem.seq_q * problem.group_size
    splits = -(-problem.nsa.num_compressed(problem.seq_k) // int(config["SPLIT"]))
    partial = 4.0 * problem.batch * problem.num_kv_heads * splits * rows(problem) * problem.d_v
    masses = 8.0 * cells / ratio(problem) * rows(problem)
    through_l2 = moved + 2 * (partial + masses)
    return Cost(flops, moved, on_chip_bytes=through_l2, mma_flops=2.0 * cells * width * rows(problem))


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: object = None, positions: object = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch, for the pages of each sequence."""
    return {"o": _reference(problem, inputs)[0]}


def importance(problem: Problem, inputs: dict[str, Any]) -> Any:
    """Importance of the selection blocks for each new token: `[B * Q, H, NB]`."""
    return _reference(problem, inputs)[1].flatten(0, 1)


def _reference(problem: Problem, inputs: dict[str, Any]) -> tuple[Any, Any]:
    k, v = (paged.Pages(inputs[name], inputs.get(f"{name}_scale")) for name in ("k", "v"))
    return paged.compressed_decode(inputs["q"], k, v, inputs["table"], inputs["lengths"], problem.nsa)


def _scores_fit(problem: Problem, config: Config) -> bool:
    width = rows(problem) * (int(config["BLOCK_N"]) + problem.d_v)
    return width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _candidates_fit(problem: Problem, config: Config) -> bool:
    """Masses of all heads of BLOCK_J blocks, in the kernel that joins the splits."""
    values = c.block_g(problem, {"BLOCK_T": c.next_power_of_2(problem.seq_q)}) * int(config["BLOCK_J"])
    warps = int(config["num_warps" if config["finish"] == "ticket" else "finish_warps"])
    return values / (32 * warps) <= c.MAX_THREAD_REGISTERS // 2


SPEC = KernelSpec(
    family="cmp_decode_fwd",
    doc="compressed attention and selection of a decode step",
    arguments=(
        Argument("q", ("Q", "HQ", "D_QK")),
        *g.page_arguments("k", "CELLS", "cells", "D_QK"),
        *g.page_arguments("v", "CELLS", "cells", "D_V"),
        *g.TABLE_ARGUMENTS,
        Argument("o", ("Q", "HQ", "D_V"), fill="out"),
        Argument("blocks", ("Q", "H", "N"), "int32", fill="out"),
        g.COUNTERS,
    ),
    scalars=("scale", "seq_k"),
    problem_fields=g.PROBLEM_FIELDS,
    nsa_fields=(
        "compress_block_size",
        "compress_stride",
        "select_block_size",
        "num_selected",
        "num_initial",
        "num_local",
    ),
    params=(
        Param("BLOCK_N", (16, 32, 64, 128), "compressed rows a tile", reserve=(256,)),
        Param("SPLIT", (64, 128, 256, 512, 1024), "compressed rows a program", reserve=(32, 2048)),
        Param("BLOCK_S", (4, 8, 16), "splits joined at once", reserve=(2, 32)),
        Param("BLOCK_J", (32, 64, 128, 256), "selection blocks that are ranked at once", reserve=(16, 512)),
        Param("BLOCK_TOP", (64, 128, 256, 512), "candidates of all chunks that are ranked at once", reserve=(1024,)),
        g.FINISH,
        Param("finish_warps", (4, 8), "warps of a program of the second kernel", reserve=(2, 16), former=ONE_FINISH),
        g.CARRY_PAGE,
        g.HEADS_FIRST,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.LAUNCH_PDL,
    ),
    constraints=(
        Constraint("a split must hold whole tiles", lambda p, x: int(x["SPLIT"]) % int(x["BLOCK_N"]) == 0),
        Constraint(
            "BLOCK_N must be a multiple of l'/d, so that a tile holds whole selection blocks",
            lambda p, x: int(x["BLOCK_N"]) % ratio(p) == 0,
        ),
        Constraint("BLOCK_J must hold num_selected (n) candidates", lambda p, x: int(x["BLOCK_J"]) >= slots(p)),
        Constraint(
            f"the last program ranks no candidates of other chunks: BLOCK_TOP must be {ONE_TOP} with finish=ticket",
            lambda p, x: x["finish"] == "kernel" or x["BLOCK_TOP"] == ONE_TOP,
        ),
        Constraint(
            f"finish=ticket has no second kernel: finish_warps must be {ONE_FINISH}",
            lambda p, x: x["finish"] == "kernel" or x["finish_warps"] == ONE_FINISH,
        ),
        Constraint("accumulators and scores must fit in 240 registers a thread", _scores_fit),
        Constraint("masses that are added up at once must fit in 120 registers a thread", _candidates_fit),
        g.HEADS_SHARE,
        g.TILES_FIT,
    ),
    rules=(
        *g.RULES,
        ProblemRule(
            "l'/d must be a power of two of at most 128", lambda p: ratio(p) in POWERS_TO_128, "Choose d = l'/4, say."
        ),
    ),
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    importance=importance,
    cases=g.small_cases(),
    layouts=("paged",),
)
