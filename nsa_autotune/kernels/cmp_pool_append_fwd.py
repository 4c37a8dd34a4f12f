"""New keys and values into a paged cache, and the compressed rows that they complete, by the mean."""

from __future__ import annotations

from typing import Any

from ..spec import Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _append as a
from . import _common as c
from . import _paged as g


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        **a.token_constants(problem),
        "BLOCK_C": a.new_row_slots(problem),
        "BLOCK_L": config["BLOCK_L"],
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """New tokens are read and written; of every completed row the window is read, and the row written."""
    nsa, width = problem.nsa, problem.d_qk + problem.d_v
    rows = a.completed_rows(problem) * problem.num_kv_heads
    moved = a.token_bytes(problem) + rows * (nsa.compress_block_size + 1) * width * g.cache_bytes(problem)
    flops = rows * nsa.compress_block_size * width
    return Cost(flops=flops, bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch, over the pages with the new tokens in them."""
    found = {}
    for name in ("k", "v"):
        raw = a.appended(inputs, name)
        found[name], found[f"{name}_cmp"] = a.values_of(raw), a.compressed(problem, inputs, raw, f"{name}_cmp")
    return found


def _sums_fit(problem: Problem, config: Config) -> bool:
    rows, width = int(config["BLOCK_L"]), c.next_power_of_2(max(problem.d_qk, problem.d_v))
    return rows * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS / 2


SPEC = KernelSpec(
    family="cmp_pool_append_fwd",
    doc="new keys and values into a paged cache, and the compressed rows that they complete, by the mean",
    arguments=(
        *a.TOKENS,
        *a.state_pages("k_cmp", "CELLS", "D_QK"),
        *a.state_pages("v_cmp", "CELLS", "D_V"),
        *g.TABLE_ARGUMENTS,
    ),
    problem_fields=a.PROBLEM_FIELDS,
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(Param("BLOCK_L", (8, 16, 32, 64), "tokens of a window that are read at once"), a.NUM_WARPS, c.LAUNCH_PDL),
    constraints=(Constraint("tokens read at once must fit in 120 registers a thread", _sums_fit),),
    rules=(*a.RULES, g.WHOLE_CELLS),
    defaults=lambda problem: {"BLOCK_L": 16, "num_warps": 4, "launch_pdl": False},
    cost=cost,
    structure=a.structure,
    constants=constants,
    reference=run_reference,
    cases=a.small_cases(),
    layouts=("paged",),
)
