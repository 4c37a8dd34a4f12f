"""Every family on the device: default, structural and random variants pass the accuracy gate (see `gpu.cases`)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gpu.cases import FamilyCase, family_cases

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.pool import CompileOutcome
from nsa_autotune.codegen.render import render
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import canonical_json

CASES = family_cases()


def outcome_of(case: FamilyCase, compiled: dict[str, CompileOutcome]) -> CompileOutcome:
    """How the case's compilation ended."""
    return compiled[canonical_json([case.family, case.problem.to_dict(), case.config])]


@pytest.mark.parametrize("case", CASES, ids=[f"{number:03}-{case.name}" for number, case in enumerate(CASES)])
def test_a_variant_passes_the_accuracy_gate(case: FamilyCase, compiled: dict[str, CompileOutcome]) -> None:
    outcome = outcome_of(case, compiled)
    if case.kind == "random" and outcome.status == "resource":
        pytest.skip(outcome.reason)  # the constraints are necessary; only the compiler knows what suffices
    assert outcome.status == "ok", outcome.reason
    spec = get_spec(case.family)
    module = load(render(spec, case.problem, case.config))
    report = check_variant(spec, case.problem, module.launch, "cuda")
    assert report.ok, report.reason


def test_most_random_configs_run(compiled: dict[str, CompileOutcome]) -> None:
    """Constraints that let much through that cannot run would waste trials."""
    found = Counter(outcome_of(case, compiled).status for case in CASES if case.kind == "random")
    assert set(found) <= {"ok", "resource"}
    assert found["resource"] <= found["ok"] / 3


REPEATED = [family for family in all_specs() if "attn" in family or "select" in family]


@pytest.mark.parametrize("family", REPEATED)
def test_a_launch_repeats_its_bits(family: str, compiled: dict[str, CompileOutcome]) -> None:
    """No atomics, no races: twenty launches of one variant give the same bits."""
    case = max((c for c in CASES if c.family == family and c.kind != "random"), key=lambda c: c.problem.seq_q)
    spec = get_spec(family)
    launch = load(render(spec, case.problem, case.config)).launch
    inputs = make_inputs(spec, case.problem, "cuda")
    names = [argument.name for argument in spec.arguments if argument.is_output]
    first: list[torch.Tensor] = []
    for _ in range(20):
        inputs.call(launch)
        outputs = [inputs.tensors[name] for name in names]
        now = [tensor.clone() for tensor in outputs if tensor is not None]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
