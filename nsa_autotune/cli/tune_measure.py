"""How `tune` measures: problem after problem, each claimed before it is begun, so that no other process does it too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..bench.journal import Journal
from ..codegen.render import template_digest
from ..db.claims import Stage
from ..db.shared import SharedStore
from ..errors import ClaimLost
from ..search.ahead import Preparer, compile_ahead
from ..search.budget import Budget, Meter
from ..search.confirm import confirm_winner
from ..search.lease import LEASE_S, Lease, unit_of
from ..search.progress import Outcome, OutcomeKind, count_reasons, count_statuses
from ..search.quarantine import context_of_run, retry_suspected, suspected
from ..search.task import Task, known_trials, known_winner
from ..search.tuner import tune_problem
from .console import problem_text
from .tries import completed
from .tune_run import Run, Work, search_budget, share
from .tune_suspects import contends, race_again, settle

if TYPE_CHECKING:
    from ..bench.result import TrialResult
    from ..bench.worker import MeasureWorker
    from ..db.records import WinnerRecord
    from ..spec import KernelSpec, Problem
    from .progress import TuneDisplay

LOOK_AGAIN_S = 2.0  # at what other processes have


def measure(run: Run, store: SharedStore, display: TuneDisplay) -> None:
    """Tune every problem on the device, then race the winners again in a new process.

    What killed an earlier run is stored first and tried once more last. Problems that other processes have are looked
    at again when all others are done.
    """
    with _measuring(run, store, display) as one:
        settle(one.journal, store, display)
        left = one.tune_all()
        if run.budget.confirm:
            one.confirm_all()
        if one.retry_suspects() and run.budget.confirm:
            one.confirm_all("confirm again")
        one.tell_of_others(left)


@contextmanager
def _measuring(run: Run, store: SharedStore, display: TuneDisplay) -> Iterator[_Measuring]:
    from ..bench.worker import MeasureWorker
    from ..dispatch.fingerprint import current

    here = current(run.device)
    since_s = store.now_s() if run.since_s is None else run.since_s
    with (
        compile_ahead(here.capability, run.jobs) as preparer,
        Journal(run.device, context=context_of_run(here.to_dict())) as journal,
        MeasureWorker(run.device, policy=run.policy, journal=journal) as worker,
        Lease(store, since_s=since_s, seconds=LEASE_S) as lease,
    ):
        yield _Measuring(run, store, display, worker, journal, preparer, lease, here.to_dict())


class _Measuring:
    """One process's part of a run."""

    def __init__(
        self,
        run: Run,
        store: SharedStore,
        display: TuneDisplay,
        worker: MeasureWorker,
        journal: Journal,
        preparer: Preparer,
        lease: Lease,
        fingerprint: dict[str, str],
    ) -> None:
        self.run, self.store, self.display = run, store, display
        self.worker, self.journal, self.preparer, self.lease = worker, journal, preparer, lease
        self.fingerprint = fingerprint
        self.meter = Meter(run.budget)
        self.started = datetime.fromtimestamp(lease.since_s, UTC).isoformat(timespec="microseconds")
        self.mine: set[str] = set()  # digests of the units that were begun here

    def task(self, work: Work) -> Task:
        """The work's task on this device."""
        spec, problem = work
        return Task(spec, problem, self.fingerprint, template_digest(spec), self.run.policy)

    def tune_all(self) -> list[Work]:
        """Tune all problems that no other process has; what others still have when the minutes are spent."""
        budget, left = search_budget(self.run.budget), list(self.run.work)
        while left:
            busy: list[Work] = []
            for number, work in enumerate(left):
                to_do = len(left) - number + len(busy)
                if not self._try(work, share(budget, self.meter.minutes, to_do, self.run.members)):
                    busy.append(work)
            if len(busy) == len(left):
                if budget.max_minutes is not None and self.meter.minutes >= budget.max_minutes:
                    break
                self.display.say(waiting_text(len(busy)))
                time.sleep(LOOK_AGAIN_S)
            left = busy
        return left

    def _try(self, work: Work, budget: Budget) -> bool:
        """Tune a problem, or show what another process found; False if another one is at it."""
        task = self.task(work)
        unit = unit_of(task)
        winner = None if self.run.retune else known_winner(self.store, task)
        if winner is not None:
            is_new = unit.digest not in self.mine and winner.created >= self.started
            self.display.finish(Outcome("elsewhere" if is_new else "known", task.spec, task.problem, winner))
            return True
        state = self.lease.take(unit)
        if state == "done":
            self._show(task)
        elif state == "mine":
            self.mine.add(unit.digest)
            return self._tune(task, budget)
        return state == "done"

    def _tune(self, task: Task, budget: Budget) -> bool:
        try:
            with self.lease.working(unit_of(task)):
                winner = tune_problem(
                    task.spec,
                    task.problem,
                    measurer=self.worker,
                    store=self.store,
                    fingerprint=task.fingerprint,
                    budget=budget,
                    progress=self.display,
                    retune=self.run.retune,
                    retry_quarantined=self.run.retry_quarantined,
                    library=self._library,
                    preparer=self.preparer,
                    first=completed(task.spec, task.problem, self.run.tries),
                )
                if winner is not None and self.run.budget.confirm:
                    self.lease.take(unit_of(task, "confirm"))  # races of one winner stay on one device
        except ClaimLost as error:
            if self.display.outcomes and self.display.outcomes[-1].kind == "interrupted":
                self.display.outcomes.pop()  # it goes on elsewhere
            self.mine.discard(unit_of(task).digest)
            self.display.note(str(error))
            return False
        return True

    def _library(self, spec: KernelSpec, problem: Problem) -> TrialResult:
        return self.worker.measure_library(spec.library, problem)

    def _show(self, task: Task) -> None:
        """What another process found in the meantime."""
        winner, trials = known_winner(self.store, task), known_trials(self.store, task)
        kind: OutcomeKind = "failed" if winner is None else "elsewhere"
        statuses, reasons = count_statuses(trials), count_reasons(trials)
        self.display.finish(Outcome(kind, task.spec, task.problem, winner, statuses, reasons))

    def confirm_all(self, stage: Stage = "confirm") -> None:
        """Race each provisional winner again in a new process, as long as there are minutes."""
        self.worker.renew()
        outcomes = self.display.outcomes
        open_ones = [n for n, o in enumerate(outcomes) if o.winner is not None and o.winner.verdict == "provisional"]
        tasks = [self.task((outcomes[number].spec, outcomes[number].problem)) for number in open_ones]
        for place, is_mine in self._claim_each(tasks, stage):
            if self.run.budget.max_minutes is not None and self.meter.minutes >= self.run.budget.max_minutes:
                text = "the minutes are spent: winners that no second process confirmed stay provisional"
                self.display.note(text)
                return
            task, number = tasks[place], open_ones[place]
            winner = self._confirm(task, stage) if is_mine else known_winner(self.store, task)
            outcomes[number] = replace(outcomes[number], winner=winner)

    def _claim_each(self, tasks: list[Task], stage: Stage) -> Iterator[tuple[int, bool]]:
        """The index of each task, and whether its stage is this process's to do.

        What others have comes last: a killed process's claims run out in a lease's time, a live one's do not.
        """
        left, waited_s = list(range(len(tasks))), 0.0
        while left:
            busy: list[int] = []
            for index in left:
                state = self.lease.take(unit_of(tasks[index], stage))
                if state == "busy" and waited_s <= self.lease.seconds + LOOK_AGAIN_S:
                    busy.append(index)
                else:
                    yield index, state == "mine"
            if busy:
                self.display.say(waiting_text(len(busy)))
                time.sleep(LOOK_AGAIN_S)
                waited_s += LOOK_AGAIN_S
            left = busy

    def _confirm(self, task: Task, stage: Stage) -> WinnerRecord | None:
        """The winner after its second race."""
        family = task.spec.family
        self.display.say(f"confirming {family} {problem_text(task.problem.to_dict(), family)}")
        try:
            with self.lease.working(unit_of(task, stage)):
                return confirm_winner(task, measurer=self.worker, store=self.store)
        except ClaimLost as error:
            self.display.note(str(error))
            return known_winner(self.store, task)

    def retry_suspects(self) -> bool:
        """Measure once more, when all else is done, what a journal suspects; True if finalists raced again with it."""
        raced = False
        suspects = [task for task in map(self.task, self.run.work) if suspected(self.store, task)]
        for place, is_mine in self._claim_each(suspects, "retry"):
            task = suspects[place]
            if not is_mine:
                continue
            try:
                with self.lease.working(unit_of(task, "retry")):
                    raced |= self._retry(task)
            except ClaimLost as error:
                self.display.note(str(error))
        return raced

    def _retry(self, task: Task) -> bool:
        tried = retry_suspected(self.store, task, self.worker)
        for trial in tried:
            text = f"{task.spec.family}: tried once more: {trial.status} {trial.reason}  {trial.config}"
            self.display.note(text)
        winner = known_winner(self.store, task)
        if not any(contends(trial, winner) for trial in tried):
            return False
        race_again(task, self.store, self.display, self.worker)
        return True

    def tell_of_others(self, left: list[Work]) -> None:
        """What other processes did, and have."""
        elsewhere = sum(outcome.kind == "elsewhere" for outcome in self.display.outcomes)
        if elsewhere:
            self.display.note(f"{elsewhere} of {len(self.run.work)} problems were tuned by other processes meanwhile")
        if left:
            self.display.note(left_text(len(left)))


def waiting_text(count: int) -> str:
    """What is said while there is nothing else to do."""
    return (
        f"waiting for {count} problems of other processes; those of one that was killed are free after {LEASE_S:.0f} s"
    )


def left_text(count: int) -> str:
    """What is said of problems that others still have when the minutes are spent."""
    return f"{count} left to other processes, which are still at work; the same command looks again"
