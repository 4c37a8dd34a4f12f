"""What tuning and predicting tell while they run; a display implements `Progress`, nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..db.records import TrialRecord, WinnerRecord
from ..spec import KernelSpec, Problem
from .budget import Budget

WORKED = ("ok", "same_code")  # statuses of configs that are right
MAX_REASON_CHARS = 160  # of a reason in a summary; the database keeps it whole

OutcomeKind = Literal["tuned", "known", "elsewhere", "failed", "predicted", "interrupted"]


@dataclass(frozen=True)
class Plan:
    """What is about to be done for one problem."""

    spec: KernelSpec
    problem: Problem
    budget: Budget
    num_known: int  # trials of an earlier run that are not done again
    planned_trials: int | None  # new trials at most, None if only time limits them


@dataclass(frozen=True)
class TrialEvent:
    """One trial that is stored by now."""

    record: TrialRecord
    number: int  # from 1, in this run
    spent: float  # fraction of the budget, 0 to 1
    best_us: float | None  # fastest so far: measured medians while tuning, predictions while predicting


@dataclass(frozen=True)
class Effort:
    """What a search took: seconds in all, and of these the seconds in which the GPU waited for a compiler."""

    trials: int = 0  # of this run
    seconds: float = 0.0
    waited_seconds: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.trials + other.trials,
            self.seconds + other.seconds,
            self.waited_seconds + other.waited_seconds,
        )


@dataclass(frozen=True)
class Outcome:
    """How one problem ended: `known` had a winner, `failed` has none, `interrupted` resumes with the same call.

    `elsewhere`: another process found the winner in the meantime.
    """

    kind: OutcomeKind
    spec: KernelSpec
    problem: Problem
    winner: WinnerRecord | None = None
    statuses: tuple[tuple[str, int], ...] = ()  # status, trials; most frequent first
    reasons: tuple[tuple[str, int], ...] = ()  # first line of the reason of failures, trials; most frequent first
    effort: Effort = Effort()
    left: int = 0  # configs that the budget left out, of those that were planned


class Progress(Protocol):
    """Hears of one problem at a time: `start`, any number of `trial`, `finish`; only `finish` if it had a winner."""

    def start(self, plan: Plan) -> None: ...

    def trial(self, event: TrialEvent) -> None: ...

    def finish(self, outcome: Outcome) -> None: ...


class NullProgress:
    """Tells nobody."""

    def start(self, plan: Plan) -> None:
        """Ignore."""

    def trial(self, event: TrialEvent) -> None:
        """Ignore."""

    def finish(self, outcome: Outcome) -> None:
        """Ignore."""


def count_statuses(records: Iterable[TrialRecord]) -> tuple[tuple[str, int], ...]:
    """Trials by status, most frequent first."""
    return tuple(Counter(record.status for record in records).most_common())


def count_reasons(records: Iterable[TrialRecord]) -> tuple[tuple[str, int], ...]:
    """Failures by `status: first line of the reason`, most frequent first."""
    lines = (f"{r.status}: {(r.reason.splitlines() or [''])[0]}" for r in records if r.status not in WORKED)
    return tuple(Counter(line[:MAX_REASON_CHARS] for line in lines).most_common())
