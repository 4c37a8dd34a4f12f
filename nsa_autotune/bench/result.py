"""TrialResult: what one trial of a variant found out, or why it failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ..errors import InvalidInput

Status = Literal[  # same_code: not measured, since another config with the same machine code was
    "ok", "same_code", "constraint", "render", "compile", "resource", "accuracy", "runtime", "timeout", "crash"
]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class TrialResult:
    """Status and reason of a trial, its times in microseconds, its errors, and what the compiled kernel occupies."""

    status: Status
    reason: str = ""
    samples_us: tuple[float, ...] = ()
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    max_error: float | None = None
    baseline_error: float | None = None
    resources: dict[str, int | str] | None = None
    environment: dict[str, Any] | None = None  # clocks, heat and blocks of the race it was timed in

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise InvalidInput(f"status must be one of {', '.join(STATUSES)}", {"status": self.status})
        for name in ("max_error", "baseline_error"):  # JSON has no infinity: an error without a value has no number
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    @property
    def ok(self) -> bool:
        """True for a variant that is right and was timed."""
        return self.status == "ok"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "samples_us": list(self.samples_us)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialResult:
        """The inverse of `to_dict`."""
        return cls(**{**data, "samples_us": tuple(data.get("samples_us", ()))})
