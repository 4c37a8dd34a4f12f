"""What an earlier run died of: stored first, tried once more when all else is done, and let race if it is fast."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..db.records import TrialRecord, WinnerRecord

if TYPE_CHECKING:
    from ..bench.journal import Journal
    from ..bench.worker import MeasureWorker
    from ..db.store import TuningStore
    from ..search.task import Task
    from .codesign_display import CodesignDisplay
    from .progress import TuneDisplay

CONTENDS = 1.1  # times the winner's median up to which one coarse sample may hide a better config


def settle(journal: Journal, store: TuningStore, display: TuneDisplay | CodesignDisplay) -> None:
    """Store what an earlier run was at when it died."""
    from ..search.quarantine import store_suspects

    suspects = journal.unfinished()
    store_suspects(store, suspects)
    for suspect in suspects:
        display.note(f"{suspect.family}: an earlier run died: {suspect.result().reason}  {dict(suspect.config)}")
    journal.settle()


def contends(trial: TrialRecord, winner: WinnerRecord | None) -> bool:
    """True if a config that was left out might have won."""
    if trial.status != "ok" or trial.median_us is None:
        return False
    return winner is None or trial.median_us <= CONTENDS * winner.median_us


def race_again(task: Task, store: TuningStore, display: TuneDisplay, worker: MeasureWorker) -> None:
    """The final race of a problem over all that is stored; the new winner takes its place among the outcomes."""
    from ..search.budget import Budget
    from ..search.tuner import tune_problem

    how = {"measurer": worker, "store": store, "fingerprint": task.fingerprint}
    winner = tune_problem(task.spec, task.problem, **how, budget=Budget(max_trials=1), retune=True)  # type: ignore[arg-type]
    for number, outcome in enumerate(display.outcomes):
        if (outcome.spec.family, outcome.problem) == (task.spec.family, task.problem):
            display.outcomes[number] = replace(outcome, winner=winner)
