"""Times of launches on the device: cold L2, warmed up by time, many launches a sample, interleaved in random order."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Fn = Callable[[], object]

MIN_SAMPLE_US = 200.0  # shorter launches are repeated, each on a cold cache, until a sample is this long
MAX_LAUNCHES = 100  # a sample
MIN_ROUNDS = 5
WARMUP_MS = 25.0
GRAPHS_KEPT = 24  # each holds the memory that its launches allocate


class Clock(Protocol):
    """Measures repeated calls of one function."""

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        """Mean microseconds of one of `launches` calls."""
        ...


@dataclass(frozen=True)
class Timing:
    """Samples in microseconds, one a round, with their median and 20th and 80th percentile."""

    samples_us: tuple[float, ...]
    median_us: float
    p20_us: float
    p80_us: float


def percentile(samples: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between the two nearest ranks."""
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100.0
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarize(samples_us: Sequence[float]) -> Timing:
    """Median and percentiles of at least one sample."""
    return Timing(tuple(samples_us), percentile(samples_us, 50), percentile(samples_us, 20), percentile(samples_us, 80))


def time_launches(
    fns: Sequence[Fn],
    *,
    clock: Clock,
    rounds: int = 30,
    target_ms: float = 200.0,
    warmup_ms: float = WARMUP_MS,
    cold_l2: bool = True,
    seed: int = 0,
) -> list[Timing]:
    """One Timing for each function, from equally many paired samples: every round times all, in a new random order.

    Takes `rounds` rounds, or fewer (at least MIN_ROUNDS, if so many are asked for) once a function's samples would
    take more than `target_ms` on average. The first calls, which may compile, are not counted.
    """
    launches = [launches_per_sample(warm_up(fn, clock, warmup_ms)) for fn in fns]
    samples: list[list[float]] = [[] for _ in fns]
    order, shuffle = list(range(len(fns))), random.Random(seed)
    spent_us = 0.0
    for done in range(rounds):
        if done >= MIN_ROUNDS and spent_us > target_ms * 1e3 * len(fns):
            break
        shuffle.shuffle(order)
        for index in order:
            sample = clock.elapsed_us(fns[index], launches[index], cold_l2)
            samples[index].append(sample)
            spent_us += sample * launches[index]
    return [summarize(values) for values in samples]


def warm_up(fn: Fn, clock: Clock, warmup_ms: float) -> float:
    """Call until `warmup_ms` of device time are spent, the first call aside: mean microseconds of the last calls."""
    clock.elapsed_us(fn, 1, False)
    spent_us, calls = 0.0, 1
    while True:
        mean_us = clock.elapsed_us(fn, calls, False)
        spent_us += max(mean_us, 0.5) * calls
        left_us = warmup_ms * 1e3 - spent_us
        if left_us <= 0.0:
            return mean_us
        calls = min(MAX_LAUNCHES, 2 * calls, int(left_us / max(mean_us, 0.5)) + 1)


def launches_per_sample(call_us: float) -> int:
    """Launches that make a sample of at least MIN_SAMPLE_US."""
    return min(MAX_LAUNCHES, max(1, -int(-MIN_SAMPLE_US // max(call_us, 0.5))))


class WallClock:
    """Host time, for devices without events; it flushes no cache."""

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        """Mean microseconds of one of `launches` calls."""
        started = time.perf_counter()
        for _ in range(launches):
            fn()
        return (time.perf_counter() - started) * 1e6 / launches


def _larger_than_l2(device: torch.device) -> torch.Tensor:
    """What leaves nothing else in the second-level cache when it is overwritten."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.int8, device=device)


class CudaClock:
    """CUDA events around each launch, the second-level cache overwritten before it.

    The device sleeps while the host enqueues a sample, so that host overhead never stands between two events.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._flush = _larger_than_l2(self.device)
        self._host_us = 100.0  # to enqueue one flush, two events and a launch

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        """Mean microseconds of one of `launches` calls."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(launches)]
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2000 * min(self._host_us * launches, 20_000.0)))  # about 2000 cycles a microsecond
            enqueued = time.perf_counter()
            for start, stop in pairs:
                if cold_l2:
                    self._flush.zero_()
                start.record()
                fn()
                stop.record()
            host_us = (time.perf_counter() - enqueued) * 1e6 / launches
            torch.cuda.synchronize()
        self._host_us = min(max(1.5 * host_us, 0.9 * self._host_us), 1000.0)  # a compiling first call fades again
        return sum(float(start.elapsed_time(stop)) for start, stop in pairs) * 1e3 / launches


class GraphClock:
    """CUDA events around replays of a graph that holds all launches of a sample.

    With a cold cache the graph overwrites it before each launch; the time of a graph that does only that is taken off.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._flush = _larger_than_l2(self.device)
        self._graphs: OrderedDict[tuple[int, int, bool], tuple[Fn, torch.cuda.CUDAGraph]] = OrderedDict()

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        """Mean microseconds of one of `launches` calls."""
        with torch.cuda.device(self.device):
            total_us = self._replay_us(self._graph(fn, launches, cold_l2))
            if cold_l2:
                total_us -= self._replay_us(self._graph(self._overwrite, launches, False))
        return max(total_us, 0.1) / launches

    def _overwrite(self) -> object:
        return self._flush.zero_()

    def _graph(self, fn: Fn, launches: int, cold_l2: bool) -> torch.cuda.CUDAGraph:
        key = (hash(fn), launches, cold_l2)
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            fn()  # compiles, which no capture may
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(launches):
                    if cold_l2:
                        self._overwrite()
                    fn()
            self._graphs[key] = (fn, graph)  # the function too, so that no other takes its place in memory
        self._graphs.move_to_end(key)
        return self._graphs[key][1]

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3


def make_clock(device: torch.device | str, *, graph: bool = False) -> Clock:
    """Events on a GPU, around single launches or replays of a graph; host time elsewhere."""
    if torch.device(device).type != "cuda":
        return WallClock()
    return GraphClock(device) if graph else CudaClock(device)
