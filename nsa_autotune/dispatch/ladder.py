"""The ladder from an exact winner down to the default config, as a pure decision over known winners."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ..spec import DEFAULT_POLICY, Config, KernelSpec, Problem, canonical_json
from .fingerprint import Fingerprint


class Step(StrEnum):
    """How well the served config fits the problem."""

    EXACT = "exact winner"
    OTHER_TOOLCHAIN = "winner of this problem on this GPU, measured with other versions or under another policy"
    NEAREST = "winner of the nearest problem on this GPU"
    ARCHITECTURE = "winner on another GPU of this architecture"
    PREDICTED = "best prediction for this architecture, where nothing was measured"
    DEFAULT = "default config"


class Winner(Protocol):
    """What the ladder reads of a stored winner."""

    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    @property
    def problem(self) -> Mapping[str, Any]: ...
    @property
    def problem_key(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def template_digest(self) -> str: ...
    @property
    def policy(self) -> str: ...


class Predicted(Winner, Protocol):
    """What the ladder reads of a stored prediction."""

    @property
    def status(self) -> str: ...
    @property
    def predicted_us(self) -> float | None: ...
    @property
    def created(self) -> str: ...


@dataclass(frozen=True)
class Measured:
    """A winner's time, and where and how it was taken."""

    gpu: str
    policy: str
    median_us: float


@dataclass(frozen=True)
class Choice:
    """The config to serve, the step it stands on, the key of the problem it was tuned for, and its time there."""

    config: Config
    step: Step
    tuned_key: str = ""
    measured: Measured | None = None  # None of a default or predicted config, and if the source tells no times


SIZES = ("seq_q", "seq_k", "batch", "num_q_heads", "num_kv_heads")
MAX_SIZE = 2**63  # no size of a problem is as large
SAME = ("d_qk", "d_v")  # a config tuned for other head dims says little
HALVES, HALF_GAP = ("bfloat16", "float16"), 0.5  # octaves between the two: the same tiles, registers and bytes


def distance(spec: KernelSpec, problem: Problem, key: str) -> float:
    """Steps between a problem and a tuned one: octaves in size, more for other differences; inf if alien."""
    wanted = json.loads(spec.problem_key(problem))
    tuned = _fields_of(key)
    if set(wanted) != set(tuned) or any(wanted.get(name) != tuned.get(name) for name in SAME):
        return math.inf
    total = 0.0
    for name, value in wanted.items():
        if name in SIZES:
            total += abs(math.log2(value / tuned[name]))
        elif name == "locality":
            total += abs(value - tuned[name])
        elif name == "dtype" and value != tuned[name]:
            total += HALF_GAP if value in HALVES and tuned[name] in HALVES else math.inf
        elif value != tuned[name]:
            total += 4.0
    if {"num_q_heads", "num_kv_heads"} <= wanted.keys():
        group = wanted["num_q_heads"] / wanted["num_kv_heads"]
        total += 2 * abs(math.log2(group * tuned["num_kv_heads"] / tuned["num_q_heads"]))
    return total


def _fields_of(key: str) -> dict[str, Any]:
    """What a stored key says; nothing if no program of ours could have written it."""
    try:
        found = json.loads(key)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    counts = [found[name] for name in SIZES if name in found]
    whole = all(type(count) is int and 0 < count < MAX_SIZE for count in counts)
    return found if whole and isinstance(found.get("locality", 0.0), int | float) else {}


def choose(
    spec: KernelSpec,
    problem: Problem,
    winners: Iterable[Winner],
    here: Fingerprint,
    template_digest: str,
    policy: str = DEFAULT_POLICY,
    can_serve: Callable[[Config], bool] = lambda config: True,
) -> Choice:
    """The best known config that is legal for the problem; of equals, the one measured under `policy`.

    `can_serve` tells whether there is a kernel for a legal config.
    """
    key = spec.problem_key(problem)
    gaps: dict[str, float] = {}
    ranked: list[tuple[int, float, bool, str, Choice]] = []
    order = list(Step)
    for winner in winners:
        if winner.template_digest != template_digest:
            continue
        gap = gaps.get(winner.problem_key)
        if gap is None:  # the first lookup is waited for, and many winners share a problem
            gap = gaps[winner.problem_key] = distance(spec, problem, winner.problem_key)
        step = _step(winner, key, gap, here, policy)
        legal = step is not None and spec.broken_constraint(problem, winner.config) is None
        if step is not None and legal and can_serve(winner.config):
            choice = Choice(dict(winner.config), step, winner.problem_key, _measured(winner))
            ranked.append((order.index(step), gap, winner.policy != policy, winner.problem_key, choice))
    if not ranked:
        return Choice(spec.default_config(problem), Step.DEFAULT)
    return min(ranked, key=lambda item: item[:4])[4]


def choose_predicted(
    spec: KernelSpec, problem: Problem, predictions: Iterable[Predicted], here: Fingerprint, template_digest: str
) -> Choice | None:
    """The config that is guessed fastest on this architecture, of the nearest problem; None if there is none.

    Only the newest guess of a config counts.
    """
    newest: dict[tuple[str, str], Predicted] = {}
    for found in sorted(predictions, key=lambda found: found.created):
        alike = _is_prediction(found) and found.fingerprint.get("capability") == here.capability
        if alike and found.template_digest == template_digest:
            newest[found.problem_key, canonical_json(found.config)] = found
    ranked: list[tuple[float, float, str, str]] = []
    for (key, config), found in newest.items():
        gap = distance(spec, problem, key)
        usable = found.status == "ok" and found.predicted_us is not None and not math.isinf(gap)
        if usable and spec.broken_constraint(problem, found.config) is None:
            ranked.append((gap, found.predicted_us or 0.0, config, key))
    if not ranked:
        return None
    *_, config, key = min(ranked)
    return Choice(dict(newest[key, config].config), Step.PREDICTED, key)


def _step(winner: Winner, key: str, gap: float, here: Fingerprint, policy: str) -> Step | None:
    if math.isinf(gap):
        return None
    if winner.fingerprint.get("gpu") == here.gpu:
        if winner.problem_key != key:
            return Step.NEAREST
        exact = dict(winner.fingerprint) == here.to_dict() and winner.policy == policy
        return Step.EXACT if exact else Step.OTHER_TOOLCHAIN
    if not _is_prediction(winner) and winner.fingerprint.get("capability") == here.capability:
        return Step.ARCHITECTURE
    return None


def _measured(winner: Winner) -> Measured | None:
    median_us = getattr(winner, "median_us", None)
    return None if median_us is None else Measured(str(winner.fingerprint.get("gpu")), winner.policy, median_us)


def _is_prediction(known: Winner) -> bool:
    """True for what was compiled for an absent GPU: it has no device name."""
    return str(known.fingerprint.get("gpu", "")).startswith("target ")
