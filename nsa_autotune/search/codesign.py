"""Search the constants of NSA on two objectives, latency and what is lost of dense attention; keep every design."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from ..bench.quality import Quality
from ..db.designs import DesignRecord
from ..db.store import TuningStore
from ..errors import NoConfigWorks
from ..spec import Problem, digest
from .budget import Budget, Meter
from .designs import DIMENSIONS, Choices, Design, design_of
from .pareto import Point, pareto_front
from .study import quiet_optuna

MAX_ASKS = 8  # proposals of the sampler that may turn out known or illegal before chance decides
STARTUP_DESIGNS = 8  # before the sampler trusts what it learned
Objective = Literal["mass", "output"]


class CodesignProgress(Protocol):
    """Hears of one design at a time."""

    def begin(self, design: Design, number: int, total: int) -> None: ...

    def done(self, record: DesignRecord) -> None: ...

    def failed(self, design: Design, error: NoConfigWorks) -> None: ...


@dataclass(frozen=True)
class Study:
    """What is searched, and how a design is judged."""

    base: Problem  # its constants are those that are not searched
    choices: Choices
    designs: Sequence[Design]  # the legal ones
    facts: Mapping[str, Any]  # JSON: everything that the numbers depend on besides machine and design
    fingerprint: Mapping[str, str]
    kind: str  # measured or predicted
    objective: Objective

    def loss(self, record: DesignRecord) -> float:
        """What the second objective makes small."""
        return 1.0 - record.mass_kept if self.objective == "mass" else record.output_error

    def point(self, record: DesignRecord) -> Point:
        """Both objectives."""
        return record.latency_us, self.loss(record)

    def stored(self, store: TuningStore) -> list[DesignRecord]:
        """What earlier calls found of the designs that are searched."""
        found = store.designs(study_digest=digest(dict(self.facts)), fingerprint_digest=digest(dict(self.fingerprint)))
        wanted = set(self.designs)
        fixed = [name for name in self.base.nsa.to_dict() if name not in DIMENSIONS]
        return [
            record
            for record in found
            if design_of(record.config, record.group_size) in wanted
            and all(record.nsa[name] == getattr(self.base.nsa, name) for name in fixed)
        ]

    def front(self, records: Sequence[DesignRecord]) -> list[DesignRecord]:
        """The records that no other beats in both objectives, fastest first."""
        return [records[index] for index in pareto_front([self.point(record) for record in records])]


def codesign(
    study: Study,
    *,
    quality: Callable[[Design], Quality],
    latency: Callable[[Problem], Mapping[str, float]],
    store: TuningStore,
    budget: Budget,
    progress: CodesignProgress,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> list[DesignRecord]:
    """Evaluate designs until `budget` (designs, and minutes after which none begins) or the space is exhausted.

    Each design is stored at once; those of earlier calls are known and count. A design without a working kernel is
    told to `progress` and left out.
    """
    records = study.stored(store)
    meter = Meter(budget, len(records), clock)
    search = DesignSearch(study, exhaustive=len(study.designs) <= (budget.max_trials or 0), seed=seed)
    for record in records:
        search.record(design_of(record.config, record.group_size), study.point(record))
    total = min(budget.max_trials or len(study.designs), len(study.designs))
    while not meter.exhausted and (design := search.propose()) is not None:
        meter.trials += 1
        progress.begin(design, meter.trials, total)
        try:
            found = evaluate(study, design, quality, latency)
        except NoConfigWorks as error:
            search.record(design, None)
            progress.failed(design, error)
            continue
        store.add_design(found)
        records.append(found)
        search.record(design, study.point(found))
        progress.done(found)
    return records


def evaluate(
    study: Study,
    design: Design,
    quality: Callable[[Design], Quality],
    latency: Callable[[Problem], Mapping[str, float]],
) -> DesignRecord:
    """Both objectives of one design; NoConfigWorks if a kernel of it does not work."""
    problem = design.problem(study.base)
    kept, parts = quality(design), dict(latency(problem))
    return DesignRecord(
        fingerprint=dict(study.fingerprint),
        study=dict(study.facts),
        nsa=problem.nsa.to_dict(),
        group_size=design.group_size,
        latency_us=sum(parts.values()),
        parts=parts,
        mass_kept=kept.mass_kept,
        mass_kept_p10=kept.mass_kept_p10,
        output_error=kept.output_error,
        locality=kept.locality,
        kind=study.kind,
    )


class DesignSearch:
    """Proposes legal designs, none twice: the base, both extremes, then Optuna's TPE, or all if `exhaustive`."""

    def __init__(self, study: Study, *, exhaustive: bool, seed: int = 0) -> None:
        self._choices, self._designs = study.choices, tuple(sorted(study.designs))
        self._legal, self._seen = set(self._designs), set[Design]()
        self._rng = random.Random(seed)
        self._queue = deque(design for design in self._first(study) if design in self._legal)
        if exhaustive:
            self._queue.extend(self._rng.sample(self._designs, len(self._designs)))
        self._asked: dict[Design, Trial] = {}
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) for name, values in study.choices.items() if len(values) > 1
        }
        with quiet_optuna():
            sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=STARTUP_DESIGNS, seed=seed)
            self._study = optuna.create_study(directions=("minimize", "minimize"), sampler=sampler)

    def _first(self, study: Study) -> Iterable[Design]:
        yield design_of(study.base.nsa, study.base.group_size)
        reach = sorted(self._designs, key=lambda d: (d["num_selected"] * d["select_block_size"], d["window_size"]))
        yield from (reach[0], reach[-1])  # the fewest and the most keys that a query sees

    def propose(self) -> Design | None:
        """A design that was neither proposed nor recorded; None if none is left."""
        while self._queue:
            design = self._queue.popleft()
            if design not in self._seen:
                self._seen.add(design)
                return design
        if len(self._seen) == len(self._designs):
            return None
        design = self._ask() or self._rng.choice([d for d in self._designs if d not in self._seen])
        self._seen.add(design)
        return design

    def record(self, design: Design, point: Point | None) -> None:
        """Learn both objectives of a design; None if it does not work."""
        self._seen.add(design)
        trial = self._asked.pop(design, None)
        with quiet_optuna():
            if trial is not None:
                state = TrialState.COMPLETE if point is not None else TrialState.FAIL
                self._study.tell(trial, point, state=state)
            elif point is not None:
                params = {name: self._choices[name].index(design[name]) for name in self._distributions}
                self._study.add_trial(
                    optuna.trial.create_trial(params=params, distributions=self._distributions, values=point)
                )

    def _ask(self) -> Design | None:
        """The sampler's proposal, None if it has nothing new that is legal."""
        refused: list[Trial] = []
        with quiet_optuna():
            try:
                for _ in range(MAX_ASKS):
                    trial = self._study.ask(self._distributions)
                    chosen = {name: self._choices[name][trial.params.get(name, 0)] for name in DIMENSIONS}
                    design = Design(tuple(chosen[name] for name in DIMENSIONS))
                    if design in self._legal and design not in self._seen:
                        self._asked[design] = trial
                        return design
                    refused.append(trial)
            finally:
                for trial in refused:
                    self._study.tell(trial, state=TrialState.FAIL)
        return None
