"""Stored trials as Optuna studies: for optuna-dashboard, which reads a file of its own, and for importances."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from ..db.records import TrialRecord
from ..errors import InvalidInput
from ..spec import Value, canonical_json, digest
from .study import quiet_optuna

LEAST_TIMED = 20  # configs with a time, below which an importance says nothing
LARGEST = 2**53  # beyond it Optuna's floats are not the number that was stored
MAX_NAME_CHARS = 300  # of a study; its digest, which comes last, keeps cut names apart


@dataclass(frozen=True)
class TrialGroup:
    """Trials of one problem on one fingerprint with one template and policy, oldest first: one search."""

    records: tuple[TrialRecord, ...]

    @property
    def name(self) -> str:
        """A readable name that no other group has."""
        first = self.records[0]
        shape = f"T {first.problem['seq_k']} d {first.problem['d_qk']}/{first.problem['d_v']} {first.problem['dtype']}"
        text = f"{first.family} {shape} {first.fingerprint['gpu']} {first.policy}"
        return f"{text[:MAX_NAME_CHARS]} #{digest(group_key(first))[:8]}"


@dataclass(frozen=True)
class Mirrored:
    """One study that was written; `best_us` is None where nothing worked."""

    name: str
    num_trials: int
    best_us: float | None


def group_key(record: TrialRecord) -> tuple[str, ...]:
    """What the trials of one search have in common."""
    return (
        record.fingerprint_digest,
        record.family,
        record.problem_key,
        canonical_json(record.problem),
        record.template_digest,
        record.policy,
    )


def group_trials(records: Iterable[TrialRecord]) -> list[TrialGroup]:
    """The searches that measured trials of our templates belong to, by name."""
    groups: dict[tuple[str, ...], list[TrialRecord]] = defaultdict(list)
    for record in records:
        if record.kind == "measured" and record.provider == "template":
            groups[group_key(record)].append(record)
    found = [TrialGroup(tuple(sorted(group, key=lambda record: record.created))) for group in groups.values()]
    return sorted(found, key=lambda group: group.name)


def optuna_trials(records: Sequence[TrialRecord]) -> list[FrozenTrial]:
    """Finished Optuna trials: the median in us as value, a failure as PRUNED with its reason as an attribute."""
    names = sorted({name for record in records for name in record.config})
    axes = {name: _axis([record.config[name] for record in records if name in record.config]) for name in names}
    return [_optuna_trial(record, axes) for record in records]


def importances(records: Sequence[TrialRecord]) -> dict[str, float] | None:
    """Share of each parameter in reaching the fastest tenth (PED-ANOVA), largest first; None for too few times.

    The shares sum to 1. None as well where no parameter varies or all shares are 0.
    """
    timed = [record for record in records if record.median_us is not None]
    if len({canonical_json(record.config) for record in timed}) < LEAST_TIMED:
        return None
    with quiet_optuna():
        study = optuna.create_study(direction="minimize")
        study.add_trials(optuna_trials(timed))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total > 0 else None


def write_studies(path: Path, groups: Sequence[TrialGroup]) -> list[Mirrored]:
    """Write one study a group into a new SQLite file, whole or not at all; InvalidInput if the file is there."""
    if path.exists():
        remedy = "Delete it, if it is an older copy of the studies, or name another file."
        raise InvalidInput(
            "the file of studies must be new, so that nothing is overwritten", {"path": str(path)}, remedy
        )
    if not groups:
        raise InvalidInput("there are no measured trials to copy", {}, "Record some: nsa-autotune tune.")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / "studies.sqlite"
            found = _write(temporary, groups)
            path.hardlink_to(temporary)  # fails where another process was first, as a rename would not
    except OSError as error:
        values = {"path": str(path), "reason": error.strerror}
        raise InvalidInput(
            "the file cannot be written", values, "Name a file in a folder that you may write."
        ) from error
    return found


def _write(path: Path, groups: Sequence[TrialGroup]) -> list[Mirrored]:
    with quiet_optuna():
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"creator": lambda: _fast_connection(path)}
        )
        try:
            return [_write_study(storage, group) for group in groups]
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _fast_connection(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")  # a commit for each trial; the file counts only once it is whole
    return connection


def _write_study(storage: optuna.storages.RDBStorage, group: TrialGroup) -> Mirrored:
    first = group.records[0]
    study = optuna.create_study(storage=storage, study_name=group.name, direction="minimize")
    study.set_metric_names(["median_us"])
    for name in ("family", "problem", "fingerprint", "policy", "template_digest"):
        study.set_user_attr(name, getattr(first, name))
    study.add_trials(optuna_trials(group.records))
    times = [record.median_us for record in group.records if record.median_us is not None]
    return Mirrored(group.name, len(group.records), min(times, default=None))


def _optuna_trial(record: TrialRecord, axes: dict[str, _Axis]) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        state=TrialState.COMPLETE if record.median_us is not None else TrialState.PRUNED,
        value=record.median_us,
        params={name: axes[name].param(value) for name, value in record.config.items()},
        distributions={name: axes[name].distribution for name in record.config},
        user_attrs=_attributes(record),
    )
    trial.datetime_start = trial.datetime_complete = _local_time(record.created)
    return trial


def _attributes(record: TrialRecord) -> dict[str, Any]:
    """What params and value do not tell; little, for Optuna writes each with queries of its own."""
    told = {"status": record.status, "reason": record.reason}
    return {name: value for name, value in told.items() if value} | (
        {"stage": record.stage} if record.stage != "search" else {}
    )


def _local_time(created: str) -> datetime:
    return datetime.fromisoformat(created).astimezone().replace(tzinfo=None)  # Optuna's times name no zone


@dataclass(frozen=True)
class _Axis:
    """One parameter as Optuna sees it."""

    distribution: BaseDistribution
    as_text: bool = False

    def param(self, value: Value) -> Value:
        """The value as Optuna's."""
        return canonical_json(value) if self.as_text else value


def _axis(values: Sequence[Value]) -> _Axis:
    """Ints as a range, so that tile sizes are drawn on an axis; booleans and strings as choices."""
    kinds = {type(value) for value in values}
    if kinds <= {int, float} and all(abs(value) <= LARGEST for value in values):  # type: ignore[arg-type]
        low, high = min(values), max(values)  # type: ignore[type-var]
        if kinds == {int}:
            return _Axis(IntDistribution(int(low), int(high)))
        return _Axis(FloatDistribution(float(low), float(high)))
    if kinds in ({bool}, {str}):
        return _Axis(CategoricalDistribution(sorted(set(values))))  # type: ignore[type-var]
    texts = {canonical_json(value) for value in values}  # False and 0 would be one choice
    return _Axis(CategoricalDistribution(sorted(texts)), as_text=True)
