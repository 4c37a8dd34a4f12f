"""Compile configs while others are measured: what is measured next then lies in Triton's cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..bench.result import TrialResult
from ..codegen.pool import CompileJob, CompileOutcome, CompilePool
from ..codegen.target import SHARED_LIMITS_BYTES, target_of_capability
from ..kernels import all_specs
from ..spec import Config, KernelSpec, Problem

MAX_SPILL_BYTES = 512  # a thread; more was never near the best
TIMEOUT_S = 90.0  # of a compilation
AHEAD = 3  # configs under way for each compiling process
LEAST_ASIDE = 8  # processes, of which some are idle while a GPU measures


@dataclass(frozen=True)
class Prepared:
    """A config that is ready to be measured, or why it need not be."""

    config: Config
    failure: TrialResult | None = None
    code: str = ""  # equal for configs that run the same machine code on the same grid; empty if it is not known
    resources: dict[str, Any] = field(default_factory=dict)  # what the compiler told, programs of the grid included


class Preparer(Protocol):
    """Gets configs ready to be measured, several at a time."""

    ahead: int  # configs worth having under way
    aside: int  # more configs that it can compile at a time for nothing, and tell the resources of; 0 if none

    def submit(self, spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> None:
        """Begin with them."""

    def take(self) -> list[Prepared]:
        """Those that are done, in any order; waits for one if there is none. Only after `submit`."""

    def cancel(self) -> None:
        """Forget what is under way."""


class Unprepared:
    """Hands configs on as they come: the measuring process compiles them."""

    ahead = 1
    aside = 0

    def __init__(self) -> None:
        self._queue: deque[Config] = deque()

    def submit(self, spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> None:
        """Queue them."""
        self._queue.extend(configs)

    def take(self) -> list[Prepared]:
        """The first of the queue."""
        return [Prepared(self._queue.popleft())]

    def cancel(self) -> None:
        """Empty the queue."""
        self._queue.clear()


class CompileAhead:
    """Compiles for the GPU that measures, in child processes of which none touches it; a context that ends them."""

    def __init__(self, target: str, processes: int) -> None:
        self.ahead = AHEAD * max(1, processes)
        self.aside = processes // 2 if processes >= LEAST_ASIDE else 0  # the others are for what is measured next
        self._pool = CompilePool(dict(all_specs()), target, max(1, processes), TIMEOUT_S)
        self._under_way: set[str] = set()

    def submit(self, spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> None:
        """Queue them behind what is being compiled."""
        jobs = [CompileJob(spec.family, problem.to_dict(), config) for config in configs]
        self._under_way |= {job.key for job in jobs}
        self._pool.submit(jobs)

    def take(self) -> list[Prepared]:
        """What compiled or failed to; what was cancelled meanwhile is left out."""
        found: list[Prepared] = []
        while self._under_way and not found:
            outcomes = [outcome for outcome in self._pool.wait() if outcome.job.key in self._under_way]
            self._under_way -= {outcome.job.key for outcome in outcomes}
            found += [prepared(outcome) for outcome in outcomes]
        return found

    def cancel(self) -> None:
        """Drop the queue; what is being compiled ends and is ignored."""
        self._pool.cancel()
        self._under_way.clear()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()


def prepared(outcome: CompileOutcome) -> Prepared:
    """What a compilation means for the measurement."""
    config, resources = outcome.job.config, outcome.resources
    if outcome.status != "ok" or resources is None:
        return Prepared(config, TrialResult(outcome.status, outcome.reason))  # type: ignore[arg-type]
    told = resources.to_dict()
    if resources.spill_bytes > MAX_SPILL_BYTES:
        reason = f"{resources.spill_bytes} bytes of registers spill a thread, over {MAX_SPILL_BYTES}"
        return Prepared(config, TrialResult("resource", reason), resources=told)
    return Prepared(config, code=code_of(told), resources=told)


def code_of(told: Mapping[str, Any]) -> str:
    """Identity of machine code and calls from what a compiler told; empty unless both are known."""
    binary, calls = told.get("binary_sha"), told.get("call_sha")
    return f"{binary} {calls}" if binary and calls else ""


def compile_ahead(capability: str, processes: int) -> AbstractContextManager[Preparer]:
    """For a GPU of this capability ("9.0"); compiles nothing where one core or an unknown target makes it pointless."""
    target = target_of_capability(capability)
    useful = processes > 1 and target in SHARED_LIMITS_BYTES
    return CompileAhead(target, processes) if useful else nullcontext(Unprepared())
