"""The cost model corrected by measurements: ridge regression on log(measured / model), one for each family.

It is learned within each problem and GPU, so that rows of all of them compare, and judged on problems left out. Where
it orders those no better than the plain model, the plain model is used and `note` says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..db.records import TrialRecord
from ..spec import Config, KernelSpec, Problem, canonical_json
from .guess import Compiled, gpu_of, terms_of
from .roofline import GpuModel, Terms
from .space import config_key, is_ordered

Array = NDArray[np.float64]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the squared weights, beside a mean squared error of log-times
LEAST_CONFIGS = 8  # of a problem that is learned from
LEAST_GAIN = 0.06  # of the log-loss on one problem left out, for a correction to be used; less is chance
FIRST = (1, 4, 16)  # how many of a ranking's first configs are looked at when it is judged
LEAST_SHARE = math.exp(-6.0)  # of a term in the slowest one; less makes no difference


@dataclass(frozen=True)
class Group:
    """The measured configs of one problem on one GPU with one template."""

    problem_key: str  # exact to the token: problems are left out by it
    rows: Array  # [configs, features]
    model_us: Array  # [configs]
    time_us: Array  # [configs], measured medians

    @property
    def target(self) -> Array:
        """log(measured / model) without its mean over the group."""
        log_ratio = np.log(self.time_us / self.model_us)
        centred: Array = log_ratio - log_ratio.mean()
        return centred


@dataclass(frozen=True)
class Correction:
    """A family's corrected model; without weights it is the plain model, and `note` says why."""

    spec: KernelSpec
    note: str
    weights: Array | None = None
    low: Array | None = None  # of each feature in the training rows: nothing beyond is extrapolated
    high: Array | None = None
    offset: float = 0.0

    @property
    def is_used(self) -> bool:
        """False if guesses are the plain model's."""
        return self.weights is not None

    def guess_us(
        self, problem: Problem, config: Config, resources: Mapping[str, Any] | None, gpu: GpuModel
    ) -> float | None:
        """Guessed time in us of a compiled variant; None where its resources are not known."""
        found = terms_of(self.spec, problem, config, resources, gpu)
        if found is None:
            return None
        if self.weights is None:
            return found[1].time_us
        row = np.clip(features(self.spec, problem, config, *found), self.low, self.high)
        return found[1].time_us * math.exp(float(row @ self.weights) + self.offset)

    def guess_of(self, record: TrialRecord) -> float | None:
        """`guess_us` of a stored record; None if there is no correction: the record's own guess stands."""
        if not self.is_used:
            return None
        gpu = gpu_of(record.fingerprint)
        if gpu is None:
            return None
        return self.guess_us(Problem.from_dict(record.problem), record.config, record.resources, gpu)


def fit(spec: KernelSpec, records: Iterable[TrialRecord]) -> Correction:
    """The correction that the measured trials of a family support; depends on nothing but its arguments."""
    groups = groups_of(spec, records)
    keys = sorted({group.problem_key for group in groups})
    if len(keys) < 2:
        return Correction(spec, f"the plain model: {len(keys)} measured problems, and 2 are needed to judge another")
    plain = _mean([_loss(group.model_us, group.time_us) for group in groups], groups)
    losses = _held_out_losses(groups, keys)
    best = int(np.argmin(losses))
    told = f"on problems left out it loses {math.expm1(losses[best]):.1%}, the plain model {math.expm1(plain):.1%}"
    by_chance = LEAST_GAIN / math.sqrt(len(keys))  # the best of several penalties looks better than it is
    if losses[best] > plain - by_chance:
        return Correction(spec, f"the plain model: corrected by {len(keys)} problems, {told}")
    weights = _solve(groups)[best]
    rows = np.concatenate([group.rows for group in groups])
    levels = [np.log(group.time_us / group.model_us).mean() - (group.rows @ weights).mean() for group in groups]
    note = f"corrected by {len(rows)} configs of {len(keys)} problems: {told}"
    return Correction(spec, note, weights, rows.min(axis=0), rows.max(axis=0), float(np.mean(levels)))


