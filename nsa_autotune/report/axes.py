"""Logarithmic axes: where a value is drawn, and which values get a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

STEPS = (1.0, 2.0, 5.0)  # of a decade
LABELS = 6  # at most, of an axis
LEAST, MOST = 1e-9, 1e18  # ends of an axis: a stored number may be anything, a length in px may not


@dataclass(frozen=True)
class Tick:
    """A label beside an axis."""

    at: float  # px
    text: str


@dataclass(frozen=True)
class LogAxis:
    """Values from `low` to `high`, both above 0, drawn from `start` to `end` px."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value stands, in px; what lies beyond the ends is drawn beyond them, but for absurd numbers."""
        share = math.log(min(max(value, LEAST), MOST) / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, values: Iterable[float], text: Callable[[float], str]) -> tuple[Tick, ...]:
        """Labels at the values that lie on the axis."""
        return tuple(Tick(self.at(value), text(value)) for value in values if self.low <= value <= self.high)


def fit_axis(values: Iterable[float], start: float, end: float, *, margin: float = 0.08) -> LogAxis:
    """An axis that holds the values from LEAST to MOST, with a share of its length free at both ends."""
    found = [float(min(max(value, LEAST), MOST)) for value in values]
    low, high = min(found), max(found)
    if high < low * 1.05:  # one value, or nearly so, stands in the middle
        low, high = low / 1.2, high * 1.2
    room = (high / low) ** margin
    return LogAxis(low / room, high * room, start, end)


def octaves(low: float, high: float) -> list[float]:
    """Powers of two from `low` to `high`, every second one and so on where they are many."""
    powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
    return [2.0**power for power in powers if power % math.ceil(max(1, len(powers)) / LABELS) == 0]


def round_values(low: float, high: float) -> list[float]:
    """Values worth a label: decades where they are many, else 1-2-5, else even steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**power for power in range(first, last + 1)]
    for candidates in (decades, [step * decade for decade in decades for step in STEPS]):
        inside = [value for value in candidates if low <= value <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / LABELS)]
    return _even_values(low, high)


def _even_values(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(decade * factor for factor in (1, 2, 5, 10) if decade * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
