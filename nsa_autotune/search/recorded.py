"""Recorded spaces: what a database or an export knows of a problem on one GPU, as a family of the recorded configs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from ..bench.result import TrialResult
from ..db.records import TrialRecord
from ..errors import InvalidInput
from ..spec import Config, Constraint, KernelSpec, Param, Problem, canonical_json
from .progress import WORKED
from .space import SCAN_LIMIT, ConfigSpace, config_key

PROGRAMS = "num_programs"  # of resources; 0 where it is not known
LEAST_WORKING = 16  # configs of a space that is worth a search


@dataclass(frozen=True)
class Recorded:
    """All that is known of one config: samples of every measurement that worked, or the newest failure."""

    config: Config
    result: TrialResult

    @property
    def median_us(self) -> float | None:
        """Median of all samples, None for a failure."""
        return self.result.median_us


@dataclass(frozen=True)
class RecordedSpace:
    """The measured configs of one problem on one fingerprint with one template; `spec` allows no others."""

    spec: KernelSpec
    family: KernelSpec  # the whole family, what is not recorded included
    problem: Problem
    fingerprint: dict[str, str]
    template_digest: str
    configs: Mapping[str, Recorded]  # by config key
    records: tuple[TrialRecord, ...]

    @cached_property
    def working(self) -> dict[str, float]:
        """Medians in us by config key, of the configs that worked."""
        return {key: found.median_us for key, found in self.configs.items() if found.median_us is not None}

    @property
    def best_us(self) -> float:
        """The fastest recorded median."""
        return min(self.working.values())


def spaces_of(records: Iterable[TrialRecord], specs: Mapping[str, KernelSpec]) -> tuple[list[RecordedSpace], list[str]]:
    """The spaces that records hold, and a sentence for each that cannot be replayed."""
    groups: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
    for record in records:
        if record.kind == "measured" and record.provider == "template" and record.family in specs:
            exact = specs[record.family].problem_key(Problem.from_dict(record.problem), bucket=False)
            groups[record.family, canonical_json([exact, record.fingerprint, record.template_digest])].append(record)
    found, refused = [], []
    for (family, _), group in sorted(groups.items()):
        try:
            found.append(make_space(specs[family], group))
        except InvalidInput as error:
            refused.append(f"{family}: {error}")
    return found, refused


def make_space(spec: KernelSpec, records: Sequence[TrialRecord]) -> RecordedSpace:
    """The space of one problem's records; InvalidInput if too little works, or not the default config.

    Records of before a parameter came are read as if they said its former value.
    """
    problem, first = Problem.from_dict(records[0].problem), records[0]
    records = [replace(record, config=spec.completed(record.config)) for record in records]
    by_config: dict[str, list[TrialRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.created):
        if spec.broken_constraint(problem, record.config) is None:
            by_config[config_key(record.config)].append(record)
    configs = {key: Recorded(found[0].config, merge_trials(found)) for key, found in by_config.items()}
    values = {"problem": spec.problem_key(problem), "gpu": first.fingerprint["gpu"], "configs": len(configs)}
    if sum(found.result.ok for found in configs.values()) < LEAST_WORKING:
        rule = f"a recorded space needs {LEAST_WORKING} configs that work"
        raise InvalidInput(rule, values, "Record more with `nsa-autotune tune --budget full`.")
    default = configs.get(config_key(spec.default_config(problem)))
    if default is None or not default.result.ok:
        raise InvalidInput("a recorded space needs its default config", values, "Record it with `nsa-autotune tune`.")
    return RecordedSpace(
        spec=restrict(spec, problem, [found.config for found in configs.values()]),
        family=spec,
        problem=problem,
        fingerprint=dict(first.fingerprint),
        template_digest=first.template_digest,
        configs=configs,
        records=tuple(records),
    )


def merge_trials(trials: Sequence[TrialRecord]) -> TrialResult:
    """One result of several trials of a config, oldest first: all samples together, else the newest failure."""
    samples = tuple(sample for trial in trials if trial.status in WORKED for sample in _samples(trial))
    resources = merge_resources(trials)
    if not samples:
        newest = trials[-1]
        status = "runtime" if newest.status == "ok" else newest.status  # without a sample nothing was measured
        return TrialResult(status, newest.reason, resources=resources)  # type: ignore[arg-type]
    return TrialResult("ok", samples_us=samples, median_us=median(samples), resources=resources)


def merge_resources(trials: Iterable[TrialRecord]) -> dict[str, Any] | None:
    """What any trial of a config tells, the newest counting most: a race does not know the number of programs."""
    found: dict[str, Any] = {}
    for trial in trials:
        told = trial.resources or {}
        found |= {name: value for name, value in told.items() if name != PROGRAMS or value}
    return found or None


def _samples(trial: TrialRecord) -> tuple[float, ...]:
    if trial.samples_us:
        return trial.samples_us
    return (trial.median_us,) if trial.median_us is not None else ()


def restrict(spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> KernelSpec:
    """The family with these configs as its only legal ones, and only their values as values.

    A space that was recorded whole needs no list: it is searched as on a GPU, but for the reserve of its parameters.
    Recorded configs from there are judged and count for the best, but are not found.
    """
    keys = frozenset(map(config_key, configs))
    usual = ConfigSpace(replace(spec, params=tuple(replace(param, reserve=()) for param in spec.params)), problem)
    if usual.num_points <= SCAN_LIMIT and all(config_key(config) in keys for config in usual.configs()):
        return usual.spec
    seen = {param.name: {canonical_json(config[param.name]) for config in configs} for param in spec.params}
    params = tuple(_with_values(param, seen[param.name]) for param in spec.params)
    recorded = Constraint("the config must have been recorded", lambda _problem, config: config_key(config) in keys)
    return replace(spec, params=params, constraints=(recorded, *spec.constraints), only=tuple(configs))


def _with_values(param: Param, seen: set[str]) -> Param:
    return replace(param, values=tuple(v for v in param.widest if canonical_json(v) in seen), reserve=())
