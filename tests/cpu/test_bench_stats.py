"""Paired statistics against enumeration, known examples and simulated races."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from nsa_autotune.bench.stats import bootstrap_interval, compare, holm, signed_rank_p


def enumerated_p(values: list[float]) -> float:
    """The definition: the share of all sign patterns whose positive ranks sum to at least what was seen."""
    values = [v for v in values if v]
    order = sorted(abs(v) for v in values)
    ranks = [sum(order.index(abs(v)) + 1 + k for k in range(order.count(abs(v)))) / order.count(abs(v)) for v in values]
    seen = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(values))]
    return sum(total >= seen for total in sums) / len(sums)


@pytest.mark.parametrize("seed", range(20))
def test_signed_rank_equals_enumeration_without_ties(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.gauss(0.3, 1.0) for _ in range(rng.randint(1, 11))]
    assert signed_rank_p(values) == pytest.approx(enumerated_p(values), abs=1e-12)


def test_signed_rank_equals_enumeration_with_ties_and_zeros() -> None:
    values = [1.0, 1.0, -1.0, 2.0, 0.0, 2.0, 2.0, -3.0]
    assert signed_rank_p(values) == pytest.approx(enumerated_p(values), abs=1e-12)


def test_smallest_p_halves_with_each_block() -> None:
    assert [signed_rank_p([1.0 + i for i in range(n)]) for n in (1, 5, 7)] == [0.5, 2**-5, 2**-7]
    assert signed_rank_p([-1.0, -2.0]) == 1.0
    assert signed_rank_p([]) == signed_rank_p([0.0]) == 1.0


def test_holm_on_a_known_example() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_interval_covers_the_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0.02, 0.01, 40), seed)
        hits += low <= 0.02 <= high
    assert 176 <= hits <= 198  # 88 to 99 %, for a nominal 95 %


def drifting_race(gap: float, blocks: int, seed: int) -> tuple[list[float], list[float]]:
    """Two variants whose times fall and rise together by 20 %, and differ by `gap`, with 1 % of noise each."""
    rng = random.Random(seed)
    drift = [1.0 + 0.2 * math.sin(block / 5) for block in range(blocks)]
    base = [100 * d * math.exp(rng.gauss(0, 0.01)) for d in drift]
    rival = [100 * d * math.exp(gap + rng.gauss(0, 0.01)) for d in drift]
    return rival, base


def test_pairing_sees_through_drift() -> None:
    slower = [compare(*drifting_race(0.02, 40, seed)) for seed in range(20)]
    assert all(c.p_slower < 0.01 and c.low > 0.0 for c in slower)
    assert all(abs(c.log_ratio - 0.02) < 0.012 for c in slower)
    equal = [compare(*drifting_race(0.0, 40, seed)) for seed in range(20)]
    assert sum(c.low <= 0.0 <= c.high for c in equal) >= 17
    assert min(c.p_slower for c in equal) > 0.001


def test_a_longer_series_is_cut_to_the_blocks_that_both_have() -> None:
    rival, base = drifting_race(0.1, 30, 1)
    assert compare(rival[:9], base) == compare(rival[:9], base[:9])
    assert compare(rival[:9], base).blocks == 9
    with pytest.raises(ValueError, match="samples of both"):
        compare([], base)
