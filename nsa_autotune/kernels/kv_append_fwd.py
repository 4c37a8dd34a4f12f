"""New keys and values into a paged cache: one launch a branch and step."""

from __future__ import annotations

from typing import Any

from ..spec import Config, Cost, KernelSpec, Problem, Value
from . import _append as a
from . import _common as c
from . import _paged as g


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return a.token_constants(problem)


def cost(problem: Problem, config: Config) -> Cost:
    """New tokens are read once and written once."""
    moved = a.token_bytes(problem)
    return Cost(flops=moved, bytes_moved=moved, on_chip_bytes=moved, mma_flops=1.0)


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: Any = None, positions: Any = None
) -> dict[str, Any]:
    """The pages with the new tokens in them."""
    return {name: a.values_of(a.appended(inputs, name)) for name in ("k", "v")}


SPEC = KernelSpec(
    family="kv_append_fwd",
    doc="new keys and values into a paged cache",
    arguments=(*a.TOKENS, *g.TABLE_ARGUMENTS),
    problem_fields=a.PROBLEM_FIELDS,
    nsa_fields=(),
    params=(a.NUM_WARPS, c.LAUNCH_PDL),
    constraints=(),
    rules=a.RULES,
    defaults=lambda problem: {"num_warps": 4 if problem.has_fp8_cache else 1, "launch_pdl": False},
    cost=cost,
    structure=a.structure,
    constants=constants,
    reference=run_reference,
    cases=a.small_cases(),
    layouts=("paged",),
)
