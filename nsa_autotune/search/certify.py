"""Which of several raced configs wins, what it is tied with, and whether a second process agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..bench.race import LEAVES_AT
from ..bench.result import TrialResult
from ..bench.stats import Comparison, compare, holm
from ..bench.timing import summarize
from ..spec import Config
from .space import config_key

SMALLEST_GAP = 0.01  # log-ratio: what was not shown to be more than 1 % slower is a tie
SURE = 0.05  # p-value below which a difference counts, corrected for the number of rivals
CONFIRMED_AGAINST = 3  # tied rivals that a second process measures again

Raced = tuple[Config, TrialResult]


@dataclass(frozen=True)
class Verdict:
    """The winner of a race, its samples, and how every rival stands to it."""

    config: Config
    result: TrialResult
    rivals: tuple[dict[str, Any], ...]  # as `WinnerRecord.rivals` holds them, best first

    @property
    def tied(self) -> list[Config]:
        """Rivals that the race could not show to be more than 1 % slower."""
        return [rival["config"] for rival in self.rivals if rival["tied"]]


def judge(raced: Sequence[Raced], default: Config) -> Verdict | None:
    """The winner among configs that were timed in the same blocks, or None if none was.

    The best median leads among those that stayed to the end: whoever left did so as the slower one, and the blocks
    after may be slower for all. Of those within 1 % of it that cannot be told from it, the simplest wins: fewest
    registers, least shared memory, closest to the default.
    """
    timed = {config_key(config): (config, result) for config, result in raced if result.ok and result.samples_us}
    if not timed:
        return None
    most = max(len(result.samples_us) for _, result in timed.values())
    stayed = {key: raced for key, raced in timed.items() if len(raced[1].samples_us) == most}
    leader = min(stayed, key=lambda key: (stayed[key][1].median_us, key))
    against_leader = _compare_all(stayed, leader)
    p_values = holm({key: c.p_slower for key, c in against_leader.items()})
    near = [key for key, c in against_leader.items() if c.log_ratio < SMALLEST_GAP]  # in a noisy race all look alike
    equals = [key for key in near if p_values[key] >= SURE and against_leader[key].low <= 0.0]
    winner = min([leader, *equals], key=lambda key: _simplicity(*timed[key], default))
    standing = _compare_all(timed, winner)
    ordered = sorted(standing, key=lambda key: standing[key].log_ratio)
    rivals = tuple(_rival(timed[key][0], standing[key]) for key in ordered)
    config, result = timed[winner]
    return Verdict(config, result, rivals)


def is_contradicted(winner: Config, second: Sequence[Raced]) -> bool:
    """True if another race found a rival clearly faster than the winner, by more than a tie's gap."""
    timed = {config_key(config): (config, result) for config, result in second if result.ok and result.samples_us}
    if config_key(winner) not in timed:
        return True
    found = _compare_all(timed, config_key(winner))
    sure = holm({key: c.p_faster for key, c in found.items()})
    return any(sure[key] < SURE and c.log_ratio < -SMALLEST_GAP for key, c in found.items())


def pooled(first: Sequence[Raced], second: Sequence[Raced]) -> list[Raced]:
    """The samples of both races, block after block; a rival that left the first early keeps what it has."""
    again = {config_key(config): result for config, result in second if result.ok}
    most = max((len(result.samples_us) for _, result in first), default=0)
    found = []
    for config, result in first:
        more = again.get(config_key(config))
        if more is not None and len(result.samples_us) == most:
            timing = summarize((*result.samples_us, *more.samples_us))
            result = replace(result, **vars(timing))
        found.append((config, result))
    return found


def again(verdict: Verdict, default: Config) -> list[Config]:
    """What a second process measures: the winner, its closest ties, the next rival; the default last, if it raced."""
    tied, slower = verdict.tied[:CONFIRMED_AGAINST], [r["config"] for r in verdict.rivals if not r["tied"]][:1]
    unique = {config_key(config): config for config in (verdict.config, *tied, *slower) if config != default}
    ran = default in (verdict.config, *(rival["config"] for rival in verdict.rivals))
    return [*unique.values(), *([default] if ran else [])]


Outcome = Literal["provisional", "confirmed"]


def settle(first: Sequence[Raced], second: Sequence[Raced], default: Config) -> tuple[Verdict, Outcome] | None:
    """The verdict over two races, confirmed if the second does not contradict the first; None if nothing was timed."""
    verdict = judge(first, default)
    if verdict is None:
        return None
    if is_contradicted(verdict.config, second):
        both = judge(pooled(first, second), default)
        return (both or verdict), "provisional"
    raced_alone = not verdict.rivals and verdict.config != default  # nothing speaks for it but that it runs
    return verdict, "provisional" if raced_alone else "confirmed"


def _compare_all(timed: Mapping[str, Raced], base: str) -> dict[str, Comparison]:
    samples = timed[base][1].samples_us
    return {key: compare(result.samples_us, samples) for key, (_, result) in timed.items() if key != base}


def _simplicity(config: Config, result: TrialResult, default: Config) -> tuple[Any, ...]:
    resources = result.resources or {}
    changed = sum(config[name] != default.get(name) for name in config)
    return (
        int(resources.get("registers", 0)),
        int(resources.get("shared_bytes", 0)),
        changed,
        result.median_us,
        config_key(config),
    )


def _rival(config: Config, found: Comparison) -> dict[str, Any]:
    return {
        "config": dict(config),
        "tied": found.low < SMALLEST_GAP and found.log_ratio <= LEAVES_AT,
        "blocks": found.blocks,
        "log_ratio": found.log_ratio,
        "low": found.low,
        "high": found.high,
    }
