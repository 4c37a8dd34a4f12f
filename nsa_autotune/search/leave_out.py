"""What an untuned problem loses: the ladder's choice without a problem's winner, or without a GPU's, as measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..db.records import WinnerRecord
from ..dispatch.fingerprint import Fingerprint
from ..dispatch.ladder import Choice, choose
from .cells import Missing, Row, Table, mean_loss

PROBLEM, GPU = "problem", "GPU"


@dataclass(frozen=True)
class LeftOut:
    """A tuned problem, what would serve it if `without` (problem or GPU) had no winner, and what that loses."""

    row: Row
    without: str
    choice: Choice
    loss: float | None  # None where the choice was never measured on the problem


@dataclass(frozen=True)
class Report:
    """All rows of a table, each without its problem's winners, or without its GPU's."""

    table: Table
    without: str
    found: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Summary:
    """Losses of one report; the figures are of what is known."""

    known: int
    unknown: int
    failing: int  # choices that do not run: the dispatcher then takes the default config
    mean: float | None  # geometric
    p95: float | None  # the smallest loss that 95% do not exceed
    worst: LeftOut | None


def reports(table: Table, winners: Sequence[WinnerRecord]) -> list[Report]:
    """What is lost without each problem's winners, and, where another GPU is tuned, without this GPU's."""
    parts = ((PROBLEM, leave_problem_out(table, winners)), (GPU, leave_gpu_out(table, winners)))
    return [Report(table, without, tuple(found)) for without, found in parts if found]


def leave_problem_out(table: Table, winners: Iterable[WinnerRecord]) -> list[LeftOut]:
    """For each row the ladder's choice if the problem were tuned nowhere."""
    return _leave_out(table, winners, PROBLEM, lambda row, w: w.problem_key == row.winner.problem_key)


def leave_gpu_out(table: Table, winners: Iterable[WinnerRecord]) -> list[LeftOut]:
    """For each row the ladder's choice if nothing were tuned on its GPU; empty without a winner of another GPU."""
    gpu = table.fingerprint["gpu"]
    every = list(winners)
    if all(winner.fingerprint["gpu"] == gpu for winner in every):
        return []
    return _leave_out(table, every, GPU, lambda row, w: w.fingerprint["gpu"] == gpu)


def _leave_out(
    table: Table, winners: Iterable[WinnerRecord], without: str, is_out: Callable[[Row, WinnerRecord], bool]
) -> list[LeftOut]:
    here = Fingerprint(**{f.name: table.fingerprint.get(f.name, "") for f in fields(Fingerprint)})
    comparable = [winner for winner in winners if winner.policy == table.policy]
    found = []
    for row in table.rows:
        others = [winner for winner in comparable if not is_out(row, winner)]
        choice = choose(table.spec, row.problem, others, here, table.template_digest)
        found.append(LeftOut(row, without, choice, row.loss(choice.config)))
    return found


def unknown_choices(found: Iterable[LeftOut]) -> list[Missing]:
    """What to measure so that every loss is known."""
    return [Missing(left.row, left.choice.config) for left in found if left.loss is None]


def summarise(found: Sequence[LeftOut]) -> Summary:
    """Geometric mean, 95th percentile and worst of the losses that are known and finite."""
    known = [left for left in found if left.loss is not None]
    running = [left for left in known if left.loss is not None and np.isfinite(left.loss)]
    losses = [left.loss for left in running if left.loss is not None]
    return Summary(
        known=len(known),
        unknown=len(found) - len(known),
        failing=len(known) - len(running),
        mean=mean_loss(losses) if losses else None,
        p95=float(np.quantile(losses, 0.95, method="higher")) if losses else None,
        worst=max(running, key=lambda left: left.loss or 0.0) if running else None,
    )
