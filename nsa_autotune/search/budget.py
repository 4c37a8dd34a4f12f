"""How much one problem may cost: trials, minutes, or whichever ends first."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InvalidInput
from .presets import unknown_name

_MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0}


@dataclass(frozen=True)
class Budget:
    """At most `max_trials` trials and `max_minutes` minutes; None leaves that side open, but one must be given.

    confirm: winners are raced again in a second process, once all problems are done.
    """

    max_trials: int | None = None
    max_minutes: float | None = None
    confirm: bool = True

    def __post_init__(self) -> None:
        if self.max_trials is None and self.max_minutes is None:
            raise InvalidInput("a budget needs trials or minutes", {}, "Write for example 200, 30m or 200,30m.")
        for name in ("max_trials", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInput(f"{name} must be positive", {name: value}, "Write for example 200, 30m or 200,30m.")

    def __str__(self) -> str:
        trials = f"{self.max_trials} trials" if self.max_trials is not None else ""
        minutes = f"{self.max_minutes:g} min" if self.max_minutes is not None else ""
        return " or ".join(part for part in (trials, minutes) if part)


NAMED_BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "quick": Budget(max_trials=60, max_minutes=2.0, confirm=False),
        "normal": Budget(max_trials=250, max_minutes=10.0),
        "full": Budget(max_trials=2000, max_minutes=60.0),  # spaces of up to 2000 configs are measured whole
    }
)


def parse_budget(text: str) -> Budget:
    """A budget as users write it: quick, normal or full; trials (`200`), a time (`90s`, `30m`, `2h`), or `200,30m`."""
    name = text.strip().lower()
    if name in NAMED_BUDGETS:
        return NAMED_BUDGETS[name]
    if re.fullmatch(r"[a-z]+", name):
        raise unknown_name("budget", name, NAMED_BUDGETS)
    trials: int | None = None
    minutes: float | None = None
    for part in (part.strip() for part in name.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", part)
        if match is not None and minutes is None:
            minutes = float(match[1]) * _MINUTES[match[2]]
        elif part.isascii() and part.isdigit() and trials is None:
            trials = int(part)
        else:
            raise InvalidInput(
                "a budget is a name, a number of trials, a time with s, m or h, or both",
                {"budget": text},
                f"Write for example 200, 30m or 200,30m, or one of {', '.join(NAMED_BUDGETS)}.",
            )
    return Budget(trials, minutes)


class Meter:
    """Counts what is spent of a budget from its creation on; `trials` may start above 0 when a run is resumed."""

    def __init__(self, budget: Budget, trials: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self.trials = trials
        self._clock = clock
        self._start = clock()

    @property
    def minutes(self) -> float:
        """Minutes since the meter was made."""
        return (self._clock() - self._start) / 60

    @property
    def spent(self) -> float:
        """Fraction of the budget that is gone, the larger of trials and time; 1 or more means stop."""
        by_trials = self.trials / self.budget.max_trials if self.budget.max_trials is not None else 0.0
        by_time = self.minutes / self.budget.max_minutes if self.budget.max_minutes is not None else 0.0
        return max(by_trials, by_time)

    @property
    def exhausted(self) -> bool:
        """True when no further trial may start."""
        return self.spent >= 1.0
