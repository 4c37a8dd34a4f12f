"""Compressed rows that new tokens complete in a paged cache, by the mean."""

from __future__ import annotations

from typing import Any

from ..spec import Config, Constraint, Cost, KernelSpec, Param, Problem
from . import _append as a
from . import _common as c
from . import _paged as g


def cost(problem: Problem, config: Config) -> Cost:
    """The window of every completed row is read once, and the row written."""
    nsa, rows = problem.nsa, a.completed_rows(problem) * problem.num_kv_heads
    width = problem.d_qk + problem.d_v
    moved = rows * (nsa.compress_block_size + 1) * width * g.cache_bytes(problem)
    flops = rows * nsa.compress_block_size * width
    return Cost(flops=flops, bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch, on the cells as they were."""
    raw = {name: a.pages_in(inputs, name[0]) for name in ("k_cmp", "v_cmp")}
    return {name: a.compressed(problem, inputs, pages, name) for name, pages in raw.items()}


def _sums_fit(problem: Problem, config: Config) -> bool:
    rows, width = int(config["BLOCK_L"]), c.next_power_of_2(max(problem.d_qk, problem.d_v))
    return rows * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS / 2


SPEC = KernelSpec(
    family="cmp_pool_append_fwd",
    doc="compressed rows that new tokens complete in a paged cache, by the mean",
    arguments=(
        *a.read_pages("k", "D_QK"),
        *a.read_pages("v", "D_V"),
        *a.state_pages("k_cmp", "CELLS", "D_QK"),
        *a.state_pages("v_cmp", "CELLS", "D_V"),
        *g.TABLE_ARGUMENTS,
    ),
    problem_fields=a.PROBLEM_FIELDS,
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(Param("BLOCK_L", (8, 16, 32, 64), "tokens of a window that are read at once"), a.NUM_WARPS),
    constraints=(Constraint("tokens read at once must fit in 120 registers a thread", _sums_fit),),
    rules=(*a.RULES, g.WHOLE_CELLS),
    defaults=lambda problem: {"BLOCK_L": 16, "num_warps": 4},
    cost=cost,
    structure=a.structure,
    constants=a.pool_constants,
    reference=run_reference,
    scalars=("num_new",),
    cases=a.small_cases(),
    layouts=("paged",),
)
