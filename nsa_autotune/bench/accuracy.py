"""The accuracy gate: no variant is timed before its outputs were compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..codegen.shapes import is_left_out, resolve_dtype
from ..errors import InvalidInput
from ..spec import Argument, KernelSpec, Problem
from .compare import AccuracyReport, compare_blocks, compare_floats
from .inputs import (
    GUARD_BYTES,
    POISONS,
    TrialInputs,
    find_filled,
    find_vectors,
    make_inputs,
    poison,
    storage_bytes,
)
from .parts import Part, sampled, whole
from .scratch import Scratch, guarded_scratch
from .state import compare_state

Launch = Callable[..., Any]
GATE_TOKENS = 1031  # at least: an odd number past the default window and a block boundary
MAX_GATE_TOKENS = 2063
GATE_SEQUENCES = 4  # of a packed problem: one empty, one of length 1, two real ones


@dataclass(frozen=True)
class Expected:
    """What the outputs of a part should be (wide), and what PyTorch makes of them in the problem's dtype."""

    part: Part
    reference: Mapping[str, Tensor]
    baseline: Mapping[str, Tensor]
    scores: tuple[Tensor, Tensor] | None  # importance in float64 and in the problem's dtype, for a selection


@dataclass(frozen=True)
class Case:
    """Inputs of one launch and all that is expected of it; `pristine` holds the inputs' bytes, if compared.

    The checked launch takes `replaced` in place of inputs of the same name; a clock takes `inputs` as they are.
    """

    spec: KernelSpec
    problem: Problem
    inputs: TrialInputs
    expected: tuple[Expected, ...]
    pristine: Mapping[str, Tensor]
    launches: int = 1  # each with other poison in the outputs
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def checked(self) -> TrialInputs:
        """What the checked launch takes."""
        return replace(self.inputs, tensors={**self.inputs.tensors, **self.replaced})


