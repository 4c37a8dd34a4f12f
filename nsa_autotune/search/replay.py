"""Replay: the real search on a recorded space, with recorded times and noise, on a clock that nobody waits for."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from ..bench.result import TrialResult
from ..bench.timing import summarize
from ..bench.worker import MEASURE_ROUNDS, RACE_ROUNDS
from ..db.store import TuningStore
from ..dispatch.fingerprint import for_target
from ..errors import InvalidInput
from ..spec import DEFAULT_POLICY, Config, Problem
from .ahead import Prepared, Unprepared, code_of
from .budget import Budget, Meter, parse_budget
from .correction import Correction, fit
from .guess import gpu_of, target_of
from .recorded import RecordedSpace
from .space import config_key
from .task import PREDICTED_SEEDS, Task
from .tuner import FINALISTS, tune_problem

METHODS = ("tune", "tune+model", "random")
LAUNCHES_PER_SAMPLE = 3.0  # assumed: flushing the cache and repeating short kernels
OVERHEAD_S = 0.15  # assumed, a measurement: inputs, accuracy gate, warm-up
COMPILE_S = 1.5  # assumed where a record does not tell how long its compilation took
CORES = 16  # that compile


@dataclass
class ReplayClock:
    """Seconds that were charged."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """The time, as `time.monotonic` tells it."""
        return self.now_s

    def charge(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


@dataclass
class ReplayMeasurer:
    """Answers from a recorded space: samples are drawn anew, by seed, from those that were recorded of a config."""

    space: RecordedSpace
    seed: int
    clock: ReplayClock
    num_measured: int = 0
    policy: str = DEFAULT_POLICY
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def measure(self, family: str, problem: Problem, config: Config, rounds: int = MEASURE_ROUNDS) -> TrialResult:
        """One trial; a config that was not recorded is refused as a constraint."""
        self.num_measured += 1
        return self._draw(config, rounds)

    def race(
        self,
        family: str,
        problem: Problem,
        configs: Sequence[Config],
        rounds: int = RACE_ROUNDS,
        *,
        sentinel: int | None = None,
    ) -> list[TrialResult]:
        """Each config in turn: what disturbs a race is not recorded pair by pair."""
        return [self._draw(config, rounds) for config in configs]

    def _draw(self, config: Config, rounds: int) -> TrialResult:
        self.clock.charge(OVERHEAD_S)
        found = self.space.configs.get(config_key(config))
        if found is None:
            return TrialResult("constraint", "the config was not recorded")
        if not found.result.ok:
            return found.result
        samples = self._rng.choices(found.result.samples_us, k=rounds)
        self.clock.charge(LAUNCHES_PER_SAMPLE * sum(samples) / 1e6)
        timing = summarize(samples)
        return TrialResult(
            "ok",
            samples_us=timing.samples_us,
            median_us=timing.median_us,
            p20_us=timing.p20_us,
            p80_us=timing.p80_us,
            resources=found.result.resources,
        )


class ReplayPreparer(Unprepared):
    """Charges what compiling took on CORES cores, and hands out the failures recorded before a launch."""

    ahead = aside = CORES

    def __init__(self, space: RecordedSpace, clock: ReplayClock) -> None:
        super().__init__()
        self.space, self.clock = space, clock

    def take(self) -> list[Prepared]:
        """The next config, with the failure of its rendering or compiling, if one was recorded."""
        (prepared,) = super().take()
        found = self.space.configs.get(config_key(prepared.config))
        told = (found.result.resources or {}) if found is not None else {}
        self.clock.charge(float(told.get("compile_ms", COMPILE_S * 1e3)) / 1e3 / CORES)
        if found is not None and found.result.status in ("constraint", "render", "compile", "resource"):
            return [replace(prepared, failure=found.result)]
        return [replace(prepared, code=code_of(told), resources=dict(told))]


@dataclass(frozen=True)
class Replayed:
    """One search of a recorded space; `regret` is its winner's recorded time over the best one's, less 1."""

    family: str
    problem: Problem
    method: str
    budget: str
    seed: int
    num_configs: int  # recorded
    num_measured: int
    minutes: float  # charged
    regret: float | None  # None if nothing was found that works


def parse_replay_budget(text: str, num_configs: int) -> Budget:
    """A budget as `tune` takes it, or a share of the recorded configs such as `25%`."""
    if not text.endswith("%"):
        return parse_budget(text)
    digits = text[:-1].strip()
    if not digits.isascii() or not digits.isdigit() or not 0 < int(digits) <= 100:
        raise InvalidInput("a share of a space is a whole percentage", {"budget": text}, "Write for example 25%.")
    return Budget(max_trials=max(1, math.ceil(num_configs * int(digits) / 100)))


def replay(space: RecordedSpace, method: str, budget: str, seed: int, correction: Correction | None = None) -> Replayed:
    """Search the space once; `correction` orders the seeds of `tune+model`, learned from other problems."""
    clock = ReplayClock()
    measurer = ReplayMeasurer(space, seed, clock)
    limit = parse_replay_budget(budget, len(space.configs))
    if method == "random":
        config = _random_search(space, measurer, limit, seed)
    elif method in METHODS:
        config = _tune(space, measurer, limit, seed, correction if method == "tune+model" else None)
    else:
        raise InvalidInput(f"method must be one of {', '.join(METHODS)}", {"method": method})
    time_us = space.working.get(config_key(config)) if config is not None else None
    return Replayed(
        family=space.spec.family,
        problem=space.problem,
        method=method,
        budget=budget,
        seed=seed,
        num_configs=len(space.configs),
        num_measured=measurer.num_measured,
        minutes=clock.now_s / 60,
        regret=None if time_us is None else time_us / space.best_us - 1,
    )


def replay_all(
    spaces: Sequence[RecordedSpace], methods: Sequence[str], budgets: Sequence[str], seeds: Iterable[int]
) -> Iterator[tuple[RecordedSpace, Replayed]]:
    """Every space by every method within every budget from every seed."""
    numbers = list(seeds)
    for space in spaces:
        correction = learned_elsewhere(space, spaces) if "tune+model" in methods else None
        for method in methods:
            for budget in budgets:
                for seed in numbers:
                    yield space, replay(space, method, budget, seed, correction)


def learned_elsewhere(space: RecordedSpace, spaces: Iterable[RecordedSpace]) -> Correction:
    """The family's correction by all recorded problems but this one."""
    spec, own = space.family, space.family.problem_key(space.problem, bucket=False)
    others = [
        other
        for other in spaces
        if other.family.family == spec.family and spec.problem_key(other.problem, bucket=False) != own
    ]
    return fit(spec, [record for other in others for record in other.records])


