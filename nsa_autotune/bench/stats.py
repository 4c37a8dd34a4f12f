"""Paired comparisons of two variants that were timed in the same blocks: which is faster, by how much, how sure.

Samples are compared block by block, as logarithms of ratios: what slows a whole block down (clocks, heat) drops out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000  # of the bootstrap
CHAIN = 5  # blocks resampled together, since neighbours resemble each other
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """How a rival stands to a base: median of log(rival / base), its confidence interval, and one-sided p-values."""

    log_ratio: float  # above 0: the rival is slower
    low: float
    high: float
    blocks: int
    p_slower: float  # chance of such samples if the rival were as fast as the base, or faster
    p_faster: float


def compare(rival_us: Sequence[float], base_us: Sequence[float], seed: int = 0) -> Comparison:
    """Compare samples of the same blocks; a longer series, of a variant that stayed longer, is cut to the shorter."""
    ratios = log_ratios(rival_us, base_us)
    low, high = bootstrap_interval(ratios, seed)
    slower, faster = signed_rank_p(ratios.tolist()), signed_rank_p((-ratios).tolist())
    return Comparison(float(np.median(ratios)), low, high, len(ratios), slower, faster)


def log_ratios(rival_us: Sequence[float], base_us: Sequence[float]) -> np.ndarray:
    """log(rival / base) of each block that has a sample of both: `[blocks]`, at least one."""
    blocks = min(len(rival_us), len(base_us))
    if blocks == 0:
        raise ValueError("a comparison needs samples of both variants")
    return np.asarray(np.log(np.asarray(rival_us[:blocks], float) / np.asarray(base_us[:blocks], float)))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Interval of the median at LEVEL, by resampling chains of adjacent blocks (Kuensch 1989); ends wrap around."""
    count = len(values)
    chain = min(CHAIN, max(1, count // 4))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count, size=(RESAMPLES, -(-count // chain)))
    index = (starts[:, :, None] + np.arange(chain)).reshape(RESAMPLES, -1)[:, :count] % count  # [RESAMPLES, count]
    medians = np.median(values[index], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def signed_rank_p(values: Iterable[float]) -> float:
    """Exact one-sided p of Wilcoxon's signed-rank test that values are above 0; zeros are left out, ties share ranks.

    With n values it cannot fall below 2^-n: 5 blocks give 0.031 at best, 7 give 0.008.
    """
    nonzero = sorted((value for value in values if value != 0.0), key=abs)
    doubled: list[int] = []  # twice the ranks, so that shared ones are whole
    for _, same in itertools.groupby(nonzero, key=abs):
        count = len(list(same))
        doubled += [2 * len(doubled) + count + 1] * count
    above = sum(rank for rank, value in zip(doubled, nonzero, strict=True) if value > 0)
    return _tails(tuple(doubled))[above]


@lru_cache(maxsize=256)
def _tails(ranks: tuple[int, ...]) -> tuple[float, ...]:
    """P(sum of the positive ranks >= s) for s = 0, 1, ..., if every sign is a coin."""
    ways = [1] + [0] * sum(ranks)
    for rank in ranks:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    tails = itertools.accumulate(reversed(ways))
    return tuple(reversed([reached / 2 ** len(ranks) for reached in tails]))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for being several (Holm 1979), by name."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        corrected[name] = largest
    return corrected
