"""`nsa-autotune tune --sweep`: the grid of problems that the options span, and the plan that is made of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InvalidProblem
from ..spec import KernelSpec, Problem
from .console import errors
from .options import ProblemChoice

if TYPE_CHECKING:
    from ..search.sweep import SweepPlan

SHOWN_REASONS = 5


def shapes(
    choice: ProblemChoice, batch: str | None, heads: str | None, kv_heads: str | None
) -> tuple[ProblemChoice, ...]:
    """The choice with each combination of batch size, query heads and kv heads; None stays as in the preset."""
    from ..search.sweep import parse_counts

    options = (("--batch", batch), ("--heads", heads), ("--kv-heads", kv_heads))
    axes = [(None,) if text is None else parse_counts(text, option) for option, text in options]
    return tuple(replace(choice, batch=b, heads=hq, kv_heads=h) for b, hq, h in itertools.product(*axes))


def plan(specs: Sequence[KernelSpec], choices: Iterable[ProblemChoice], default_preset: str) -> SweepPlan:
    """The plan over all combinations, illegal ones counted; says on stderr what it holds and leaves out."""
    from ..search.sweep import plan_sweep

    skipped: Counter[str] = Counter()
    problems: list[Problem] = []
    for choice in choices:
        problems += legal_lengths(choice, default_preset, skipped)
    found = plan_sweep(specs, problems, skipped)
    for line in plan_lines(found):
        errors().print(line, markup=False, soft_wrap=True)
    return found


def legal_lengths(choice: ProblemChoice, default_preset: str, skipped: Counter[str]) -> list[Problem]:
    """The choice's problems, those of lengths that it cannot have counted by reason."""
    from ..search.presets import get_preset, parse_seq_lens

    preset = get_preset(choice.preset or default_preset)
    found: list[Problem] = []
    for tokens in parse_seq_lens(choice.seq) if choice.seq else preset.seq_lens:
        try:
            found += replace(choice, seq=str(tokens)).problems(default_preset)
        except InvalidProblem as error:
            skipped[error.rule] += 1
    return found


def plan_lines(found: SweepPlan) -> list[str]:
    """What the sweep tunes and what it does not, in sentences."""
    families = len({step.spec.family for step in found.steps})
    lines = [f"sweep: {len(found.steps)} problems of {families} families"]
    if found.merged:
        lines.append(f"    {found.merged} more share a bucket with a larger one, whose winner serves them")
    lines += [f"    {count} skipped: {reason}" for reason, count in found.skipped[:SHOWN_REASONS]]
    if rest := sum(count for _, count in found.skipped[SHOWN_REASONS:]):
        lines.append(f"    {rest} skipped for other reasons")
    return lines
