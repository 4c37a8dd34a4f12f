"""Tune one problem: propose, measure, store; race the finalists; keep the winner with its evidence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..bench.result import TrialResult
from ..bench.worker import RACE_ROUNDS
from ..codegen.render import template_digest
from ..db.records import TrialRecord, WinnerRecord
from ..db.store import TuningStore
from ..spec import Config, KernelSpec, Problem
from .budget import Budget, Meter
from .progress import NullProgress, Outcome, OutcomeKind, Plan, Progress, TrialEvent, count_reasons, count_statuses
from .space import config_key
from .study import ConfigSearch
from .task import Task, known_trials, known_winner, seed_configs

EXHAUSTIVE_LIMIT = 256  # legal configs up to which a budget in minutes alone tries them all
EXPLORE_SHARE = 0.6  # of the budget before the neighbourhoods of the best are searched
SEED_SHARE = 0.25  # of the trials that may go to seeds
FINALISTS = 5  # raced against each other and the default
MAX_RACES = 3  # fields of finalists of which none survives
WORTH_A_RETRY = ("timeout", "crash")  # failures that retuning looks at again: another process may have caused them


class Measurer(Protocol):
    """Measures variants without ever raising for one that fails."""

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult: ...

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = ...
    ) -> list[TrialResult]: ...


class Preparer(Protocol):
    """Compiles configs ahead of their measurement, several at once."""

    batch: int  # configs that are worth preparing together

    def prepare(self, spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> Mapping[str, TrialResult]:
        """What became of the configs that need not be measured, by config key."""


LibraryBaseline = Callable[[KernelSpec, Problem], TrialResult]


def tune_problem(
    spec: KernelSpec,
    problem: Problem,
    *,
    measurer: Measurer,
    store: TuningStore,
    fingerprint: dict[str, str],
    budget: Budget,
    progress: Progress | None = None,
    retune: bool = False,
    library: LibraryBaseline | None = None,
    preparer: Preparer | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    digest_of: Callable[[KernelSpec], str] = template_digest,
) -> WinnerRecord | None:
    """The winner of the problem on this fingerprint, or None if no config works; `progress` gets the reasons' counts.

    A known winner is returned as it is unless `retune`. Every trial is stored at once, so that an interrupted call,
    repeated, goes on where it stopped; trials of earlier calls count towards the budget unless `retune`.
    """
    spec.check_problem(problem)
    task = Task(spec, problem, dict(fingerprint), digest_of(spec))
    listener = progress or NullProgress()
    winner = None if retune else known_winner(store, task)
    if winner is not None:
        listener.finish(Outcome("known", spec, problem, winner))
        return winner
    run = _Tuning(task, measurer, store, listener, budget, preparer=preparer, retune=retune, seed=seed, clock=clock)
    try:
        run.search_configs()
        winner = run.race_finalists(library)
    except BaseException:
        run.finish("interrupted", None)
        raise
    run.finish("tuned" if winner is not None else "failed", winner)
    return winner


class _Tuning:
    """State of one `tune_problem` call."""

    def __init__(
        self,
        task: Task,
        measurer: Measurer,
        store: TuningStore,
        progress: Progress,
        budget: Budget,
        *,
        preparer: Preparer | None,
        retune: bool,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.preparer = preparer
        self.task, self.measurer, self.store, self.progress = task, measurer, store, progress
        self.records = known_trials(store, task)
        if retune:
            self.records = [record for record in self.records if record.status not in WORTH_A_RETRY]
        self.num_done = 0
        self.meter = Meter(budget, 0 if retune else len(self.records), clock)
        self.search = ConfigSearch(task.space, seed=seed, seeds=self._first_configs(budget, seed))
        for record in self.records:
            self.search.remember(record.config, record.median_us)
        left = None if budget.max_trials is None else max(0, budget.max_trials - self.meter.trials)
        progress.start(Plan(task.spec, task.problem, budget, len(self.records), left))

    def _first_configs(self, budget: Budget, seed: int) -> list[Config]:
        """Seeds, and behind them in random order the whole space if the budget covers it."""
        limit = budget.max_trials or EXHAUSTIVE_LIMIT
        seeds = seed_configs(self.store, self.task, max(4, int(limit * SEED_SHARE)))
        everything = self.task.space.all_if_at_most(limit) or []
        random.Random(seed).shuffle(everything)
        return seeds + everything

    def search_configs(self) -> None:
        """Measure proposals until the budget or the space is exhausted; at least one batch until something works."""
        spec, problem = self.task.spec, self.task.problem
        first = True
        while not self.meter.exhausted or (first and not self.search.ranked()):
            configs, first = self._proposals(), False
            if not configs:
                return
            refused = self.preparer.prepare(spec, problem, configs) if self.preparer is not None else {}
            for config in configs:
                if self.meter.exhausted and self.search.ranked():
                    return  # compiling may take all the time there was: what works is then worth one measurement
                result = refused.get(config_key(config)) or self.measurer.measure(spec.family, problem, config)
                self.meter.trials += 1
                self._keep(self.task.trial(config, result, "search"))
                self.search.record(config, result.median_us if result.ok else None)

    def _proposals(self) -> list[Config]:
        """The next configs: one, or as many as are worth preparing together and the budget allows."""
        count = 1 if self.preparer is None else self.preparer.batch
        if self.meter.budget.max_trials is not None:
            count = min(count, self.meter.budget.max_trials - self.meter.trials)
        polish = self.meter.spent >= EXPLORE_SHARE
        proposals = (self.search.propose(polish=polish) for _ in range(count))
        return [config for config in proposals if config is not None]

    def race_finalists(self, library: LibraryBaseline | None) -> WinnerRecord | None:
        """Measure the best configs and the default interleaved; the best median of that race wins."""
        ranked = [config for config, _ in self.search.ranked()]
        for first in range(0, min(len(ranked), MAX_RACES * FINALISTS), FINALISTS):
            results = self._race(ranked[first : first + FINALISTS])
            working = {key: result for key, result in results.items() if result.ok and result.median_us is not None}
            if working:
                return self._crown(working, ranked, library)
        return None

    def _race(self, finalists: list[Config]) -> dict[str, TrialResult]:
        default = self.task.spec.default_config(self.task.problem)
        works = config_key(default) in {config_key(config) for config, _ in self.search.ranked()}
        if works and default not in finalists:
            finalists = [*finalists, default]
        family, problem = self.task.spec.family, self.task.problem
        results = self.measurer.race(family, problem, finalists, rounds=RACE_ROUNDS)
        for config, result in zip(finalists, results, strict=True):
            self._keep(self.task.trial(config, result, "final"))
        return {config_key(config): result for config, result in zip(finalists, results, strict=True)}

    def _crown(
        self, working: dict[str, TrialResult], ranked: list[Config], library: LibraryBaseline | None
    ) -> WinnerRecord:
        best = min(working, key=lambda key: working[key].median_us or 0.0)
        config = next(config for config in ranked if config_key(config) == best)
        default = working.get(config_key(self.task.spec.default_config(self.task.problem)))
        record = self.task.winner(
            config,
            working[best],
            default_median_us=default.median_us if default is not None else None,
            library_median_us=self._library_us(library),
        )
        self.store.set_winner(record)
        return record

    def _library_us(self, library: LibraryBaseline | None) -> float | None:
        if library is None or not self.task.spec.library:
            return None
        result = library(self.task.spec, self.task.problem)
        self._keep(self.task.baseline(result))
        return result.median_us if result.ok else None

    def _keep(self, record: TrialRecord) -> None:
        """Store first, tell afterwards: what is shown is safe."""
        self.store.add_trial(record)
        self.records.append(record)
        self.num_done += 1
        times = (r.median_us for r in self.records if r.status == "ok" and r.stage != "baseline")
        best_us = min((median_us for median_us in times if median_us is not None), default=None)
        self.progress.trial(TrialEvent(record, self.num_done, min(1.0, self.meter.spent), best_us))

    def finish(self, kind: OutcomeKind, winner: WinnerRecord | None) -> None:
        """Tell how it ended."""
        spec, problem, records = self.task.spec, self.task.problem, self.records
        statuses, reasons = count_statuses(records), count_reasons(records)
        self.progress.finish(Outcome(kind, spec, problem, winner, statuses, reasons))
