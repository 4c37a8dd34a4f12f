"""Stored predictions as a ranking: fastest first, configs that compile to the same code together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    same_code: tuple[Config, ...] = ()  # other configs with the same machine code and the same guess of the plain model


Guess = Callable[[TrialRecord], float | None]


def rank_predictions(records: Iterable[TrialRecord], guess: Guess | None = None) -> list[Prediction]:
    """Predictions of one problem on one target, fastest first; rejected records are left out.

    `guess` judges them anew, for instance by a correction learned since; what it cannot judge keeps its stored guess.
    """
    newest: dict[str, TrialRecord] = {}
    for record in sorted(records, key=lambda record: record.created):
        if _is_usable(record):
            newest[config_key(record.config)] = record
    groups: dict[str, list[TrialRecord]] = {}
    for key, record in sorted(newest.items()):
        told = record.resources or {}
        code = [told.get("binary_sha") or key, told.get("model_us", record.predicted_us)]
        groups.setdefault(canonical_json(code), []).append(record)
    found = [_merge(group, guess) for group in groups.values()]
    return sorted(found, key=lambda prediction: (prediction.predicted_us, config_key(prediction.config)))


def _is_usable(record: TrialRecord) -> bool:
    return record.kind == "predicted" and record.status == "ok" and record.predicted_us is not None


def _merge(group: list[TrialRecord], guess: Guess | None) -> Prediction:
    first, others = group[0], tuple(record.config for record in group[1:])
    guess_us = guess(first) if guess is not None else None
    stored_us = first.predicted_us or 0.0
    return Prediction(first.config, stored_us if guess_us is None else guess_us, first.resources or {}, others)
