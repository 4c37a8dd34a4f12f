"""Percentiles, pairing, order and length of samples, on a clock that counts instead of ticking."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nsa_autotune.bench.timing import (
    MAX_LAUNCHES,
    MIN_ROUNDS,
    WallClock,
    percentile,
    summarize,
    time_launches,
    warm_up,
)


@dataclass
class CountingClock:
    """Every function returns how long it takes; calls are recorded."""

    calls: list[tuple[float, int, bool]] = field(default_factory=list)

    def elapsed_us(self, fn: Callable[[], object], launches: int, cold_l2: bool) -> float:
        """What `fn` says."""
        call_us = fn()
        assert isinstance(call_us, float)
        self.calls.append((call_us, launches, cold_l2))
        return call_us


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([7.0], 20, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], 20, 10.0),
        ([0.0, 10.0], 80, 8.0),
        ([1.0, 2.0], 0, 1.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == pytest.approx(expected)


def test_summary_keeps_all_samples_in_their_order() -> None:
    timing = summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert timing.samples_us == (5.0, 1.0, 2.0, 4.0, 3.0, 6.0)
    assert (timing.median_us, timing.p20_us, timing.p80_us) == (3.5, 2.0, 5.0)


def test_samples_belong_to_their_functions_in_paired_rounds_of_changing_order() -> None:
    clock = CountingClock()
    times_us = (300.0, 500.0, 700.0)
    timings = time_launches([lambda t=t: t for t in times_us], clock=clock, rounds=12, target_ms=1e9, warmup_ms=0.0)
    assert [timing.samples_us for timing in timings] == [(t,) * 12 for t in times_us]
    measured = [call[0] for call in clock.calls[6:]]  # two calls of each function warm it up
    rounds = [tuple(measured[i : i + 3]) for i in range(0, len(measured), 3)]
    assert all(sorted(turn) == list(times_us) for turn in rounds)
    assert len(set(rounds)) >= 4
    assert all(cold for _, _, cold in clock.calls[6:])


def test_equal_seeds_give_equal_orders() -> None:
    orders = []
    for seed in (0, 0, 1):
        clock = CountingClock()
        time_launches([lambda t=t: t for t in (1.0, 2.0, 3.0)], clock=clock, rounds=9, warmup_ms=0.0, seed=seed)
        orders.append([call[0] for call in clock.calls])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("call_us", "launches"), [(1.0, MAX_LAUNCHES), (10.0, 20), (150.0, 2), (200.0, 1), (90_000.0, 1)]
)
def test_short_launches_are_repeated_to_a_fifth_of_a_millisecond(call_us: float, launches: int) -> None:
    clock = CountingClock()
    time_launches([lambda: call_us], clock=clock, rounds=1, warmup_ms=0.0)
    assert clock.calls[-1] == (call_us, launches, True)


@pytest.mark.parametrize(("call_us", "expected"), [(1000.0, 30), (20_000.0, 11), (500_000.0, MIN_ROUNDS)])
def test_slow_functions_get_fewer_rounds(call_us: float, expected: int) -> None:
    timings = time_launches([lambda: call_us], clock=CountingClock(), rounds=30, target_ms=200.0)
    assert len(timings[0].samples_us) == expected


def test_few_rounds_are_few_even_below_the_minimum() -> None:
    assert len(time_launches([lambda: 1.0], clock=CountingClock(), rounds=2)[0].samples_us) == 2


def test_warm_up_ends_by_time_and_does_not_count_the_first_call() -> None:
    clock, calls = CountingClock(), iter([1e6, *[1000.0] * 100])
    assert warm_up(lambda: next(calls), clock, warmup_ms=20.0) == 1000.0
    assert 20 <= sum(launches for _, launches, _ in clock.calls[1:]) <= 22


def test_wall_clock_tells_the_mean_of_a_call() -> None:
    calls: list[int] = []

    def nap() -> None:
        calls.append(1)
        time.sleep(0.002)

    assert 2000 <= WallClock().elapsed_us(nap, 3, False) < 200_000
    assert len(calls) == 3
