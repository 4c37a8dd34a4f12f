"""Times of launches against each other: blocks in random order, a sentinel against drift, losers leave early."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .nvml import GpuState, NoWatch, Watch, summarize_states, was_disturbed
from .stats import log_ratios, signed_rank_p
from .timing import MIN_ROUNDS, WARMUP_MS, Clock, Fn, Timing, launches_per_sample, summarize, warm_up

DRIFT = 0.03  # between the sentinel's two samples of a block, beyond which the block is measured again
LONGEST_REST_S = 1.0
TARGET_MS = 400.0  # of device time a variant, after which a race may end early
LEAVES_AFTER = 3  # blocks
LEAVES_AT = math.log(1.10)  # median log-ratio to the leader
LEAVES_WITH_P = 0.001  # or this sure of being slower: it is asked after every block, for every rival


@dataclass
class Race:
    """Timings of all functions, sample i from block i (those who left early have fewer), and the conditions."""

    timings: list[Timing]
    blocks: int
    disturbed: list[str] = field(default_factory=list)  # why blocks were measured again
    states: list[GpuState] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, Any]:
        """The conditions, ready for the database."""
        told: dict[str, Any] = {"blocks": self.blocks, "disturbed_blocks": len(self.disturbed)}
        if self.disturbed:
            told["disturbed_by"] = self.disturbed[-1]
        return {**told, **summarize_states(self.states)}


def run_race(
    fns: Sequence[Fn],
    *,
    clock: Clock,
    rounds: int,
    sentinel: int | None = None,
    watch: Watch | None = None,
    cold_l2: bool = True,
    target_ms: float = TARGET_MS,
    warmup_ms: float = WARMUP_MS,
    seed: int = 0,
    rest: Callable[[float], None] = time.sleep,
) -> Race:
    """Time `fns` in up to `rounds` blocks, each of which takes one sample of every function in a new random order.

    The sentinel opens and closes each block; if its two samples differ by more than 3%, or the GPU was disturbed, the
    block is measured again (at most as many as there are rounds, later ones are kept as they are), after a `rest` of as
    many seconds as it took: a GPU at its power limit gets its clock back. A function that is clearly slower than the
    leader leaves, the sentinel never does. Ends early once a function's samples took `target_ms` on average.
    """
    launches = [launches_per_sample(warm_up(fn, clock, warmup_ms)) for fn in fns]
    samples: list[list[float]] = [[] for _ in fns]
    race, watch, shuffle = Race([], 0), watch or NoWatch(), random.Random(seed)
    live, spent_us = set(range(len(fns))), 0.0
    before = watch.read()
    while race.blocks < rounds:
        if race.blocks >= MIN_ROUNDS and spent_us > target_ms * 1e3 * len(fns):
            break
        order = [index for index in sorted(live) if index != sentinel]
        shuffle.shuffle(order)
        order = order if sentinel is None else [sentinel, *order, sentinel]
        block = [(index, clock.elapsed_us(fns[index], launches[index], cold_l2)) for index in order]
        block_us = sum(sample * launches[index] for index, sample in block)
        spent_us += block_us
        state = watch.read()
        race.states += [state] if state is not None else []
        reason = was_disturbed(before, state) or (_drift(block) if sentinel is not None else "")
        if reason and len(race.disturbed) < rounds:
            race.disturbed.append(reason)
            rest(min(LONGEST_REST_S, block_us * 1e-6))
            continue
        for index in live:
            own = [sample for place, sample in block if place == index]
            samples[index].append(sum(own) / len(own))
        race.blocks += 1
        live -= _losers(samples, live) - {sentinel}
    race.timings = [summarize(values) for values in samples]
    return race


def _drift(block: list[tuple[int, float]]) -> str:
    first, last = block[0][1], block[-1][1]
    if abs(math.log(last / first)) <= DRIFT:
        return ""
    return f"the sentinel took {first:.1f} us at the start of a block and {last:.1f} us at its end"


def _losers(samples: list[list[float]], live: set[int]) -> set[int]:
    """Who is clearly slower than the leader by now."""
    if len(samples[next(iter(live))]) < LEAVES_AFTER:
        return set()
    leader = min(live, key=lambda index: median(samples[index]))
    found = {index: log_ratios(samples[index], samples[leader]).tolist() for index in live - {leader}}
    return {i for i, gaps in found.items() if median(gaps) > LEAVES_AT or signed_rank_p(gaps) < LEAVES_WITH_P}
