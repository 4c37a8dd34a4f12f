"""A problem without its GPU: compile for it, reject what cannot run, rank the rest by a roofline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from ..codegen.compile import shared_limit_bytes
from ..codegen.pool import CompileJob, CompileOutcome, compile_many
from ..codegen.render import template_digest
from ..db.records import TrialRecord
from ..db.store import TuningStore
from ..dispatch.fingerprint import for_target
from ..spec import Config, KernelSpec, Problem
from .ahead import MAX_SPILL_BYTES, TIMEOUT_S
from .budget import Budget, Meter
from .guess import terms_of
from .progress import NullProgress, Outcome, OutcomeKind, Plan, Progress, TrialEvent, count_reasons, count_statuses
from .ranking import Prediction, rank_predictions
from .roofline import GpuModel, ResourcesLike, gpu_model, occupancy, programs_per_sm
from .space import config_key
from .task import Task, known_correction, known_trials

DEFAULT_CANDIDATES = 64  # compiled when the budget names minutes only
LEAST_TIMEOUT_S = 15.0  # of a compilation, however short the budget


class CompileMany(Protocol):
    """`codegen.pool.compile_many`, or a stand-in for tests."""

    def __call__(
        self,
        specs: dict[str, KernelSpec],
        jobs: Sequence[CompileJob],
        target: str = ...,
        processes: int | None = ...,
        timeout_s: float = ...,
    ) -> Iterator[CompileOutcome]: ...


def predict_problem(
    spec: KernelSpec,
    problem: Problem,
    *,
    target: str,
    store: TuningStore,
    budget: Budget,
    progress: Progress | None = None,
    processes: int | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    digest_of: Callable[[KernelSpec], str] = template_digest,
    compiler: CompileMany = compile_many,
) -> list[Prediction]:
    """Configs that compile for `target` and fit on it, fastest guess first; stored as predictions only.

    The default config and a seeded sample of the legal ones are tried, as many as the budget allows; what an earlier
    call stored is not compiled again. Guesses are those of the cost model, corrected by what is measured of the family
    anywhere; where later measurements change which config comes first, all guesses are stored anew.
    """
    spec.check_problem(problem)
    task = Task(spec, problem, for_target(target).to_dict(), digest_of(spec))
    listener = progress or NullProgress()
    run = _Predicting(task, store, listener, budget, gpu_model(target), shared_limit_bytes(target), seed, clock)
    try:
        jobs = run.jobs()
        run.collect(compiler({spec.family: spec}, jobs, target, processes, time_limit_s(budget)))
    except BaseException:
        run.finish("interrupted")
        raise
    ranked = run.ranked()
    run.finish("predicted" if ranked else "failed")
    return ranked


def stored_predictions(
    spec: KernelSpec,
    problem: Problem,
    *,
    target: str,
    store: TuningStore,
    digest_of: Callable[[KernelSpec], str] = template_digest,
) -> list[Prediction]:
    """The ranking of what is stored, such as an interrupted `predict_problem` left it; compiles and stores nothing."""
    task = Task(spec, problem, for_target(target).to_dict(), digest_of(spec))
    return rank_predictions(known_trials(store, task, kind="predicted"), known_correction(store, spec).guess_of)


class _Predicting:
    """State of one `predict_problem` call."""

    def __init__(
        self,
        task: Task,
        store: TuningStore,
        progress: Progress,
        budget: Budget,
        gpu: GpuModel,
        shared_limit: int,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.task, self.store, self.progress, self.budget = task, store, progress, budget
        self.gpu, self.shared_limit, self.seed = gpu, shared_limit, seed
        self.correction = known_correction(store, task.spec)
        self.records = known_trials(store, task, kind="predicted")
        self.num_done = self.num_planned = 0
        self.meter = Meter(budget, len(self.records), clock)

    def jobs(self) -> list[CompileJob]:
        """What has to be compiled still; tells the plan."""
        task, known = self.task, {config_key(record.config) for record in self.records}
        wanted = candidate_configs(task, self.budget.max_trials or DEFAULT_CANDIDATES, self.seed)
        fresh = [config for config in wanted if config_key(config) not in known]
        self.num_planned = len(fresh)
        self.progress.start(Plan(task.spec, task.problem, self.budget, len(self.records), len(fresh)))
        return [CompileJob(task.spec.family, task.problem.to_dict(), config) for config in fresh]

    def collect(self, outcomes: Iterator[CompileOutcome]) -> None:
        """Judge and store outcomes until they end or the time is over."""
        try:
            for outcome in outcomes:
                self._keep(self._judge(outcome))
                if self.budget.max_minutes is not None and self.meter.minutes >= self.budget.max_minutes:
                    return
        finally:
            if isinstance(outcomes, Generator):  # ends the compiling processes at once
                outcomes.close()

    def _judge(self, outcome: CompileOutcome) -> TrialRecord:
        config, resources = outcome.job.config, outcome.resources
        if outcome.status != "ok" or resources is None:
            return self.task.prediction(config, outcome.status, outcome.reason, None, None)
        problem = self.task.problem
        told = {**resources.to_dict(), "occupancy": occupancy(resources, self.gpu)}
        reason = reject_reason(resources, self.gpu, self.shared_limit)
        found = None if reason else terms_of(self.task.spec, problem, config, told, self.gpu)
        if found is None:
            return self.task.prediction(config, "resource", reason, told, None)
        told |= {"waves": found[1].waves, "model_us": found[1].time_us}
        return self.task.prediction(config, "ok", "", told, self.correction.guess_us(problem, config, told, self.gpu))

    def ranked(self) -> list[Prediction]:
        """Fastest first by the correction of now, which is stored if another config is first by it."""
        stored, fresh = rank_predictions(self.records), rank_predictions(self.records, self.correction.guess_of)
        if [prediction.config for prediction in stored[:1]] != [prediction.config for prediction in fresh[:1]]:
            for prediction in fresh:
                for config in (prediction.config, *prediction.same_code):
                    self.store.add_trial(
                        self.task.prediction(config, "ok", "", prediction.resources, prediction.predicted_us)
                    )
        return fresh

    def _keep(self, record: TrialRecord) -> None:
        self.store.add_trial(record)
        self.records.append(record)
        self.num_done += 1
        self.meter.trials += 1
        best_us = min((r.predicted_us for r in self.records if r.predicted_us is not None), default=None)
        self.progress.trial(TrialEvent(record, self.num_done, min(1.0, self.meter.spent), best_us))

    def finish(self, kind: OutcomeKind) -> None:
        """Tell how it ended."""
        statuses, reasons = count_statuses(self.records), count_reasons(self.records)
        left = self.num_planned - self.num_done
        self.progress.finish(Outcome(kind, self.task.spec, self.task.problem, None, statuses, reasons, left=left))


def time_limit_s(budget: Budget) -> float:
    """For one compilation: no longer than the budget, but long enough for most."""
    if budget.max_minutes is None:
        return TIMEOUT_S
    return min(TIMEOUT_S, max(LEAST_TIMEOUT_S, 60 * budget.max_minutes))


def candidate_configs(task: Task, count: int, seed: int) -> list[Config]:
    """The default and `count - 1` random legal configs, or all there are; a larger count adds to a smaller one's."""
    default = task.spec.default_config(task.problem)
    everything = task.space.all_if_at_most(count)
    if everything is not None:
        return [default, *(config for config in everything if config != default)]
    rng, found = random.Random(seed), {config_key(default): default}
    while len(found) < count:
        config = task.space.sample(rng, found.keys())
        if config is None:
            break
        found[config_key(config)] = config
    return list(found.values())


def reject_reason(resources: ResourcesLike, gpu: GpuModel, shared_limit: int) -> str:
    """Why a compiled variant cannot run or cannot be fast on a GPU; empty if neither."""
    threads = gpu.warp_size * resources.num_warps
    if resources.shared_bytes > shared_limit:
        return f"needs {resources.shared_bytes} bytes of shared memory, the limit is {shared_limit}"
    if resources.registers * threads > gpu.registers_per_sm:
        return f"needs {resources.registers} registers for {threads} threads, the limit is {gpu.registers_per_sm}"
    if resources.spill_bytes > MAX_SPILL_BYTES:
        return f"spills {resources.spill_bytes} bytes a thread, more than {MAX_SPILL_BYTES}"
    if programs_per_sm(resources, gpu) == 0:
        return f"no program of {threads} threads fits on a multiprocessor"
    return ""