def _tune(
    space: RecordedSpace, measurer: ReplayMeasurer, budget: Budget, seed: int, correction: Correction | None
) -> Config | None:
    """The winner of the real search in an empty database, but for the best guesses."""
    with TuningStore("sqlite://", import_shipped=False) as store:
        if correction is not None:
            _store_guesses(space, store, correction)
        winner = tune_problem(
            space.spec,
            space.problem,
            measurer=measurer,
            store=store,
            fingerprint=space.fingerprint,
            budget=budget,
            preparer=ReplayPreparer(space, measurer.clock),
            seed=seed,
            clock=measurer.clock,
            digest_of=lambda _spec: space.template_digest,
        )
    return winner.config if winner is not None else None


def _store_guesses(space: RecordedSpace, store: TuningStore, correction: Correction) -> None:
    fingerprint = for_target(target_of(space.fingerprint)).to_dict()
    task = Task(space.spec, space.problem, fingerprint, space.template_digest)
    for key, guess_us in rank_recorded(space, correction)[:PREDICTED_SEEDS]:
        found = space.configs[key]
        store.add_trial(task.prediction(found.config, "ok", "", found.result.resources, guess_us))


def _random_search(space: RecordedSpace, measurer: ReplayMeasurer, budget: Budget, seed: int) -> Config | None:
    """The least that any sampler must beat: configs at random, then the tuner's kind of race among the best."""
    meter, timed = Meter(budget, clock=measurer.clock), []
    preparer = ReplayPreparer(space, measurer.clock)
    keys = sorted(space.configs)
    random.Random(seed).shuffle(keys)
    for key in keys:
        if meter.exhausted:
            break
        config = space.configs[key].config
        preparer.submit(space.spec, space.problem, [config])
        preparer.take()
        result = measurer.measure(space.spec.family, space.problem, config)
        meter.trials += 1
        if result.median_us is not None:
            timed.append((result.median_us, key))
    finalists = [space.configs[key].config for _, key in sorted(timed)[:FINALISTS]]
    raced = measurer.race(space.spec.family, space.problem, finalists)
    times = [(result.median_us, config_key(c)) for c, result in zip(finalists, raced, strict=True) if result.median_us]
    return space.configs[min(times)[1]].config if times else None


def rank_recorded(space: RecordedSpace, correction: Correction) -> list[tuple[str, float]]:
    """Keys of working configs as the model ranks them, with guesses in us; of equal machine code only the first."""
    gpu, plain = gpu_of(space.fingerprint), Correction(space.family, "")
    guesses: dict[tuple[str, float | None], tuple[float, str]] = {}
    for key in sorted(space.working):
        found = space.configs[key]
        resources = found.result.resources
        guess_us = None if gpu is None else correction.guess_us(space.problem, found.config, resources, gpu)
        if gpu is not None and guess_us is not None:
            sha = str((resources or {}).get("binary_sha") or key)
            code = (sha, plain.guess_us(space.problem, found.config, resources, gpu))
            guesses[code] = min(guesses.get(code, (math.inf, "")), (guess_us, key))
    return [(key, guess_us) for guess_us, key in sorted(guesses.values())]


@dataclass(frozen=True)
class Summary:
    """Searches of one kind: medians and the worst of their regrets, and what they cost."""

    num_runs: int
    num_failed: int
    median_regret: float | None
    worst_regret: float | None
    num_measured: float  # median
    minutes: float  # median


def summarize_runs(runs: Sequence[Replayed]) -> Summary:
    """Of at least one run."""
    regrets = [run.regret for run in runs if run.regret is not None]
    return Summary(
        num_runs=len(runs),
        num_failed=len(runs) - len(regrets),
        median_regret=median(regrets) if regrets else None,
        worst_regret=max(regrets) if regrets else None,
        num_measured=median(run.num_measured for run in runs),
        minutes=median(run.minutes for run in runs),
    )
