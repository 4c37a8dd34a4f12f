"""What an earlier run died of: stored first, tried once more when all else is done, and let race if it is fast."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..db.records import TrialRecord, WinnerRecord
from ..spec import KernelSpec, Problem

if TYPE_CHECKING:
    from ..bench.journal import Journal
    from ..bench.worker import MeasureWorker
    from ..db.store import TuningStore
    from .codesign_display import CodesignDisplay
    from .progress import TuneDisplay
    from .tune_run import Run

CONTENDS = 1.1  # times the winner's median up to which one coarse sample may hide a better config


def settle(journal: Journal, store: TuningStore, display: TuneDisplay | CodesignDisplay) -> None:
    """Store what an earlier run was at when it died."""
    from ..search.quarantine import store_suspects

    suspects = journal.unfinished()
    store_suspects(store, suspects)
    for suspect in suspects:
        display.note(f"{suspect.family}: an earlier run died: {suspect.result().reason}  {dict(suspect.config)}")
    journal.settle()


def retry_suspects(
    run: Run, store: TuningStore, display: TuneDisplay, worker: MeasureWorker, fingerprint: dict[str, str]
) -> bool:
    """Measure once more what a journal suspects; where it works and is fast, the finalists race again with it.

    True if any raced again.
    """
    from ..codegen.render import template_digest
    from ..search.quarantine import retry_suspected
    from ..search.task import Task, known_winner

    raced = False
    for spec, problem in run.work:
        task = Task(spec, problem, fingerprint, template_digest(spec), run.policy)
        tried = retry_suspected(store, task, worker)
        for trial in tried:
            display.note(f"{spec.family}: tried once more: {trial.status} {trial.reason}  {trial.config}")
        winner = known_winner(store, task)
        if any(contends(trial, winner) for trial in tried):
            _race_again(store, display, worker, fingerprint, (spec, problem))
            raced = True
    return raced


def contends(trial: TrialRecord, winner: WinnerRecord | None) -> bool:
    """True if a config that was left out might have won."""
    if trial.status != "ok" or trial.median_us is None:
        return False
    return winner is None or trial.median_us <= CONTENDS * winner.median_us


def _race_again(
    store: TuningStore,
    display: TuneDisplay,
    worker: MeasureWorker,
    fingerprint: dict[str, str],
    work: tuple[KernelSpec, Problem],
) -> None:
    """The final race of a problem over all that is stored; the new winner takes its place among the outcomes."""
    from ..search.budget import Budget
    from ..search.tuner import tune_problem

    spec, problem = work
    winner = tune_problem(
        spec, problem, measurer=worker, store=store, fingerprint=fingerprint, budget=Budget(max_trials=1), retune=True
    )
    for number, outcome in enumerate(display.outcomes):
        if (outcome.spec.family, outcome.problem) == (spec.family, problem):
            display.outcomes[number] = replace(outcome, winner=winner)
