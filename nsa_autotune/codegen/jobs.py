"""What compiling processes are asked and answer, and the order in which jobs wait for them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..spec import Config, canonical_json
from .compile import Resources

__all__ = ["CompileJob", "CompileOutcome", "WaitingJobs"]


@dataclass(frozen=True)
class CompileJob:
    """One variant to compile, in plain values that cross a process boundary."""

    family: str
    problem: dict[str, Any]
    config: Config
    expected_ms: float | None = field(default=None, compare=False)  # of an earlier compilation

    @property
    def key(self) -> str:
        """Equal for equal jobs."""
        return canonical_json([self.family, self.problem, self.config])


@dataclass(frozen=True)
class CompileOutcome:
    """What became of a job: status is ok, constraint, render, compile, resource, timeout or crash."""

    job: CompileJob
    status: str
    reason: str = ""
    resources: Resources | None = None


@dataclass
class _Family:
    """Jobs of one family, the longest on top, and the time that its compilations took."""

    jobs: list[tuple[float, int, CompileJob]] = field(default_factory=list)  # a heap: -milliseconds, number, job
    compiled: int = 0
    total_ms: float = 0.0

    @property
    def rank(self) -> tuple[float, int]:
        """Of the first job, smaller for what is to be compiled before: a family of which nothing is known leads."""
        _, number, job = self.jobs[0]
        mean_ms = self.total_ms / self.compiled if self.compiled else inf
        return -(mean_ms if job.expected_ms is None else job.expected_ms), number


class WaitingJobs:
    """Jobs as they are to be compiled: those that take long first, else a long one alone would make the end.

    Where a job does not tell what it took before, its family's mean counts: they differ 20-fold. Equals stay in order.
    """

    def __init__(self) -> None:
        self._again: deque[CompileJob] = deque()  # ahead of all
        self._families: dict[str, _Family] = {}
        self._submitted = 0

    def __len__(self) -> int:
        return len(self._again) + sum(len(family.jobs) for family in self._families.values())

    def extend(self, jobs: Iterable[CompileJob]) -> None:
        """Queue them."""
        for job in jobs:
            expected_ms = inf if job.expected_ms is None else job.expected_ms
            heapq.heappush(self._family(job).jobs, (-expected_ms, self._submitted, job))
            self._submitted += 1

    def put_back(self, jobs: Iterable[CompileJob]) -> None:
        """Jobs that were taken and came back without an outcome: they are next, in this order."""
        self._again.extendleft(reversed([*jobs]))

    def take(self) -> CompileJob:
        """The next job; IndexError if none waits."""
        if self._again:
            return self._again.popleft()
        waiting = [family for family in self._families.values() if family.jobs]
        if not waiting:
            raise IndexError("no job waits")
        return heapq.heappop(min(waiting, key=lambda family: family.rank).jobs)[2]

    def learn(self, outcome: CompileOutcome) -> None:
        """Note how long a compilation took; one that failed tells nothing of those that work."""
        if outcome.resources is not None:
            family = self._family(outcome.job)
            family.compiled += 1
            family.total_ms += outcome.resources.compile_ms

    def clear(self) -> None:
        """Forget the jobs, not the times."""
        self._again.clear()
        for family in self._families.values():
            family.jobs.clear()

    def _family(self, job: CompileJob) -> _Family:
        return self._families.setdefault(job.family, _Family())
