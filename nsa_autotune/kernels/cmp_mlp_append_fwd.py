"""Compressed rows that new tokens complete in a paged cache, by a learned MLP for keys and one for values."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _append as a
from . import _common as c
from . import _paged as g
from ._lazy import reference

TILE_BYTES = 32_768  # of W1 and W2 that are held at once


def _chunks(problem: Problem, width: int) -> list[dict[str, int]]:
    return c.chunks(width, min(128, TILE_BYTES // (problem.phi_hidden * ELEMENT_BYTES[problem.dtype])))


def _block_h(problem: Problem) -> int:
    """Hidden units that the second product adds at once."""
    width = c.next_power_of_2(max(problem.d_qk, problem.d_v))
    return max(16, min(problem.phi_hidden, TILE_BYTES // (width * ELEMENT_BYTES[problem.dtype])))


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    parts = {"qk_chunks": _chunks(problem, problem.d_qk), "v_chunks": _chunks(problem, problem.d_v)}
    counts = {"num_qk_parts": len(parts["qk_chunks"]), "num_v_parts": len(parts["v_chunks"])}
    return {**a.structure(problem, config), **parts, **counts, "dot_precision": c.dot_precision(problem)}


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernels."""
    return {
        "D_QK": problem.d_qk,
        "D_V": problem.d_v,
        "BLOCK_QK": c.next_power_of_2(problem.d_qk),
        "BLOCK_V": c.next_power_of_2(problem.d_v),
        "HIDDEN": problem.phi_hidden,
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
        "PAGE_SIZE": problem.page_size,
        "BLOCK_C": a.new_row_slots(problem),
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_H": _block_h(problem),
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Both products of every completed row; each tile that has one reads W1 and W2."""
    nsa, rows = problem.nsa, a.completed_rows(problem) * problem.num_kv_heads
    elements = (nsa.compress_block_size + 1) * (problem.d_qk + problem.d_v)  # of a window and its row
    weights = float(elements * problem.phi_hidden * ELEMENT_BYTES[problem.dtype])
    moved = rows * elements * g.cache_bytes(problem)
    return Cost(
        flops=2.0 * rows * problem.phi_hidden * elements,
        bytes_moved=moved + weights,
        on_chip_bytes=moved + max(rows, 1.0) * weights,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch, on the cells as they were; the position encoding is already part of b1."""
    found = {}
    for side in ("k", "v"):
        w1, b1, w2, b2 = (inputs[f"{side}_{part}"] for part in ("w1", "b1", "w2", "b2"))
        position = w1.new_zeros(problem.nsa.compress_block_size, w2.shape[1])
        phi = reference.PhiWeights(position, w1, b1.to(w1.dtype), w2, b2.to(w1.dtype))
        found[f"{side}_cmp"] = a.compressed(problem, inputs, a.pages_in(inputs, side), f"{side}_cmp", phi)
    return found


def _registers_fit(problem: Problem, config: Config) -> bool:
    width = problem.phi_hidden + c.next_power_of_2(max(problem.d_qk, problem.d_v))
    return int(config["BLOCK_M"]) * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS / 2


def _weights(side: str, window: str, width: str) -> tuple[Argument, ...]:
    return (
        Argument(f"{side}_w1", (window, "HIDDEN"), fill="weight"),
        Argument(f"{side}_b1", ("HIDDEN",), "float32", fill="bias"),
        Argument(f"{side}_w2", ("HIDDEN", width), fill="weight"),
        Argument(f"{side}_b2", (width,), "float32", fill="bias"),
    )


SPEC = KernelSpec(
    family="cmp_mlp_append_fwd",
    doc="compressed rows that new tokens complete in a paged cache, by a learned MLP",
    arguments=(
        *g.page_arguments("k", "PAGE", "tokens", "D_QK"),
        *g.page_arguments("v", "PAGE", "tokens", "D_V"),
        *_weights("k", "L_DQK", "D_QK"),
        *_weights("v", "L_DV", "D_V"),
        *a.state_pages("k_cmp", "CELLS", "D_QK"),
        *a.state_pages("v_cmp", "CELLS", "D_V"),
        *g.TABLE_ARGUMENTS,
    ),
    problem_fields=(*a.PROBLEM_FIELDS, "phi_hidden"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_M", (16, 32), "rows a tile", reserve=(64,)),
        Param("num_splits", (1, 2, 4, 8, 16, 32), "programs among which the tokens of a window are split"),
        c.NUM_WARPS,
        Param("num_stages", (1, 2, 3), "depth of the software pipeline"),
        c.LAUNCH_PDL,
    ),
    constraints=(Constraint("sums and outputs of a tile must fit in 120 registers a thread", _registers_fit),),
    rules=(*a.RULES, g.WHOLE_CELLS, c.PHI_HIDDEN),
    defaults=lambda problem: {
        "BLOCK_M": 16,
        "num_splits": 8,
        "num_warps": 4,
        "num_stages": 1 if problem.dtype == "float32" else 2,
        "launch_pdl": False,
    },
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    scalars=("num_new",),
    cases=tuple(case.replace(phi_hidden=32) for case in a.small_cases()),
    layouts=("paged",),
)
