"""TrialRecord and WinnerRecord: what goes into the database and comes out of it; strings, numbers and dicts only."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from numbers import Real
from typing import Any, ClassVar, Self

from .. import __version__
from ..errors import NSAError, StoreError
from ..plain import visible
from ..spec import DEFAULT_POLICY, Problem, digest
from .checks import RACED, TRIAL_RULES, WINNER_RULES, Rule, check_fields, shorten
from .sense import refuse_contradiction

MAX_REASON_CHARS = 8000  # a compiler's whole output would swell every export


def utc_now() -> str:
    """The time now, ISO 8601 in UTC with microseconds; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@functools.cache
def tool_version() -> str:
    """The version of nsa-autotune, installed or not."""
    return __version__


@dataclass(frozen=True)
class _Record:
    """The fields that trials and winners share: which variant, for which problem, on which machine."""

    RULES: ClassVar[Mapping[str, Rule]]

    fingerprint: dict[str, str]
    family: str
    problem: dict[str, Any]
    problem_key: str
    config: dict[str, Any]
    template_digest: str  # empty for a library

    def check(self) -> Self:
        """Raise StoreError if a field could not be stored and read back unchanged."""
        check_fields({f.name: getattr(self, f.name) for f in fields(self)}, self.RULES)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; every field must be there, right, and at one with the rest."""
        check_fields(data, cls.RULES)
        try:
            problem = Problem.from_dict(data["problem"])
        except (NSAError, TypeError, ValueError) as error:
            values = {"problem": shorten(data["problem"])}
            raise StoreError("problem must be a valid problem", values, str(error)) from error
        refuse_contradiction(data, problem)
        lists = {name: tuple(data[name]) for name in ("samples_us", "rivals") if name in data}
        return cls(**{**data, **lists})

    @property
    def fingerprint_digest(self) -> str:
        """Natural key of the fingerprint."""
        return digest(self.fingerprint)

    @property
    def problem_digest(self) -> str:
        """Natural key of the problem as the family sees it."""
        return digest([self.family, self.problem_key, self.problem])

    @property
    def variant_digest(self) -> str:
        """Natural key of the variant: family, config and template."""
        return digest([self.family, self.config, self.template_digest])

    def _normalise(self, *names: str) -> None:
        # 5 and 5.0 must hash alike, and a numpy scalar is not JSON
        for name in names:
            object.__setattr__(self, name, _as_float(getattr(self, name)))
        samples = getattr(self, "samples_us")  # noqa: B009  a field of both subclasses, at different places
        object.__setattr__(self, "samples_us", tuple(_as_float(sample) for sample in samples))


@dataclass(frozen=True)
class TrialRecord(_Record):
    """One measured, failed or predicted variant; times in microseconds, `created` in UTC.

    A reason is cut at 8000 characters.
    An error that is not finite becomes None, for JSON has no infinity, and the reason says so.
    """

    RULES = TRIAL_RULES

    status: str  # one of STATUSES
    reason: str = ""
    samples_us: tuple[float, ...] = ()
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    kind: str = "measured"  # or predicted
    provider: str = "template"  # or the name of a library
    stage: str = "search"  # or final, baseline
    resources: dict[str, Any] | None = None
    max_error: float | None = None
    baseline_error: float | None = None
    predicted_us: float | None = None
    policy: str = DEFAULT_POLICY  # how the time was taken
    environment: dict[str, Any] | None = None  # clocks, temperature, power and neighbours on the GPU meanwhile
    created: str = field(default_factory=utc_now)
    tool_version: str = field(default_factory=tool_version)

    def __post_init__(self) -> None:
        self._normalise("median_us", "p20_us", "p80_us", "max_error", "baseline_error", "predicted_us")
        reason = _storable(self.reason)
        for name in ("max_error", "baseline_error"):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                object.__setattr__(self, name, None)
                reason = f"{name} was {value}. {reason}".rstrip()
        object.__setattr__(self, "reason", _cut(reason))

    @property
    def digest(self) -> str:
        """Natural key: the digest of the whole record, so that importing it twice adds nothing."""
        return digest(_without_defaults(self.to_dict(), policy=DEFAULT_POLICY, environment=None))


@dataclass(frozen=True)
class WinnerRecord(_Record):
    """The variant that serves a problem on one fingerprint, with its evidence and the baselines measured beside it."""

    RULES = WINNER_RULES

    median_us: float
    p20_us: float
    p80_us: float
    samples_us: tuple[float, ...]
    default_config: dict[str, Any] | None = None
    default_median_us: float | None = None
    library: str = ""  # provider measured beside it, if any
    library_median_us: float | None = None
    policy: str = DEFAULT_POLICY  # how the times were taken
    verdict: str = RACED  # or provisional, confirmed (by a second process), carried (from other versions, same code)
    rivals: tuple[dict[str, Any], ...] = ()  # log(rival / winner) with its interval, and whether they are tied
    resources: dict[str, Any] | None = None
    created: str = field(default_factory=utc_now)
    tool_version: str = field(default_factory=tool_version)
    source: str = "local"  # or imported, shipped

    def __post_init__(self) -> None:
        self._normalise("median_us", "p20_us", "p80_us", "default_median_us", "library_median_us")

    @property
    def digest(self) -> str:
        """Natural key: fingerprint, family, problem key, template and policy."""
        key: list[Any] = [self.fingerprint, self.family, self.problem_key, self.template_digest]
        return digest(key if self.policy == DEFAULT_POLICY else [*key, self.policy])  # as before there were policies

    @property
    def content_digest(self) -> str:
        """Digest of all that was measured: every field but where the record came from."""
        return digest({name: value for name, value in self.to_dict().items() if name != "source"})

    def as_trial(self) -> TrialRecord:
        """The winner's samples as a trial of a race, which outlives the winner."""
        shared = {f.name: getattr(self, f.name) for f in fields(_Record)}
        times = {name: getattr(self, name) for name in ("samples_us", "median_us", "p20_us", "p80_us")}
        made = {name: getattr(self, name) for name in ("resources", "policy", "created", "tool_version")}
        reason = f"samples of a {self.verdict} winner"
        return TrialRecord(**shared, **times, **made, status="ok", stage="final", reason=reason)

    @property
    def speedup(self) -> float | None:
        """Default config's median over the winner's, if the default was measured."""
        return None if self.default_median_us is None else self.default_median_us / self.median_us

    @property
    def tied(self) -> list[dict[str, Any]]:
        """Configs that the races could not tell from the winner."""
        return [rival["config"] for rival in self.rivals if rival["tied"]]


def _without_defaults(values: dict[str, Any], **defaults: object) -> dict[str, Any]:
    """Fields of a later schema count once they say something: records from before keep their names."""
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def _as_float(value: Any) -> Any:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return value  # an int beyond the range of float, which the check refuses
    return value


def _storable(text: str) -> str:
    # compiler output may hold lone surrogates and NUL, which no database takes, and colours, which no file may bring
    text = text.replace("\r\n", "\n")
    return visible(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 4] + " ..."