def gate_problem(problem: Problem) -> Problem:
    """A smaller problem with the same constants, heads, dims, dtype and layout, on which every candidate is checked.

    Long enough that some tokens must leave blocks out, where that is affordable.
    """
    reach = problem.nsa.num_selected * problem.nsa.select_block_size
    tokens = min(max(GATE_TOKENS, reach * 3 // 2 + 7), MAX_GATE_TOKENS)
    batch = min(problem.batch, 2)
    if problem.layout == "packed":
        batch = min(problem.batch, GATE_SEQUENCES)
        tokens *= min(batch, 2)
    elif problem.layout == "paged":
        batch = GATE_SEQUENCES  # ragged ones, whatever the problem's batch
    if problem.seq_k <= tokens:
        return problem.replace(batch=batch)
    seq_q = tokens if problem.seq_q == problem.seq_k else min(problem.seq_q, tokens // 2)
    return problem.replace(batch=batch, seq_q=seq_q, seq_k=tokens)


def check_variant(
    spec: KernelSpec, problem: Problem, launch: Launch, device: torch.device | str, seed: int = 0
) -> AccuracyReport:
    """Compare every output of a launch with the reference, twice with different poison; for problems of gate size."""
    return run_cases(prepare_gate(spec, problem, device, seed), launch)


def check_rows(
    spec: KernelSpec, problem: Problem, launch: Launch, device: torch.device | str, seed: int = 0, rows: int = 32
) -> AccuracyReport:
    """Compare about `rows` rows of a launch at full length with the reference; shows errors that grow with position."""
    return run_cases((prepare_rows(spec, problem, make_inputs(spec, problem, device, seed), seed, rows),), launch)


def prepare_gate(spec: KernelSpec, problem: Problem, device: torch.device | str, seed: int = 0) -> tuple[Case, ...]:
    """Inputs and expectations of `check_variant`; serves any number of variants."""
    device, cases = torch.device(device), []
    ties = any(_is_selection(argument, problem) for argument in spec.arguments)
    for tied in (False, True) if ties else (False,):
        inputs = make_inputs(spec, problem, device, seed)
        if tied:  # every score becomes a sum of ones, so that equal ones are equal in any order of addition
            find_vectors(spec, inputs.tensors, "Q").zero_()
            if any(argument.fill == "lse" for argument in spec.arguments):
                find_filled(spec, inputs.tensors, "lse").zero_()
        pristine = {
            argument.name: storage_bytes(tensor).clone()
            for argument in spec.arguments
            if not argument.is_output and (tensor := inputs.tensors[argument.name]) is not None
        }
        expected = (expect(spec, whole(problem, inputs, device), inputs),)
        cases.append(Case(spec, problem, inputs, expected, pristine, 1 if tied else len(POISONS)))
    return tuple(cases)


def prepare_rows(spec: KernelSpec, problem: Problem, inputs: TrialInputs, seed: int = 0, rows: int = 32) -> Case:
    """Inputs and expectations of `check_rows`."""
    device = next(tensor.device for tensor in inputs.tensors.values() if tensor is not None)
    sample = sampled(spec, problem, inputs, device, rows, seed)
    case = Case(spec, problem, inputs, (), {}, replaced=sample.replaced)
    return replace(case, expected=tuple(expect(spec, part, case.checked) for part in sample.parts))


@torch.no_grad()
def expect(spec: KernelSpec, part: Part, inputs: TrialInputs) -> Expected:
    """Run the reference on a part, wide and in the problem's dtype."""
    given = part.given(spec, inputs)
    wide_dtype = torch.float64 if part.problem.dtype == "float32" else torch.float32
    wide: Mapping[str, Tensor] = {}
    base: Mapping[str, Tensor] = {}
    if any(a.is_output and not _is_selection(a, part.problem) for a in spec.arguments):
        wide = _reference(spec, part, _cast(given, wide_dtype))
        base = _reference(spec, part, given)
    scores = None
    if any(_is_selection(argument, part.problem) for argument in spec.arguments):
        scores = (_importance(spec, part, _cast(given, torch.float64)), _importance(spec, part, given))
    return Expected(part, wide, base, scores)


def run_cases(cases: tuple[Case, ...], launch: Launch) -> AccuracyReport:
    """Launch on every case and judge; the first failure, or the report with the largest error."""
    worst = AccuracyReport(True, "", 0.0, 0.0)
    for case in cases:
        for which in range(case.launches):
            for report in _launch_and_judge(case, launch, which):
                if not report.ok:
                    return report
                worst = max(worst, report, key=lambda r: r.max_error)
    return worst


def _launch_and_judge(case: Case, launch: Launch, which: int) -> list[AccuracyReport]:
    written = [a for a in case.spec.arguments if a.is_output and not is_left_out(a, case.problem)]
    outputs = {a.name: case.inputs.tensors[a.name] for a in written}
    guards: dict[str, Tensor] = {}
    for name, tensor in outputs.items():
        if tensor is None:
            raise InvalidInput("an output must be a tensor", {"family": case.spec.family, "output": name})
        bytes_of = storage_bytes(tensor)
        poison(torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()), which)
        guards[name] = bytes_of[:GUARD_BYTES].clone()
        if name in case.inputs.before:
            tensor.copy_(case.inputs.before[name])
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
    with guarded_scratch(launch, which) as scratch:
        case.checked.call(launch)
    if any(tensor.is_cuda for tensor in outputs.values() if tensor is not None):
        torch.cuda.synchronize()
    reports = [_stray_writes(case, guards, scratch)]
    if reports[0].ok:
        reports += [judge(case.spec, expected, case.inputs) for expected in case.expected]
    return reports


def judge(spec: KernelSpec, expected: Expected, inputs: TrialInputs) -> AccuracyReport:
    """Compare the outputs, as they stand in `inputs`, with what is expected of one part."""
    worst = AccuracyReport(True, "", 0.0, 0.0)
    part = expected.part
    for argument in spec.arguments:
        tensor = inputs.tensors[argument.name]
        if not argument.is_output or tensor is None:
            continue
        out = part.cut(argument, tensor)
        if _is_selection(argument, part.problem) and expected.scores is not None:
            out = out.flatten(0, 1) if part.problem.layout == "paged" else out  # sequences have positions of their own
            report = compare_blocks(out, *expected.scores, part.positions, part.problem.nsa, part.problem.dtype)
        elif argument.is_state:
            report = compare_state(argument, tensor, inputs, expected.reference, expected.baseline)
        else:
            wide, base = expected.reference[argument.name], expected.baseline[argument.name]
            report = compare_floats(argument.name, out, wide, base, has_rows=str(argument.shape[-1]).startswith("D_"))
        if not report.ok:
            return replace(report, reason=report.reason + part.where)
        worst = max(worst, report, key=lambda r: r.max_error)
    return worst


def _stray_writes(case: Case, guards: Mapping[str, Tensor], scratch: Sequence[Scratch]) -> AccuracyReport:
    """Look for writes beside outputs and scratch and into inputs; inputs are put right for the next variant."""
    for number, made in enumerate(scratch):
        if not made.is_whole:
            reason = f"scratch {number} {tuple(made.tensor.shape)}: the kernel wrote outside of the tensor."
            return AccuracyReport(False, reason, float("inf"), 0.0)
    for name, guard in guards.items():
        tensor = case.inputs.tensors[name]
        if tensor is not None:
            edges = storage_bytes(tensor)
            if not (torch.equal(edges[:GUARD_BYTES], guard) and torch.equal(edges[-GUARD_BYTES:], guard)):
                return AccuracyReport(False, f"{name}: the kernel wrote outside of the tensor.", float("inf"), 0.0)
    for name, before in case.pristine.items():
        tensor = case.inputs.tensors[name]
        if tensor is not None and not torch.equal(now := storage_bytes(tensor), before):
            now.copy_(before)
            return AccuracyReport(False, f"{name}: the kernel overwrote an input.", float("inf"), 0.0)
    return AccuracyReport(True, "", 0.0, 0.0)


def _reference(spec: KernelSpec, part: Part, given: dict[str, Tensor]) -> Mapping[str, Tensor]:
    positions = part.positions if part.layout is None else None
    return spec.reference(part.problem, given, part.layout, positions)


def _importance(spec: KernelSpec, part: Part, given: dict[str, Tensor]) -> Tensor:
    if spec.importance is not None:
        scores: Tensor = spec.importance(part.problem, given)
        return scores
    tensors: dict[str, Tensor | None] = dict(given)
    q, k_cmp = find_vectors(spec, tensors, "Q"), find_vectors(spec, tensors, "C")
    lse = find_filled(spec, tensors, "lse")
    where = {"layout": part.layout} if part.layout is not None else {"positions": part.positions}
    scale = part.problem.d_qk**-0.5
    return reference.importance(q, k_cmp, lse, part.problem.nsa, seq_k=part.problem.seq_k, scale=scale, **where)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _is_selection(argument: Argument, problem: Problem) -> bool:
    return argument.is_output and not resolve_dtype(argument, problem).is_floating_point
