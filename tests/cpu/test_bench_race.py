"""Races on a simulated clock: the faster one wins under drift, losers leave, disturbed blocks are measured again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nsa_autotune.bench.nvml import GpuState, _others, summarize_states, was_disturbed
from nsa_autotune.bench.policy import POLICIES, get_policy
from nsa_autotune.bench.race import run_race
from nsa_autotune.bench.stats import compare
from nsa_autotune.bench.timing import launches_per_sample
from nsa_autotune.errors import UnknownName
from nsa_autotune.spec import DEFAULT_POLICY, POLICY_NAMES


@dataclass
class SimulatedClock:
    """Functions say their true time; the clock adds noise and slows down by and by."""

    noise: float = 0.0
    drift_per_call: float = 0.0
    calls: list[float] = field(default_factory=list)
    jump_at: tuple[int, ...] = ()  # numbers of calls that take 1.5 times as long

    def __post_init__(self) -> None:
        self.rng = random.Random(3)

    def elapsed_us(self, fn: Callable[[], object], launches: int, cold_l2: bool) -> float:
        """The true time with noise and drift."""
        true_us = fn()
        assert isinstance(true_us, float)
        self.calls.append(true_us)
        slow = 1.5 if len(self.calls) in self.jump_at else 1.0
        return true_us * slow * (1 + self.drift_per_call * len(self.calls)) * (1 + self.rng.gauss(0, self.noise))


def fns(*times_us: float) -> list[Callable[[], object]]:
    return [lambda t=t: t for t in times_us]


def state(**changes: float) -> GpuState:
    usual = {"sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 50, "power_w": 600.0}
    return GpuState(**{**usual, "throttle_reasons": 0, "other_processes": 0, **changes})  # type: ignore[arg-type]


@dataclass
class Readings:
    """A watch that reads from a list, and the last reading for ever after."""

    states: Iterator[GpuState]
    last: GpuState | None = None

    def read(self) -> GpuState | None:
        """The next reading."""
        self.last = next(self.states, self.last)
        return self.last


def test_samples_of_a_block_belong_together() -> None:
    clock = SimulatedClock(drift_per_call=2e-4)
    race = run_race(fns(500.0, 505.0, 510.0), clock=clock, rounds=30, warmup_ms=0.0, target_ms=1e9)
    assert race.blocks == 30 and race.disturbed == []
    gap = compare(race.timings[1].samples_us, race.timings[0].samples_us)
    assert gap.log_ratio == pytest.approx(0.00995, abs=5e-4)  # though the clock drifted by 2 % meanwhile
    assert race.environment == {"blocks": 30, "disturbed_blocks": 0}


def test_who_is_clearly_slower_leaves_and_the_sentinel_stays() -> None:
    clock = SimulatedClock(noise=0.003)
    race = run_race(fns(500.0, 502.0, 520.0, 700.0), clock=clock, rounds=24, sentinel=3, warmup_ms=0.0, target_ms=1e9)
    counts = [len(timing.samples_us) for timing in race.timings]
    assert counts[0] == counts[3] == 24
    assert counts[2] == 10  # 4 % slower: the signed-rank test fires from the tenth block on
    race = run_race(fns(500.0, 700.0), clock=SimulatedClock(noise=0.003), rounds=24, warmup_ms=0.0)
    assert len(race.timings[1].samples_us) == 3  # 40 % slower


def test_the_sentinel_opens_and_closes_each_block() -> None:
    clock = SimulatedClock()
    run_race(fns(300.0, 400.0), clock=clock, rounds=5, sentinel=1, warmup_ms=0.0, target_ms=1e9)
    assert clock.calls[4:] == [400.0, 300.0, 400.0] * 5  # two calls of each warm it up


def test_a_block_in_which_the_sentinel_drifts_is_measured_again() -> None:
    clock = SimulatedClock(jump_at=(5, 12))  # the first call of the first block, the middle one of the third
    race = run_race(fns(300.0, 400.0), clock=clock, rounds=5, sentinel=1, warmup_ms=0.0, target_ms=1e9)
    assert race.blocks == 5 and len(race.disturbed) == 1
    assert "sentinel took 600.0 us at the start of a block and 400.0 us at its end" in race.disturbed[0]
    assert race.timings[1].samples_us == (400.0,) * 5
    assert race.timings[0].samples_us.count(450.0) == 1  # no sentinel saw that one: the median has to


def test_before_a_block_is_measured_again_the_gpu_rests_as_long_as_the_block_took() -> None:
    rests: list[float] = []
    clock = SimulatedClock(jump_at=(5,))  # the sentinel takes 600 us at the start of the first block, 400 at its end
    run_race(fns(300.0, 400.0), clock=clock, rounds=5, sentinel=1, warmup_ms=0.0, target_ms=1e9, rest=rests.append)
    took_us = launches_per_sample(300.0) * 300.0 + launches_per_sample(400.0) * 1000.0
    assert rests == [pytest.approx(took_us * 1e-6)]
    watch = Readings(iter([state(), state(throttle_reasons=0x40), state()]))
    run_race(fns(3e6), clock=SimulatedClock(), rounds=2, watch=watch, warmup_ms=0.0, rest=rests.append)
    assert rests[1:] == [1.0]  # and no longer than a second


def test_what_the_gpu_says_of_itself_is_kept_and_heeded() -> None:
    readings = [state(), state(temperature_c=60), state(throttle_reasons=0x40, temperature_c=88), state(power_w=700.0)]
    race = run_race(
        fns(300.0), clock=SimulatedClock(), rounds=3, watch=Readings(iter(readings)), warmup_ms=0.0, target_ms=1e9
    )
    assert race.blocks == 3
    assert race.disturbed == ["the GPU was slowed down (reasons 0x40, 88 C)"]
    told = race.environment
    assert (told["temperature_c_max"], told["power_w_max"], told["slowed_down"]) == (88, 700.0, True)
    assert (told["disturbed_blocks"], told["disturbed_by"]) == (1, race.disturbed[0])


def test_a_race_ends_though_the_disturbance_does_not() -> None:
    watch = Readings(iter([state(), state(other_processes=1)]))
    race = run_race(fns(300.0), clock=SimulatedClock(), rounds=4, watch=watch, warmup_ms=0.0, target_ms=1e9)
    assert (race.blocks, len(race.disturbed)) == (4, 4)
    assert race.environment["other_processes"] == 1


def test_a_long_race_ends_early_but_not_before_five_blocks() -> None:
    race = run_race(fns(50_000.0, 50_000.0), clock=SimulatedClock(), rounds=60, warmup_ms=0.0, target_ms=400.0)
    assert race.blocks == 9  # 400 ms at 50 ms a sample, and the block that passed them
    race = run_race(fns(1e6), clock=SimulatedClock(), rounds=60, warmup_ms=0.0, target_ms=400.0)
    assert race.blocks == 5


def test_disturbances() -> None:
    assert was_disturbed(None, state()) == was_disturbed(state(), None) == was_disturbed(state(), state()) == ""
    assert was_disturbed(state(), state(throttle_reasons=0x4)) == ""  # the usual power cap
    assert "1 processes joined" in was_disturbed(state(other_processes=1), state(other_processes=2))
    assert was_disturbed(state(other_processes=2), state(other_processes=1)) == ""
    assert summarize_states([]) == {}


def test_this_process_and_the_tuner_are_no_strangers() -> None:
    mine, tuner, stranger = os.getpid(), os.getppid(), 2**22 + 1
    assert _others([mine]) == _others([mine, tuner]) == _others([]) == 0
    assert _others([mine, tuner, stranger]) == 1
    assert _others([stranger]) == 0  # a pid of the host, which is ours
    assert _others([stranger, stranger + 1]) == 1


def test_policies_have_names_that_say_what_they_do() -> None:
    assert get_policy().name == DEFAULT_POLICY == "eager-cold"
    assert tuple(POLICIES) == POLICY_NAMES, "a dispatcher knows them all"
    for name, policy in POLICIES.items():
        assert name == f"{'graph' if policy.graph else 'eager'}-{'cold' if policy.cold_l2 else 'warm'}"
    with pytest.raises(UnknownName, match="graph-warm"):
        get_policy("lukewarm")