def groups_of(spec: KernelSpec, records: Iterable[TrialRecord]) -> list[Group]:
    """Measured trials by problem, GPU and template; a config's time is the median of its medians."""
    found: dict[str, dict[str, list[TrialRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        problem = Problem.from_dict(record.problem)
        if _is_measured(record, spec) and spec.broken_constraint(problem, record.config) is None:
            exact = spec.problem_key(problem, bucket=False)
            group = canonical_json([exact, record.fingerprint, record.template_digest])
            found[group][config_key(record.config)].append(record)
    groups = (_group(spec, [found[key][config] for config in sorted(found[key])]) for key in sorted(found))
    return [group for group in groups if group is not None]


def _is_measured(record: TrialRecord, spec: KernelSpec) -> bool:
    ours = record.kind == "measured" and record.provider == "template" and record.family == spec.family
    return ours and record.status == "ok" and bool(record.median_us)


def _group(spec: KernelSpec, configs: Sequence[Sequence[TrialRecord]]) -> Group | None:
    problem, gpu = Problem.from_dict(configs[0][0].problem), gpu_of(configs[0][0].fingerprint)
    if gpu is None:
        return None
    rows, model_us, time_us = [], [], []
    for trials in configs:
        resources = next((trial.resources for trial in trials if trial.resources), None)
        parts = terms_of(spec, problem, trials[0].config, resources, gpu)
        if parts is not None:
            rows.append(features(spec, problem, trials[0].config, *parts))
            model_us.append(parts[1].time_us)
            time_us.append(float(np.median([trial.median_us for trial in trials if trial.median_us])))
    if len(rows) < LEAST_CONFIGS:
        return None
    return Group(spec.problem_key(problem, bucket=False), np.array(rows), np.array(model_us), np.array(time_us))


def features(spec: KernelSpec, problem: Problem, config: Config, compiled: Compiled, terms: Terms) -> Array:
    """What the regression sees of a variant: its parameters, its machine code's demands, the model's terms.

    Parameters also appear as pairs, and crossed with the sizes of the problem. Numbers are base-2 logarithms.
    """
    choices = [
        value for param in spec.params for value in _choices(param.values, config[param.name], is_ordered(param))
    ]
    machine = [
        math.log2(max(1, compiled.registers)),
        math.log2(1 + compiled.shared_bytes / 1024),
        math.log2(1 + compiled.spill_bytes),
        terms.occupancy,
        math.log2(terms.waves) if terms.waves > 0 else 0.0,
        float(terms.waves > 0),
        math.log2(terms.tail_factor),
    ]
    slowest = max(terms.arithmetic_us, terms.memory_us, terms.l2_us)
    times = (terms.arithmetic_us, terms.memory_us, terms.l2_us)
    shares = [math.log2(max(LEAST_SHARE, time_us / slowest)) for time_us in times]
    sizes = [problem.seq_q, problem.seq_k, problem.batch * problem.num_kv_heads, problem.group_size, problem.d_qk]
    scales = [*(math.log2(size) for size in sizes), problem.locality]
    squares = [value * value for value in (*choices, *machine)]
    pairs = [a * b for at, a in enumerate(choices) for b in choices[:at]]
    crossed = [choice * scale for choice in choices for scale in scales]
    return np.array([*choices, *machine, *shares, *squares, *pairs, *crossed])


def _choices(values: Sequence[Any], value: Any, ordered: bool) -> list[float]:
    """A parameter as numbers: its logarithm, and whether it is 0 where that means `off`; a switch one-hot."""
    if len(values) < 2:
        return []
    if not ordered:
        return [float(value == other) for other in values[1:]]
    size = [math.log2(value) if value > 0 else 0.0]
    return [*size, float(value == 0)] if 0 in values else size


def _solve(groups: Sequence[Group]) -> list[Array]:
    """Weights of the features for each penalty; groups count the same, differences between them are not explained."""
    centred = [group.rows - group.rows.mean(axis=0) for group in groups]
    spread = np.sqrt(_mean_of([(rows**2).mean(axis=0) for rows in centred]))
    scale = np.where(spread > 1e-9, spread, np.inf)  # a feature that never varies gets no weight
    scaled = [rows / scale for rows in centred]
    gram = _mean_of([rows.T @ rows / len(rows) for rows in scaled])
    moment = _mean_of([rows.T @ group.target / len(rows) for rows, group in zip(scaled, groups, strict=True)])
    values, vectors = np.linalg.eigh(gram)  # once for all penalties
    along = vectors.T @ moment
    return [vectors @ (along / (np.maximum(values, 0.0) + penalty)) / scale for penalty in PENALTIES]


def _held_out_losses(groups: Sequence[Group], keys: Sequence[str]) -> list[float]:
    """For each penalty, what following the correction loses on each problem when it was learned from the others."""
    losses: list[list[float]] = [[] for _ in PENALTIES]
    judged = []
    for key in keys:
        others = [group for group in groups if group.problem_key != key]
        rows = np.concatenate([group.rows for group in others])
        low, high, solved = rows.min(axis=0), rows.max(axis=0), _solve(others)
        for group in (group for group in groups if group.problem_key == key):
            judged.append(group)
            within = np.clip(group.rows, low, high)
            for found, weights in zip(losses, solved, strict=True):
                found.append(_loss(group.model_us * np.exp(within @ weights), group.time_us))
    return [_mean(found, judged) for found in losses]


def _loss(guess_us: Array, time_us: Array) -> float:
    """Mean over FIRST of the log-loss of the best among the first configs of a ranking."""
    ranked = time_us[np.argsort(guess_us, kind="stable")]
    return float(np.mean([math.log(ranked[:count].min() / time_us.min()) for count in FIRST]))


def _mean(losses: Sequence[float], groups: Sequence[Group]) -> float:
    """Over problems, then over the GPUs of each."""
    by_problem: dict[str, list[float]] = defaultdict(list)
    for loss, group in zip(losses, groups, strict=True):
        by_problem[group.problem_key].append(loss)
    return float(np.mean([np.mean(found) for found in by_problem.values()]))


def _mean_of(arrays: Sequence[Array]) -> Array:
    total: Array = np.mean(np.stack(arrays), axis=0)
    return total
