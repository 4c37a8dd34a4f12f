"""Judgement of a cost model by recorded spaces: does it find a good config among its first few guesses?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..db.records import TrialRecord
from ..errors import InvalidInput
from ..kernels import get_spec
from .correction import Correction
from .recorded import RecordedSpace, make_space
from .replay import learned_elsewhere, rank_recorded

FIRST = 16  # guesses that are looked at
NEAR = 0.05  # of the best time


@dataclass(frozen=True)
class Judgement:
    """How a model's ranking of one recorded space fares."""

    best_in_first_16: bool  # a config within 5% of the best
    loss_of_first: float  # the first guess's recorded time over the best one's, less 1
    num_ranked: int  # working configs whose resources are known, equal machine code counted once
    note: str  # which model it was


def judge_space(space: RecordedSpace, correction: Correction) -> Judgement | None:
    """The ranking against the best of all recorded configs; None if no trial tells its resources."""
    times = [space.working[key] for key, _ in rank_recorded(space, correction)]
    if not times:
        return None
    return Judgement(
        best_in_first_16=min(times[:FIRST]) <= (1 + NEAR) * space.best_us,
        loss_of_first=times[0] / space.best_us - 1,
        num_ranked=len(times),
        note=correction.note,
    )


def judge_model(records: Sequence[TrialRecord], correction: Correction | None = None) -> Judgement:
    """The measured trials of one problem against a model, the plain one if none is given."""
    if not records:
        raise InvalidInput("a model is judged by recorded trials", {"records": 0}, "Record some: nsa-autotune tune.")
    spec = get_spec(records[0].family)
    found = judge_space(make_space(spec, records), correction or Correction(spec, "the plain model"))
    if found is None:
        values = {"family": spec.family, "gpu": records[0].fingerprint["gpu"], "records": len(records)}
        raise InvalidInput("a model is judged by trials that tell their resources", values, "Record them anew.")
    return found


def judge_all(spaces: Sequence[RecordedSpace]) -> list[Judgement | None]:
    """Each space against the model that the other problems correct."""
    return [judge_space(space, learned_elsewhere(space, spaces)) for space in spaces]


def geometric_loss(judgements: Sequence[Judgement]) -> float:
    """Geometric mean of what the first guesses lose, as a fraction."""
    return math.expm1(sum(math.log1p(judgement.loss_of_first) for judgement in judgements) / len(judgements))
