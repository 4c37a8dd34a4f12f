"""Stored predictions as a ranking: fastest first, configs that compile to the same code together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..db.records import TrialRecord
from ..spec import Config, canonical_json
from .space import config_key


@dataclass(frozen=True)
class Prediction:
    """A config that compiles and fits on a target, with the guess of a cost model; never a measurement."""

    config: Config
    predicted_us: float
    resources: dict[str, Any]
    same_code: tuple[Config, ...] = ()  # other configs with the same binary and the same guess


def rank_predictions(records: Iterable[TrialRecord]) -> list[Prediction]:
    """Predictions of one problem on one target, fastest first; rejected records are left out."""
    groups: dict[str, list[TrialRecord]] = {}
    usable = {config_key(record.config): record for record in records if _is_usable(record)}
    for key, record in sorted(usable.items()):
        code = [(record.resources or {}).get("binary_sha") or key, record.predicted_us]
        groups.setdefault(canonical_json(code), []).append(record)
    found = [_merge(group) for group in groups.values()]
    return sorted(found, key=lambda prediction: (prediction.predicted_us, config_key(prediction.config)))


def _is_usable(record: TrialRecord) -> bool:
    return record.kind == "predicted" and record.status == "ok" and record.predicted_us is not None


def _merge(group: list[TrialRecord]) -> Prediction:
    first, others = group[0], tuple(record.config for record in group[1:])
    return Prediction(first.config, first.predicted_us or 0.0, first.resources or {}, others)
