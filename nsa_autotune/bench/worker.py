"""MeasureWorker: trials in a child process, so that a variant that crashes, hangs or corrupts costs only itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import WorkerError
from ..spec import DEFAULT_POLICY, Config, Problem, canonical_json
from .policy import get_policy
from .process import ChildGone, ChildProcess, ChildSilent
from .result import Status, TrialResult
from .session import TOOLCHAIN

MAX_CRASHES = 2  # of one variant
MEASURE_ROUNDS, MEASURE_TARGET_MS = 5, 60.0  # a coarse time, of one variant alone
RACE_ROUNDS, RACE_TARGET_MS = 60, 400.0
STARTUP_S = 300.0  # importing torch from a cold network disk


class MeasureWorker:
    """Measures variants on one device in a child process that is replaced whenever it dies, hangs or loses its context.

    `timeout_s` bounds the silence of the child, which speaks before each stage of each config. A variant that crashed
    twice or hung once is not tried again. One thread at a time; the child ends with the thread that started it.
    """

    def __init__(
        self,
        device: str = "cuda:0",
        timeout_s: float = 120.0,
        *,
        policy: str = DEFAULT_POLICY,
        env: Mapping[str, str] | None = None,
        toolchain: str = TOOLCHAIN,
    ) -> None:
        self.device, self.timeout_s, self.policy = device, timeout_s, get_policy(policy).name
        self._toolchain, self._env = toolchain, child_environment(os.environ, device, env or {})
        self._child: ChildProcess | None = None
        self._crashes: Counter[str] = Counter()
        self._last_words: dict[str, TrialResult] = {}

    def __enter__(self) -> MeasureWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def child_pid(self) -> int | None:
        """Process id of the living child."""
        return None if self._child is None else self._child.pid

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
            decided = self._ask({**request, "problem": problem.to_dict()}, [names[index] for index in open_])
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
            decided = self._ask(request, [name])
            self.close()
            if decided:
                return decided[0]
        return self._last_words[name]

    def renew(self) -> None:
        """Measure in a new process from now on."""
        self.close()

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _ask(self, request: Mapping[str, Any], names: list[str]) -> dict[int, TrialResult]:
        """Results by position of the variants that the child decided; a crash counts against the one it worked on."""
        at, stage = 0, "start"
        try:
            child = self._living()
            child.send(request)
            while True:
                message = child.receive(self.timeout_s)
                if "results" in message:
                    break
                at, stage = int(message["at"]), str(message["stage"])
            if message["lost"]:
                self.close()
        except (ChildGone, ChildSilent) as error:
            self.close()
            hung = isinstance(error, ChildSilent)
            status: Status = "timeout" if hung else "crash"
            self._crashes[names[at]] += MAX_CRASHES if hung else 1
            self._last_words[names[at]] = TrialResult(status, f"In stage '{stage}': {error}.")
            return {}
        except BaseException:  # Ctrl-C above all: a child that is left in the middle of a request serves no other
            self.close()
            raise
        found = message["results"]
        return {i: TrialResult.from_dict(result) for i, result in enumerate(found) if result is not None}

    def _living(self) -> ChildProcess:
        if self._child is None:
            arguments = ["--device", self.device, "--toolchain", self._toolchain]
            child = self._child = ChildProcess("nsa_autotune.bench.worker_main", arguments, self._env)
            try:
                child.receive(STARTUP_S)
            except (ChildGone, ChildSilent) as error:
                self.close()
                raise WorkerError(
                    "a measuring process must start", {"device": self.device}, f"It said: {error}"
                ) from error
        return self._child


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
