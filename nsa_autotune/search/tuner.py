"""Tune one problem: propose, prepare, measure, store; race the finalists; keep the winner with its evidence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from ..bench.result import Status, TrialResult
from ..bench.worker import RACE_ROUNDS
from ..codegen.render import template_digest
from ..db.records import TrialRecord, WinnerRecord
from ..db.store import TuningStore
from ..spec import Config, KernelSpec, Problem
from .ahead import Prepared, Preparer, Unprepared
from .budget import Budget, Meter
from .certify import Raced, judge
from .progress import (
    Effort,
    NullProgress,
    Outcome,
    OutcomeKind,
    Plan,
    Progress,
    TrialEvent,
    count_reasons,
    count_statuses,
)
from .quarantine import quarantined
from .screen import Screen
from .space import config_key
from .study import ConfigSearch
from .task import Task, known_trials, known_winner, seed_configs

EXHAUSTIVE_LIMIT = 256  # legal configs up to which a budget in minutes alone tries them all
EXPLORE_SHARE = 0.6  # of the budget before the neighbourhoods of the best are searched
AHEAD_SHARE = 0.125  # of the trials that may be under way: what is proposed together learns nothing of each other
WAITING_SHARE = 0.25  # of the time that the GPU may wait for compilers, before twice as many may be under way
TWIN: Status = "same_code"  # of a config whose machine code another one was measured with
SEED_SHARE = 0.25  # of the trials that may go to seeds
FINALISTS = 8  # raced against each other and the default
MAX_RACES = 3  # fields of finalists of which none survives
WORTH_A_RETRY = ("timeout", "crash")  # failures that retuning looks at again: another process may have caused them


class Measurer(Protocol):
    """Measures variants without ever raising for one that fails."""

    policy: str  # under which it takes times

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """A coarse time."""

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = ..., *, sentinel: int | None = ...
    ) -> list[TrialResult]:
        """Samples of the same blocks; `sentinel` is the index of the config that watches for drift."""


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
    retry_quarantined: bool = False,
    library: LibraryBaseline | None = None,
    preparer: Preparer | None = None,
    seed: int = 0,
    first: Sequence[Config] = (),
    clock: Callable[[], float] = time.monotonic,
    digest_of: Callable[[KernelSpec], str] = template_digest,
) -> WinnerRecord | None:
    """The winner of the problem on this fingerprint, or None if no config works; `progress` gets the reasons' counts.

    A known winner is returned as it is unless `retune`. Every trial is stored at once, so that an interrupted call,
    repeated, goes on where it stopped; trials of earlier calls count towards the budget unless `retune`. The winner is
    provisional until `confirm.confirm_winner` has raced it in a second process. What crashed or hung before on this
    fingerprint stays out, see `quarantine`, unless `retry_quarantined`. `first`: configs to measure before all others.
    """
    spec.check_problem(problem)
    task = Task(spec, problem, dict(fingerprint), digest_of(spec), measurer.policy)
    listener = progress or NullProgress()
    winner = None if retune else known_winner(store, task)
    if winner is not None:
        listener.finish(Outcome("known", spec, problem, winner))
        return winner
    banned = {} if retry_quarantined else quarantined(store, task)
    run = _Tuning(
        task,
        measurer,
        store,
        listener,
        budget,
        banned=banned,
        preparer=preparer,
        retune=retune,
        seed=seed,
        first=first,
        clock=clock,
    )
    try:
        run.search_configs()
        winner = run.race_finalists(library)
    except BaseException:
        run.finish("interrupted", None)
        raise
    run.finish("tuned" if winner is not None else "failed", winner)
    return winner


def race_configs(task: Task, measurer: Measurer, configs: list[Config], default: Config) -> list[Raced]:
    """Race configs of one problem, with the default as the sentinel if it is among them."""
    sentinel = configs.index(default) if default in configs else None
    results = measurer.race(task.spec.family, task.problem, configs, rounds=RACE_ROUNDS, sentinel=sentinel)
    return list(zip(configs, results, strict=True))


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
        banned: Collection[str],  # keys of configs that are not tried
        preparer: Preparer | None,
        retune: bool,
        seed: int,
        first: Sequence[Config],
        clock: Callable[[], float],
    ) -> None:
        self.preparer = preparer or Unprepared()
        self.task, self.measurer, self.store, self.progress = task, measurer, store, progress
        self.records = known_trials(store, task)
        if retune:
            kept = (r for r in self.records if r.status not in WORTH_A_RETRY or config_key(r.config) in banned)
            self.records = list(kept)
        self.num_done = 0
        spent = sum(r.status != TWIN for r in self.records)
        self.meter = Meter(budget, 0 if retune else spent, clock)
        limit = budget.max_trials or EXHAUSTIVE_LIMIT
        everything = task.space.all_if_at_most(limit) or []
        random.Random(seed).shuffle(everything)
        seeds = [*first, *seed_configs(store, task, max(4, int(limit * SEED_SHARE))), *everything]
        self.search = ConfigSearch(task.space, seed=seed, seeds=seeds)
        self.search.exclude(banned)
        self.screen = Screen(task, store, 0 if everything else self.preparer.aside, seed)
        self.ready: list[Prepared] = []  # proposals that the screen had compiled
        self.codes: dict[str, TrialRecord] = {}  # machine code -> the trial that measured it
        self.under_way = 0
        self.started_s, self.waited_s = time.perf_counter(), 0.0
        for record in self.records:
            self.search.remember(record.config, record.median_us, twin=record.status == TWIN)
        left = None if budget.max_trials is None else max(0, budget.max_trials - self.meter.trials)
        progress.start(Plan(task.spec, task.problem, budget, len(self.records), left))

    def search_configs(self) -> None:
        """Measure proposals until the budget or the space is exhausted."""
        try:
            while self._top_up():
                for prepared in self._take():
                    if self.screen.collect(prepared):
                        continue
                    self.under_way -= 1
                    if self.meter.exhausted and self.search.ranked():
                        return  # compiling may take all the time there was: what works is then worth one measurement
                    self._decide(prepared)
                    favourite = None if self.meter.exhausted else self.screen.favourite(self.codes)
                    if favourite is not None:
                        self._decide(favourite)
        finally:
            self.preparer.cancel()

    def _top_up(self) -> bool:
        """Keep as many configs under way as are worth preparing together and the budget allows; False if none is."""
        count = self.preparer.ahead - self.under_way
        limit = self.meter.budget.max_trials
        if limit is not None:
            count = min(self._most_under_way(limit), limit - self.meter.trials) - self.under_way
        if self.meter.exhausted and (self.search.ranked() or self.under_way or self.num_done):
            count = 0  # at least one batch is tried, however short the time
        polish = self.meter.spent >= EXPLORE_SHARE
        proposals = [self.search.propose(polish=polish) for _ in range(count)]
        self._submit([config for config in proposals if config is not None])
        drawn = self.screen.draw(self.meter.trials, self.search) if self.under_way else []
        if drawn:
            self.preparer.submit(self.task.spec, self.task.problem, drawn)
        return self.under_way > 0

    def _most_under_way(self, max_trials: int) -> int:
        """Few, so that a proposal knows of the ones before it; more where the GPU waits for them to compile."""
        waits = self.waited_s > WAITING_SHARE * (time.perf_counter() - self.started_s)
        return max(1, min(self.preparer.ahead, int(max_trials * AHEAD_SHARE) * (2 if waits else 1)))

    def _take(self) -> list[Prepared]:
        if self.ready:
            ready, self.ready = self.ready, []
            return ready
        started_s = time.perf_counter()
        found = self.preparer.take()
        self.waited_s += time.perf_counter() - started_s
        return found

    def _submit(self, configs: list[Config]) -> None:
        """Have them compiled, unless the screen did or is about to."""
        held = {config_key(config): self.screen.take(config) for config in configs}
        self.ready += [prepared for prepared in held.values() if prepared is not None]
        fresh = [config for config in configs if held[config_key(config)] is None and not self.screen.release(config)]
        if fresh:
            self.preparer.submit(self.task.spec, self.task.problem, fresh)
        self.under_way += len(configs)

    def _decide(self, prepared: Prepared) -> None:
        """Measure a config, unless it failed to compile or its machine code was measured before; store and learn."""
        config, twin = prepared.config, self.codes.get(prepared.code)
        if prepared.failure is not None:
            result = prepared.failure
        elif twin is not None:
            result = _twin_result(twin)
        else:
            result = self.measurer.measure(self.task.spec.family, self.task.problem, config)
        resources = {**prepared.resources, **(result.resources or {})}  # what was loaded on the device counts more
        record = self.task.trial(config, replace(result, resources=resources or None), "search")
        if prepared.code and result.ok:
            self.codes[prepared.code] = record
        self.meter.trials += twin is None  # one that need not be measured leaves its trial to another
        self._keep(record)
        self.search.record(config, result.median_us, twin=twin is not None)

    def race_finalists(self, library: LibraryBaseline | None) -> WinnerRecord | None:
        """Race the best configs and the default; `certify.judge` says who wins and who is tied."""
        ranked = [config for config, _ in self.search.ranked()]
        default = self.task.spec.default_config(self.task.problem)
        for first in range(0, min(len(ranked), MAX_RACES * FINALISTS), FINALISTS):
            finalists = ranked[first : first + FINALISTS]
            if default in ranked and default not in finalists:
                finalists.append(default)
            raced = race_configs(self.task, self.measurer, finalists, default)
            for config, result in raced:
                self._keep(self.task.trial(config, result, "final"))
            verdict = judge(raced, default)
            if verdict is not None:
                default_us = next((result.median_us for config, result in raced if config == default), None)
                library_us = self._library_us(library)
                record = self.task.winner(verdict, "provisional", default_us=default_us, library_us=library_us)
                self.store.set_winner(record)
                return record
        return None

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
        effort = Effort(self.num_done, time.perf_counter() - self.started_s, self.waited_s)
        self.progress.finish(Outcome(kind, spec, problem, winner, statuses, reasons, effort))


def _twin_result(twin: TrialRecord) -> TrialResult:
    """The time of a config that runs the machine code of another one."""
    reason = f"the same machine code as {config_key(twin.config)}"
    return TrialResult(
        TWIN, reason, median_us=twin.median_us, p20_us=twin.p20_us, p80_us=twin.p80_us, resources=twin.resources
    )
