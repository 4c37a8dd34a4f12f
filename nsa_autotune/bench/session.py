"""Trials in this process: render, load, compile, gate, time. Run by the worker's child, since none survives a crash."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..spec import Config, KernelSpec, Problem, canonical_json
from .accuracy import Case, gate_problem, prepare_gate, prepare_rows, run_cases
from .compare import AccuracyReport
from .failure import classify, is_sticky
from .inputs import TrialInputs, make_inputs
from .journal import RACE
from .library import library_call
from .nvml import make_watch
from .policy import Policy, get_policy
from .race import Race, run_race
from .result import TrialResult
from .timing import Clock, Fn, Timing, make_clock, summarize

T = TypeVar("T")

TOOLCHAIN = "nsa_autotune.bench.toolchain"
GATES_KEPT = 4
PROBLEMS_KEPT = 1  # tensors at full length fill device memory
REASON_CHARS = 2000

Tell = Callable[[int, str], None]  # (index of the config, stage): called before anything that may not come back


@dataclass(frozen=True)
class Timer:
    """How a request wants its variants timed."""

    rounds: int
    policy: Policy = field(default_factory=get_policy)
    target_ms: float = 400.0  # of device time a variant
    sentinel: int | None = None  # index of the config that watches for drift


@dataclass(frozen=True)
class Ready:
    """A variant that passed the gate, bound to inputs at full length."""

    launch: Fn
    report: AccuracyReport
    resources: dict[str, int | str] | None


class MeasureSession:
    """Runs trials on one device; keeps gates and inputs of the last problems."""

    def __init__(self, device: str, toolchain: str = TOOLCHAIN, clock: Clock | None = None, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.lost = False  # True once the CUDA context answers nothing but errors
        self._tools: Any = importlib.import_module(toolchain)
        self._seed = seed
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._clock, self._watch = clock, make_watch(self.device)
        self._clocks: dict[bool, Clock] = {}
        self._gates: OrderedDict[str, tuple[Case, ...]] = OrderedDict()
        self._cases: OrderedDict[str, Case] = OrderedDict()

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], timer: Timer, tell: Tell = lambda _i, _s: None
    ) -> list[TrialResult | None]:
        """Gate every config and time those that pass, interleaved; None for those left undecided by a lost context."""
        results: list[TrialResult | None] = [None] * len(configs)
        ready: dict[int, Ready] = {}
        for index, config in enumerate(configs):
            found = self._prepare(family, problem, config, lambda stage, i=index: tell(i, stage))  # type: ignore[misc]
            if isinstance(found, Ready):
                ready[index] = found
            else:
                results[index] = found
            if self.lost:
                return results
        self._time(ready, results, timer, tell)
        return results

    def library(self, provider: str, problem: Problem, timer: Timer, tell: Tell = lambda _i, _s: None) -> TrialResult:
        """Time a library that computes what a family does, or something users would otherwise call."""
        tell(0, "library")
        self._forget()
        try:
            call, reason = library_call(provider, problem, self.device, self._seed)
            if call is None:
                return TrialResult("constraint", reason)
            return self._result(self._run([call], timer, None, lambda _: None).timings[0])
        except Exception as error:  # whatever the library raises is its result
            self.lost = is_sticky(error)
            return TrialResult(classify(error, "timing"), _reason(error))

    def _prepare(
        self, family: str, problem: Problem, config: Config, tell: Callable[[str], None]
    ) -> Ready | TrialResult:
        stage, rendered = "problem", None

        def enter(name: str) -> None:
            nonlocal stage
            stage = name
            tell(name)

        try:
            enter("problem")
            spec = self._tools.get_spec(family)
            spec.check_problem(problem)
            spec.check_config(problem, config)
            enter("render")
            rendered = self._tools.render(spec, problem, config)
            enter("load")
            launch = self._tools.load(rendered).launch
            return self._gated(spec, problem, launch, enter)
        except Exception as error:  # any exception is the trial's result, never the end of the search
            self.lost = is_sticky(error)
            reason = _reason(error) if rendered is None else self._tools.explain(error, rendered)
            status, error = classify(error, stage), error.with_traceback(None)  # frames would keep tensors alive
            if status == "resource" and not self.lost:
                self._forget()
            return TrialResult(status, reason[:REASON_CHARS])

    def _gated(
        self, spec: KernelSpec, problem: Problem, launch: Callable[..., Any], enter: Callable[[str], None]
    ) -> Ready | TrialResult:
        small = gate_problem(problem)
        enter("inputs")
        gate = self._gate(spec, small)
        enter("compile")
        watched = _Watched(launch, enter, self._synchronize)
        report, inputs = run_cases(gate, watched), gate[0].inputs
        if report.ok and small != problem:
            enter("inputs")
            case = self._case(spec, problem)
            enter("compile")
            watched.is_first = True  # Triton specialises on sizes
            rows, inputs = run_cases((case,), watched), case.inputs
            reason = "" if rows.ok else f"At full length, though not at {small.seq_k} tokens: {rows.reason}"
            report = replace(max(report, rows, key=lambda r: r.max_error), ok=rows.ok, reason=reason)
        resources = resources_of(watched.kernels)  # at full length
        if not report.ok:
            return self._result(None, "accuracy", report, resources)
        return Ready(lambda: inputs.call(launch), report, resources)

    def _time(self, ready: dict[int, Ready], results: list[TrialResult | None], timer: Timer, tell: Tell) -> None:
        while ready and not self.lost:
            indices, current = list(ready), 0
            for index in indices:
                tell(index, RACE)

            def enter(position: int) -> None:
                nonlocal current
                current = indices[position]  # noqa: B023 - called within this turn of the loop
                tell(current, "timing")

            try:
                sentinel = indices.index(timer.sentinel) if timer.sentinel in indices else None
                race = self._run([ready[i].launch for i in indices], timer, sentinel, enter)
            except Exception as error:  # the variant on the clock is to blame: each sample waits for the device
                self.lost = is_sticky(error)
                results[current] = TrialResult(classify(error, "timing"), _reason(error))
                del ready[current]
                continue
            for index, timing in zip(indices, race.timings, strict=True):
                result = self._result(timing, "ok", ready[index].report, ready[index].resources)
                results[index] = replace(result, environment=race.environment)
            return

    def _run(self, fns: list[Fn], timer: Timer, sentinel: int | None, enter: Callable[[int], None]) -> Race:
        policy = timer.policy
        clock = _TellingClock(self._clock_for(policy), fns, enter)
        if self.device.type != "cuda":  # the interpreter's time is only a token
            return Race([summarize([clock.elapsed_us(fn, 1, False)]) for fn in fns], blocks=1)
        return run_race(
            fns,
            clock=clock,
            rounds=timer.rounds,
            sentinel=sentinel,
            watch=self._watch,
            cold_l2=policy.cold_l2,
            target_ms=timer.target_ms,
        )

    def _clock_for(self, policy: Policy) -> Clock:
        if self._clock is not None:
            return self._clock
        if policy.graph not in self._clocks:
            self._clocks[policy.graph] = make_clock(self.device, graph=policy.graph)
        return self._clocks[policy.graph]

    def _result(
        self,
        timing: Timing | None,
        status: Any = "ok",
        report: AccuracyReport | None = None,
        resources: dict[str, int | str] | None = None,
    ) -> TrialResult:
        result = TrialResult(status, resources=resources)
        if report is not None:
            result = replace(
                result, reason=report.reason, max_error=report.max_error, baseline_error=report.baseline_error
            )
        return result if timing is None else replace(result, **vars(timing))

    def _gate(self, spec: KernelSpec, problem: Problem) -> tuple[Case, ...]:
        return _kept(
            self._gates, GATES_KEPT, _key(spec, problem), lambda: prepare_gate(spec, problem, self.device, self._seed)
        )

    def _case(self, spec: KernelSpec, problem: Problem) -> Case:
        def make() -> Case:
            inputs: TrialInputs = make_inputs(spec, problem, self.device, self._seed)
            return prepare_rows(spec, problem, inputs, self._seed)

        return _kept(self._cases, PROBLEMS_KEPT, _key(spec, problem), make)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget(self) -> None:
        """Give cached tensors back, so that memory one trial lacked is there for the next."""
        self._gates.clear()
        self._cases.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Watched:
    """A launch function that remembers its kernels, and tells when a first launch, which compiles, has begun to run."""

    def __init__(self, launch: Callable[..., Any], enter: Callable[[str], None], wait: Callable[[], None]) -> None:
        self.__wrapped__ = launch
        self._launch, self._enter, self._wait = launch, enter, wait
        self.is_first = True
        self.kernels: object = None

    def __call__(self, **arguments: Any) -> object:
        if not self.is_first:
            self._enter("launch")
        self.kernels = self._launch(**arguments)
        if self.is_first:
            self._enter("launch")
        self._wait()
        self.is_first = False
        self._enter("accuracy")
        return self.kernels


class _TellingClock:
    """A clock that says which function it is about to time."""

    def __init__(self, clock: Clock, fns: list[Fn], enter: Callable[[int], None]) -> None:
        self._clock, self._enter = clock, enter
        self._position = {id(fn): position for position, fn in enumerate(fns)}

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        self._enter(self._position[id(fn)])
        return self._clock.elapsed_us(fn, launches, cold_l2)


def resources_of(kernels: object) -> dict[str, int | str] | None:
    """Largest demand of the compiled kernels that a launch returned; None where they tell nothing (interpreter)."""
    told = [kernel for kernel in kernels if hasattr(kernel, "n_regs")] if isinstance(kernels, list) else []
    if not told:
        return None
    return {
        "registers": max(int(kernel.n_regs) for kernel in told),
        "spill_bytes": max(4 * int(kernel.n_spills) for kernel in told),  # Triton counts words
        "shared_bytes": max(int(kernel.metadata.shared) for kernel in told),
        "num_warps": max(int(kernel.metadata.num_warps) for kernel in told),
    }


def _kept(cache: OrderedDict[str, T], limit: int, key: str, make: Callable[[], T]) -> T:
    if key not in cache:
        while len(cache) >= limit:
            cache.popitem(last=False)  # before the new one is made: both may not fit
        cache[key] = make()
    cache.move_to_end(key)
    return cache[key]


def _key(spec: KernelSpec, problem: Problem) -> str:
    return canonical_json([spec.family, problem.to_dict()])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:REASON_CHARS]
