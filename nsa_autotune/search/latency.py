"""What a kernel takes once it is tuned: measured on the GPU at hand, or guessed for an absent one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..db.store import TuningStore
from ..errors import NoConfigWorks
from ..spec import KernelSpec, Problem
from .budget import Budget
from .designs import launches
from .predict import predict_problem
from .progress import Progress
from .tuner import Measurer, Preparer, tune_problem


class KernelLatency(Protocol):
    """Times one kernel on one problem."""

    def __call__(self, spec: KernelSpec, problem: Problem) -> float | None:
        """Microseconds of one launch; None if no config works."""


@dataclass(frozen=True)
class Tuned:
    """Tunes what has no winner yet, as `nsa-autotune tune` does, and stores the winner, so that it is served."""

    measurer: Measurer
    store: TuningStore
    fingerprint: dict[str, str]
    budget: Budget  # of one kernel
    progress: Progress | None = None
    preparer: Preparer | None = None

    def __call__(self, spec: KernelSpec, problem: Problem) -> float | None:
        """The winner's median."""
        winner = tune_problem(
            spec,
            problem,
            measurer=self.measurer,
            store=self.store,
            fingerprint=self.fingerprint,
            budget=self.budget,
            progress=self.progress,
            preparer=self.preparer,
        )
        if winner is None:
            return None
        same = spec.problem_key(problem, bucket=False)
        if spec.problem_key(Problem.from_dict(winner.problem), bucket=False) == same:
            return winner.median_us
        # winners are kept by lengths rounded up: this one was timed at another length
        result = self.measurer.race(spec.family, problem, [winner.config])[0]
        return result.median_us if result.ok else None


@dataclass(frozen=True)
class Predicted:
    """Compiles for a GPU that is not there and takes the cost model's word; nothing is measured."""

    target: str
    store: TuningStore
    budget: Budget  # of one kernel
    progress: Progress | None = None
    processes: int | None = None

    def __call__(self, spec: KernelSpec, problem: Problem) -> float | None:
        """The least prediction."""
        ranked = predict_problem(
            spec,
            problem,
            target=self.target,
            store=self.store,
            budget=self.budget,
            progress=self.progress,
            processes=self.processes,
        )
        return ranked[0].predicted_us if ranked else None


@dataclass
class PassLatency:
    """The families of one pass on one design's problem; a kernel that two designs share is timed once."""

    specs: tuple[KernelSpec, ...]
    kernel: KernelLatency
    _known_us: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, problem: Problem) -> dict[str, float]:
        """Microseconds of all launches of each family; raises NoConfigWorks for one of which no config works."""
        return {spec.family: sum(self._launches_us(spec, problem)) for spec in self.specs}

    def _launches_us(self, spec: KernelSpec, problem: Problem) -> Iterable[float]:
        for part, times in launches(spec, problem):
            key = (spec.family, spec.problem_key(part, bucket=False))
            if key not in self._known_us:
                found_us = self.kernel(spec, part)
                if found_us is None:
                    remedy = f"See `nsa-autotune db query --table trials --family {spec.family}`."
                    raise NoConfigWorks(f"{spec.family}: no config works for this design", {"nsa": part.nsa}, remedy)
                self._known_us[key] = found_us
            yield times * self._known_us[key]
