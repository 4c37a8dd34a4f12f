"""What a run of `nsa-autotune tune` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..spec import KernelSpec, Problem
from .console import count_text, errors, gain_text, make_table, output, problem_text

if TYPE_CHECKING:
    from ..db.records import WinnerRecord
    from ..search.progress import Effort, Outcome
    from ..search.ranking import Prediction


@dataclass(frozen=True)
class Guess:
    """The configs of one problem that an absent GPU could run, fastest guess first."""

    target: str
    spec: KernelSpec
    problem: Problem
    ranked: list[Prediction]


def print_winners(outcomes: Sequence[Outcome]) -> bool:
    """The table of winners; False if a problem has none."""
    rows: list[tuple[object, ...]] = []
    for outcome in outcomes:
        winner = outcome.winner
        head = (outcome.spec.family, problem_text(outcome.problem.to_dict(), outcome.spec.family))
        if winner is None:
            rows.append((*head, outcome.kind, None, "", "", None, ""))
            continue
        gain = gain_text(winner.default_median_us, winner.median_us)
        times = (winner.median_us, winner.default_median_us, gain, verdict_text(winner))
        rows.append((*head, *times, winner.library_median_us, winner.library))
    columns = ("family", "problem", "winner us", "default us", "gain", "verdict", "library us", "library")
    less = ("library", "library us", "default us", "verdict")
    numbers = ("winner us", "default us", "gain", "library us")
    output().print(make_table("winners, medians of the final race", columns, rows, numbers, less))
    from ..search.progress import Effort

    effort = sum((outcome.effort for outcome in outcomes), Effort())
    if effort.trials:
        errors().print(effort_text(effort), markup=False, soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.kind == "failed"]
    if failed:
        number = count_text(len(failed), "problem has", "problems have")
        text = f"{number} no winner: nsa-autotune db query --table trials --family FAMILY"
        errors().print(text, style="red", markup=False, soft_wrap=True)
    return not failed


def effort_text(effort: Effort) -> str:
    """Trials a second, and the share of the time in which the GPU had nothing to measure."""
    rate, share = effort.trials / max(effort.seconds, 1e-9), effort.waited_seconds / max(effort.seconds, 1e-9)
    spent = f"{effort.trials} trials in {effort.seconds:.0f} s, {rate:.1f} a second"
    return f"{spent}; {share:.0%} of it waiting for compilers"


def verdict_text(winner: WinnerRecord) -> str:
    """How sure a winner is, and how many configs it is tied with."""
    return f"{winner.verdict}, {len(winner.tied)} tied" if winner.tied else winner.verdict


def print_predictions(guesses: Sequence[Guess]) -> bool:
    """A table of predictions for each target, labelled as such; False if nothing of a problem would run."""
    if not guesses:  # interrupted before the first
        return True
    columns = ("family", "problem", "usable", "guess us", "default's guess us", "registers", "shared KiB", "config")
    less = ("shared KiB", "registers", "usable")
    for target in dict.fromkeys(guess.target for guess in guesses):
        rows = [_prediction_row(guess) for guess in guesses if guess.target == target]
        title = f"predictions for {target} by a cost model: nothing was measured"
        output().print(make_table(title, columns, rows, columns[2:7], less))
    text = (
        "on such a GPU `nsa-autotune tune` measures, and tries the best of these first; "
        "until then they are served, labelled as predicted, where no winner applies"
    )
    errors().print(text, markup=False, soft_wrap=True)
    return all(guess.ranked for guess in guesses)


def _prediction_row(guess: Guess) -> tuple[object, ...]:
    head = (guess.spec.family, problem_text(guess.problem.to_dict(), guess.spec.family), len(guess.ranked))
    if not guess.ranked:
        return (*head, None, None, None, None, "none runs")
    default = guess.spec.default_config(guess.problem)
    default_us = next((p.predicted_us for p in guess.ranked if default in (p.config, *p.same_code)), None)
    best = guess.ranked[0]
    config = " ".join(f"{name}={value}" for name, value in best.config.items())
    shared_kib = best.resources["shared_bytes"] / 1024
    return (*head, best.predicted_us, default_us, best.resources["registers"], shared_kib, config)
