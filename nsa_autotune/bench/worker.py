"""MeasureWorker: trials in a child process, so that a variant that crashes, hangs or corrupts costs only itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..spec import DEFAULT_POLICY, Config, Problem, canonical_json
from .children import Children
from .journal import Journal
from .patience import LAUNCH_S, Patience
from .policy import get_policy
from .process import ChildGone, ChildProcess, ChildSilent, nonsense
from .result import TrialResult
from .session import TOOLCHAIN

MAX_CRASHES = 2  # of one variant
MEASURE_ROUNDS, MEASURE_TARGET_MS = 5, 60.0  # a coarse time, of one variant alone
RACE_ROUNDS, RACE_TARGET_MS = 60, 400.0


class MeasureWorker:
    """Measures variants on one device in a child process that is replaced whenever it dies, hangs or loses its context.

    `timeout_s` bounds the silence of the child, which speaks before each stage of each config; `launch_s` bounds it
    while a kernel runs that is expected to take less than a 50th of it (2 s on a GPU; the CPU's interpreter has all of
    `timeout_s`). A variant that crashed twice or hung once is not tried again. `standby` keeps a second child ready.
    What is asked is written to `journal`. WorkerError says that the device is lost; results until then are right.
    One thread at a time; the children end with the thread that started them.
    """

    def __init__(
        self,
        device: str = "cuda:0",
        timeout_s: float = 120.0,
        *,
        policy: str = DEFAULT_POLICY,
        launch_s: float | None = None,
        standby: bool | None = None,
        journal: Journal | None = None,
        env: Mapping[str, str] | None = None,
        toolchain: str = TOOLCHAIN,
    ) -> None:
        on_gpu = device != "cpu"
        self.device, self.timeout_s, self.policy = device, timeout_s, get_policy(policy).name
        self.launch_s = launch_s if launch_s is not None else LAUNCH_S if on_gpu else timeout_s
        self._journal = journal
        self._children = Children(
            device,
            toolchain,
            "" if journal is None else str(journal.path),
            child_environment(os.environ, device, env or {}),
            standby=on_gpu if standby is None else standby,
        )
        self._crashes: Counter[str] = Counter()
        self._last_words: dict[str, TrialResult] = {}
        self._fastest_us: dict[str, float] = {}  # by family and problem

    def __enter__(self) -> MeasureWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def child_pid(self) -> int | None:
        """Process id of the living child."""
        return self._children.pid

    @property
    def standby_pid(self) -> int | None:
        """Process id of the child that waits to replace it."""
        return self._children.standby_pid

    def measure(self, family: str, problem: Problem, config: Config, rounds: int = MEASURE_ROUNDS) -> TrialResult:
        """Gate and time one config, coarsely; every failure is a result."""
        return self.race(family, problem, [config], rounds, target_ms=MEASURE_TARGET_MS)[0]

    def race(
        self,
        family: str,
        problem: Problem,
        configs: Sequence[Config],
        rounds: int = RACE_ROUNDS,
        *,
        sentinel: int | None = None,
        target_ms: float = RACE_TARGET_MS,
    ) -> list[TrialResult]:
        """Gate several configs and time those that pass, interleaved in one process; one result a config, in order.

        `sentinel` is the index of the config whose time watches for drift, see `bench.race`.
        """
        timed = {"policy": self.policy, "target_ms": target_ms, "rounds": rounds}
        names = [canonical_json([family, problem.to_dict(), config]) for config in configs]
        work = canonical_json([family, problem.to_dict()])
        results: dict[int, TrialResult] = {}
        while True:
            open_ = []
            for index, name in enumerate(names):
                if index not in results and self._crashes[name] >= MAX_CRASHES:
                    results[index] = self._last_words[name]
                if index not in results:
                    open_.append(index)
            if not open_:
                return [results[index] for index in range(len(configs))]
            request = {"family": family, "configs": [configs[index] for index in open_], **timed}
            request["sentinel"] = open_.index(sentinel) if sentinel in open_ else None
            decided = self._ask({**request, "problem": problem.to_dict()}, work, [names[index] for index in open_])
            results.update({open_[position]: result for position, result in decided.items()})

    def measure_library(self, provider: str, problem: Problem, rounds: int = RACE_ROUNDS) -> TrialResult:
        """Time a library on a problem; "constraint" with the reason if it cannot serve it.

        The child ends with it: torch.compile points Triton at another assembler and cache, and no kernel of ours may be
        compiled there afterwards (seen on an H200: the same variant took 168 instead of 173 registers, and 0.78 of the
        time).
        """
        name = canonical_json([provider, problem.to_dict()])
        request = {"provider": provider, "problem": problem.to_dict(), "rounds": rounds, "policy": self.policy}
        request |= {"target_ms": RACE_TARGET_MS, "sentinel": None}
        while self._crashes[name] < MAX_CRASHES:
            decided = self._ask(request, name, [name])
            self._children.discard()
            if decided:
                return decided[0]
        return self._last_words[name]

    def renew(self) -> None:
        """Measure in a new process from now on."""
        self._children.discard()

    def close(self) -> None:
        """End the children."""
        self._children.close()

    def _ask(self, request: Mapping[str, Any], work: str, names: list[str]) -> dict[int, TrialResult]:
        """Results by position of the variants that the child decided; a crash counts against the one it worked on."""
        child = self._children.working()
        self._write(request)
        at, stage = 0, "start"
        try:
            child.send(request)
            patience, allowed_s = Patience(self.timeout_s, self.launch_s), self.timeout_s
            while "results" not in (message := self._hear(child, allowed_s)):
                at, stage, expected_us = _progress(message, len(names))
                allowed_s = patience.seconds(stage, self._fastest_us.get(work, expected_us))
            found = _results(message, len(names))
            if message.get("lost") is True:
                self._children.discard()
        except (ChildGone, ChildSilent) as error:
            self._blame(names[at], stage, error)
            self._children.discard()
            found = {}
        except BaseException:  # Ctrl-C above all: a child that is left in the middle of a request serves no other
            self._children.discard()
            self._answered()
            raise
        if self._children.lost is None or len(names) == 1:  # else nobody gets the results: the journal keeps the name
            self._answered()
        self._learn(work, found)
        return found

    def _hear(self, child: ChildProcess, allowed_s: float) -> dict[str, Any]:
        """The child's next word that is not about its journal."""
        while True:
            message = child.receive(allowed_s)
            if "journal" not in message:
                return message
            if self._journal is not None:
                self._journal.warn(str(message["journal"]))

    def _blame(self, name: str, stage: str, error: ChildGone | ChildSilent) -> None:
        hung = isinstance(error, ChildSilent) and not error.state  # a process that somebody stopped did not hang
        self._crashes[name] += MAX_CRASHES if hung else 1
        self._last_words[name] = TrialResult("timeout" if hung else "crash", f"In stage '{stage}': {error}.")

    def _learn(self, work: str, found: Mapping[int, TrialResult]) -> None:
        """Remember the fastest median: what takes 50 times as long counts as hung."""
        times = [result.median_us for result in found.values() if result.ok and result.median_us is not None]
        if times:
            self._fastest_us[work] = min(*times, self._fastest_us.get(work, times[0]))

    def _write(self, request: Mapping[str, Any]) -> None:
        if self._journal is not None:
            provider = str(request.get("provider", ""))
            configs = request.get("configs", [{}])
            self._journal.ask(str(request.get("family", provider)), request["problem"], configs, provider)

    def _answered(self) -> None:
        if self._journal is not None:
            self._journal.answered()


def _progress(message: Mapping[str, Any], count: int) -> tuple[int, str, float]:
    """Which variant of the request enters which stage, and how many microseconds a launch of it may take."""
    try:
        at, stage, expected_us = int(message["at"]), str(message["stage"]), float(message["expected_us"])
    except (KeyError, TypeError, ValueError) as error:
        raise nonsense(message) from error
    if not 0 <= at < count:
        raise nonsense(message)
    return at, stage, expected_us


def _results(message: Mapping[str, Any], count: int) -> dict[int, TrialResult]:
    """The results of a request by position, those left undecided aside."""
    try:
        found = list(message["results"])
        results = {i: TrialResult.from_dict(result) for i, result in enumerate(found) if result is not None}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise nonsense(message) from error
    if len(found) != count:
        raise nonsense(message)
    return results


def child_environment(parent: Mapping[str, str], device: str, changes: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: this package importable, and Triton's interpreter on the CPU only."""
    env = {**parent, **changes}
    paths = [str(Path(__file__).resolve().parents[2]), *env.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    if "TRITON_INTERPRET" not in changes:
        env.pop("TRITON_INTERPRET", None)
        if device == "cpu":
            env["TRITON_INTERPRET"] = "1"
    return env
