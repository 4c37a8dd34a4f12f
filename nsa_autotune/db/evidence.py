"""A time and what stands behind it: samples, spread, verdict, date and versions; and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..spec import canonical_json
from .query import PROBLEM_COLUMNS
from .records import TrialRecord, WinnerRecord

VERSION_FIELDS = ("driver", "cuda", "torch", "triton", "assembler", "tool_version", "template_digest")
TEMPLATE_CHARS = 8  # of a digest that are shown


@dataclass(frozen=True)
class Evidence:
    """A config with its measured time in us; `verdict` is a winner's, or the stage of a plain measurement."""

    gpu: str
    family: str
    problem: dict[str, Any]
    problem_key: str
    policy: str
    config: dict[str, Any]
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    verdict: str
    tied: int  # configs that the race could not tell from it
    created: str
    versions: dict[str, str]  # by the names of VERSION_FIELDS

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What it answers: GPU, family, problem key and policy."""
        return self.gpu, self.family, self.problem_key, self.policy

    @property
    def order(self) -> tuple[str, str, str, int, int, str]:
        """Where its row stands: by GPU, family and policy, then by length."""
        seq_q, seq_k = (int(self.problem.get(name, 0)) for name in ("seq_q", "seq_k"))
        return self.gpu, self.family, self.policy, seq_k, seq_q, self.problem_key

    def columns(self, prefix: str = "") -> dict[str, Any]:
        """Time, spread, samples, verdict, date, versions and config as flat columns."""
        found = {
            "median_us": self.median_us,
            "p20_us": self.p20_us,
            "p80_us": self.p80_us,
            "samples": self.samples,
            "verdict": self.verdict,
            "tied": self.tied,
            "created": self.created,
            **self.versions,
            "config": canonical_json(self.config),
        }
        return {f"{prefix}{name}": value for name, value in found.items()}

    def subject(self) -> dict[str, Any]:
        """Family, problem and policy as flat columns."""
        return {
            "family": self.family,
            **{name: self.problem.get(name) for name in PROBLEM_COLUMNS},
            "nsa": canonical_json(self.problem.get("nsa", {})),
            "policy": self.policy,
        }


def of_winner(winner: WinnerRecord) -> Evidence:
    """A winner's evidence."""
    return _evidence(winner, winner.median_us, winner.p20_us, winner.p80_us, winner.verdict, len(winner.tied))


def of_trial(trial: TrialRecord) -> Evidence:
    """A working trial's evidence; its spread is its median where none was stored."""
    assert trial.median_us is not None, "only trials that worked are asked for"
    low, high = (trial.median_us if value is None else value for value in (trial.p20_us, trial.p80_us))
    return _evidence(trial, trial.median_us, low, high, trial.stage, 0)


def _evidence(
    record: TrialRecord | WinnerRecord, median_us: float, p20_us: float, p80_us: float, verdict: str, tied: int
) -> Evidence:
    versions = {name: record.fingerprint.get(name, "") for name in VERSION_FIELDS[:5]}
    return Evidence(
        gpu=record.fingerprint["gpu"],
        family=record.family,
        problem=record.problem,
        problem_key=record.problem_key,
        policy=record.policy,
        config=record.config,
        median_us=median_us,
        p20_us=p20_us,
        p80_us=p80_us,
        samples=len(record.samples_us),
        verdict=verdict,
        tied=tied,
        created=record.created,
        versions={**versions, "tool_version": record.tool_version, "template_digest": record.template_digest},
    )


NOTHING = Evidence(
    *("", "", {}, "", "", {}, 1.0, 1.0, 1.0, 0, "", 0, ""), versions=dict.fromkeys(VERSION_FIELDS, "")
)  # tells the columns of an answer without rows


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second takes; `low` and `high` from the worst cases of both spreads."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """True if the spreads, from the 20th to the 80th percentile, do not overlap."""
        return self.low > 1 or self.high < 1

    def columns(self) -> dict[str, Any]:
        """As flat columns."""
        return {"ratio": self.value, "ratio_low": self.low, "ratio_high": self.high, "clear": self.clear}


def ratio(first: Evidence, second: Evidence) -> Ratio:
    """The second's time over the first's."""
    low, high = second.p20_us / first.p80_us, second.p80_us / first.p20_us
    return Ratio(second.median_us / first.median_us, low, high)


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """What changed from one config or set of versions to the next, as `name old -> new, ...`."""
    names = [*old, *(name for name in new if name not in old)]
    return ", ".join(
        f"{name} {_shown(name, old.get(name, 'none'))} -> {_shown(name, new.get(name, 'none'))}"
        for name in names
        if old.get(name) != new.get(name)
    )


def _shown(name: str, value: object) -> str:
    text = "?" if value == "" else str(value)
    return text[:TEMPLATE_CHARS] if name == "template_digest" else text
