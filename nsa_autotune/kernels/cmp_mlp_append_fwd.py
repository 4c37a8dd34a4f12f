"""Compressed rows that new tokens complete in a paged cache, by a learned MLP. Keys or values: head dim d_qk."""

from __future__ import annotations

from typing import Any

import torch

from ..reference import PhiWeights
from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _append as a
from . import _common as c
from . import _paged as g


def _chunks(problem: Problem) -> list[dict[str, int]]:
    return c.chunks(problem.d_qk, 64 if problem.dtype == "float32" else 128)


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    parts = _chunks(problem)
    how = {"chunks": parts, "num_parts": len(parts), "dot_precision": c.dot_precision(problem)}
    return {**a.structure(problem, config), **how}


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernels."""
    return {
        "D": problem.d_qk,
        "BLOCK_D": c.next_power_of_2(problem.d_qk),
        "HIDDEN": problem.phi_hidden,
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
        "PAGE_SIZE": problem.page_size,
        "BLOCK_C": a.new_row_slots(problem),
        "BLOCK_M": config["BLOCK_M"],
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Both products of every completed row; each tile that has one reads W1 and W2."""
    nsa, rows = problem.nsa, a.completed_rows(problem) * problem.num_kv_heads
    fan_in, size = nsa.compress_block_size * problem.d_qk, ELEMENT_BYTES[problem.dtype]
    weights = float((fan_in + problem.d_qk) * problem.phi_hidden * size)
    flops = 2.0 * rows * problem.phi_hidden * (fan_in + problem.d_qk)
    tokens = rows * (fan_in + problem.d_qk) * g.cache_bytes(problem)
    return Cost(flops=flops, bytes_moved=tokens + weights, on_chip_bytes=tokens + max(rows, 1.0) * weights)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch, on the cells as they were; the position encoding is already part of b1."""
    w1 = inputs["w1"]
    position = torch.zeros(problem.nsa.compress_block_size, problem.d_qk, dtype=w1.dtype, device=w1.device)
    phi = PhiWeights(position, w1, inputs["b1"].to(w1.dtype), inputs["w2"], inputs["b2"].to(w1.dtype))
    return {"x_cmp": a.compressed(problem, inputs, a.pages_in(inputs, "x"), "x_cmp", phi)}


def _registers_fit(problem: Problem, config: Config) -> bool:
    width = problem.phi_hidden + c.next_power_of_2(problem.d_qk)
    return int(config["BLOCK_M"]) * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS / 2


def _tiles_fit(problem: Problem, config: Config) -> bool:
    stages, chunk = max(int(config["num_stages"]) - 1, 1), _chunks(problem)[0]["size"]
    tile = chunk * (int(config["BLOCK_M"]) + problem.phi_hidden) * ELEMENT_BYTES[problem.dtype]
    return stages * tile <= c.SHARED_LIMIT_BYTES


SPEC = KernelSpec(
    family="cmp_mlp_append_fwd",
    doc="compressed rows that new tokens complete in a paged cache, by a learned MLP",
    arguments=(
        *g.page_arguments("x", "PAGE", "tokens", "D_QK"),
        Argument("w1", ("L_DQK", "HIDDEN"), fill="weight"),
        Argument("b1", ("HIDDEN",), "float32", fill="bias"),
        Argument("w2", ("HIDDEN", "D_QK"), fill="weight"),
        Argument("b2", ("D_QK",), "float32", fill="bias"),
        *a.state_pages("x_cmp", "CELLS", "D_QK"),
        *g.TABLE_ARGUMENTS,
    ),
    problem_fields=(*(name for name in a.PROBLEM_FIELDS if name != "d_v"), "phi_hidden"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_M", (16, 32), "rows a tile", reserve=(64,)),
        Param("num_splits", (1, 2, 4, 8, 16, 32), "programs among which the tokens of a window are split"),
        c.NUM_WARPS,
        Param("num_stages", (1, 2, 3), "depth of the software pipeline"),
    ),
    constraints=(
        Constraint("sums and outputs of a tile must fit in 120 registers a thread", _registers_fit),
        Constraint("pipelined tiles must fit in 227 KiB of shared memory", _tiles_fit),
    ),
    rules=(*a.RULES, g.WHOLE_CELLS, c.PHI_HIDDEN),
    defaults=lambda problem: {
        "BLOCK_M": 16,
        "num_splits": 8,
        "num_warps": 4,
        "num_stages": 1 if problem.dtype == "float32" else 2,
    },
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    scalars=("num_new",),
    cases=tuple(case.replace(phi_hidden=32) for case in a.small_cases()),
    layouts=("paged",),
)
