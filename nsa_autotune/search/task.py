"""One problem of one family on one fingerprint: its keys, its records, and what the database already knows about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..bench.result import TrialResult
from ..db.records import TrialRecord, WinnerRecord
from ..db.store import TuningStore
from ..spec import DEFAULT_POLICY, Config, KernelSpec, Problem, digest
from .certify import Verdict
from .correction import Correction, fit
from .ranking import rank_predictions
from .space import ConfigSpace, config_key

NEAR_WINNERS = 4  # winners of neighbouring problems that are tried first
PREDICTED_SEEDS = 16  # best predictions that are tried first
CORRECTING_TRIALS = 6_000  # the newest of a family, that its cost model learns from


@dataclass(frozen=True)
class Task:
    """What every record of one tuning run has in common."""

    spec: KernelSpec
    problem: Problem
    fingerprint: dict[str, str]
    template_digest: str
    policy: str = DEFAULT_POLICY  # how times are taken

    @property
    def key(self) -> str:
        """The bucketed key under which winners are stored."""
        return self.spec.problem_key(self.problem)

    @property
    def space(self) -> ConfigSpace:
        """The configs that may serve the problem."""
        return ConfigSpace(self.spec, self.problem)

    def filters(self) -> dict[str, Any]:
        """What the store is asked by: records of this problem's bucket, fingerprint, template and policy."""
        return {
            "family": self.spec.family,
            "fingerprint_digest": digest(self.fingerprint),
            "problem_key": self.key,
            "template_digest": self.template_digest,
            "policy": self.policy,
        }

    def _shared(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "family": self.spec.family,
            "problem": self.problem.to_dict(),
            "problem_key": self.key,
            "policy": self.policy,
        }

    def trial(self, config: Config, result: TrialResult, stage: str) -> TrialRecord:
        """The record of a measurement of one of our configs."""
        return TrialRecord(
            **self._shared(),
            config=dict(config),
            template_digest=self.template_digest,
            stage=stage,
            **_measured(result),
        )

    def baseline(self, result: TrialResult) -> TrialRecord:
        """The record of a measurement of the family's library."""
        return TrialRecord(
            **self._shared(),
            config={},
            template_digest="",
            provider=self.spec.library,
            stage="baseline",
            **_measured(result),
        )

    def prediction(
        self, config: Config, status: str, reason: str, resources: dict[str, Any] | None, predicted_us: float | None
    ) -> TrialRecord:
        """The record of a config that was compiled for an absent GPU."""
        return TrialRecord(
            **self._shared(),
            config=dict(config),
            template_digest=self.template_digest,
            kind="predicted",
            status=status,
            reason=reason,
            resources=resources,
            predicted_us=predicted_us,
        )

    def winner(
        self, verdict: Verdict, outcome: str, *, default_us: float | None, library_us: float | None
    ) -> WinnerRecord:
        """The record of a winner with the evidence of its races; medians of the default and the library beside it."""
        result = verdict.result
        assert result.median_us is not None and result.p20_us is not None and result.p80_us is not None
        return WinnerRecord(
            **self._shared(),
            config=dict(verdict.config),
            template_digest=self.template_digest,
            median_us=result.median_us,
            p20_us=result.p20_us,
            p80_us=result.p80_us,
            samples_us=result.samples_us,
            default_config=dict(self.spec.default_config(self.problem)),
            default_median_us=default_us,
            library=self.spec.library if library_us is not None else "",
            library_median_us=library_us,
            verdict=outcome,
            rivals=verdict.rivals,
            resources=result.resources,
        )


def _measured(result: TrialResult) -> dict[str, Any]:
    return {
        "status": result.status,
        "reason": result.reason,
        "samples_us": result.samples_us,
        "median_us": result.median_us,
        "p20_us": result.p20_us,
        "p80_us": result.p80_us,
        "resources": result.resources,
        "max_error": result.max_error,
        "baseline_error": result.baseline_error,
        "environment": result.environment,
    }


def result_of(record: TrialRecord) -> TrialResult:
    """The measurement that a stored trial was made from."""
    names = ("reason", "samples_us", "median_us", "p20_us", "p80_us", "max_error", "baseline_error", "resources")
    values = {name: getattr(record, name) for name in (*names, "environment")}
    return TrialResult(record.status, **values)  # type: ignore[arg-type]  # one list of statuses serves both


def known_winner(store: TuningStore, task: Task) -> WinnerRecord | None:
    """The winner of exactly this key, fingerprint, template and policy, if there is one."""
    found = store.winners(**task.filters())
    return found[0] if found else None


def known_trials(store: TuningStore, task: Task, kind: str = "measured") -> list[TrialRecord]:
    """Earlier search trials of the same problem to the token, newest first: a bucket's lengths differ in time."""
    exact = task.spec.problem_key(task.problem, bucket=False)
    found = store.trials(**task.filters(), kind=kind, stage="search", provider="template")
    return [t for t in found if task.spec.problem_key(Problem.from_dict(t.problem), bucket=False) == exact]


def seed_configs(store: TuningStore, task: Task, limit: int) -> list[Config]:
    """Configs to try first, at most `limit`: the default, winners near by and elsewhere, the best predictions."""
    found = {config_key(config): config for config in _candidates(store, task) if task.space.is_legal(config)}
    return list(found.values())[:limit]


def _candidates(store: TuningStore, task: Task) -> Iterator[Config]:
    yield task.spec.default_config(task.problem)
    winners = sorted(store.winners(family=task.spec.family), key=lambda w: _winner_distance(task, w))
    yield from (task.spec.completed(winner.config) for winner in winners[:NEAR_WINNERS])
    predicted = store.trials(
        family=task.spec.family, problem_key=task.key, template_digest=task.template_digest, kind="predicted"
    )
    alike = [t for t in predicted if t.fingerprint["capability"] == task.fingerprint["capability"]]
    ranked = rank_predictions(alike, known_correction(store, task.spec).guess_of) if alike else []
    yield from (prediction.config for prediction in ranked[:PREDICTED_SEEDS])


def known_correction(store: TuningStore, spec: KernelSpec) -> Correction:
    """The family's cost model as the newest measurements correct it, on every problem and GPU."""
    return fit(spec, store.trials(family=spec.family, status="ok", provider="template", limit=CORRECTING_TRIALS))


def _winner_distance(task: Task, winner: WinnerRecord) -> float:
    """How far a winner is from the task: its problem's distance, and 1 each for another GPU and architecture."""
    there = winner.fingerprint
    elsewhere = sum(there[name] != task.fingerprint.get(name) for name in ("gpu", "capability"))
    return problem_distance(task.spec, task.problem, Problem.from_dict(winner.problem)) + elsewhere


def problem_distance(spec: KernelSpec, a: Problem, b: Problem) -> float:
    """Sum over the family's fields: doublings between numbers, 1 for other values that differ, locality as it is."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in spec.problem_fields]
    pairs += [(getattr(a.nsa, name), getattr(b.nsa, name)) for name in spec.nsa_fields]
    return sum(_apart(x, y) for x, y in pairs)


def _apart(x: object, y: object) -> float:
    if isinstance(x, int) and isinstance(y, int) and x > 0 and y > 0:
        return abs(math.log2(x / y))
    if isinstance(x, float) and isinstance(y, float):
        return abs(x - y)
    return float(x != y)
