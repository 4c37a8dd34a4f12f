"""New keys and values into a paged cache: one launch a branch and step."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Cost, KernelSpec, Problem, Value
from . import _append as a
from . import _paged as g


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {**a.widths(problem), "PAGE_SIZE": problem.page_size, "BLOCK_Q": a.new_token_slots(problem)}


def cost(problem: Problem, config: Config) -> Cost:
    """New tokens are read once and written once; a page's scale is read and written."""
    rows = float(problem.batch * problem.seq_q * problem.num_kv_heads)
    size = ELEMENT_BYTES[problem.dtype] + g.cache_bytes(problem)
    moved = rows * (problem.d_qk + problem.d_v) * size
    return Cost(flops=rows * (problem.d_qk + problem.d_v), bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The pages with the new tokens in them."""
    return a.appended(inputs, ("k", "v"))


SPEC = KernelSpec(
    family="kv_append_fwd",
    doc="new keys and values into a paged cache",
    arguments=(
        Argument("k_new", ("Q", "H", "D_QK")),
        Argument("v_new", ("Q", "H", "D_V")),
        *a.state_pages("k", "PAGE", "D_QK"),
        *a.state_pages("v", "PAGE", "D_V"),
        *g.TABLE_ARGUMENTS,
    ),
    problem_fields=a.PROBLEM_FIELDS,
    nsa_fields=(),
    params=(a.NUM_WARPS,),
    constraints=(),
    rules=a.RULES,
    defaults=lambda problem: {"num_warps": 4 if a.is_fp8(problem) else 1},
    cost=cost,
    structure=a.structure,
    constants=constants,
    reference=run_reference,
    cases=a.small_cases(),
    layouts=("paged",),
)
