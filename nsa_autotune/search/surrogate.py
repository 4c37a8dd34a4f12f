"""A Gaussian process over log-times: which unmeasured config promises most, given the few that were measured.

A kernel's time is rough in its parameters but mostly one step at a time, so that the covariance falls off as
exp(-sum of distances), each parameter with a length of its own that the measurements choose. Whatever is slower than
the median counts as the median, and so does a failure: how bad a bad config is must not bend what is told of good ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..spec import Config, KernelSpec, Param, Value
from .space import is_ordered

Array = NDArray[np.float64]

FIRST_LENGTH, SHORTEST, LONGEST = 2.0, 0.3, 60.0  # steps of a parameter over which times stay alike
LENGTH_FACTOR, NOISE_FACTOR = 3.0, 5.0  # by which a length or the noise is tried longer and shorter
FIRST_NOISE, LEAST_NOISE, MOST_NOISE = 1e-2, 1e-4, 0.3  # of a log-time, in shares of what the parameters explain
LENGTH_PENALTY = 0.2  # of a length's squared log-distance from the first one: few measurements say little
PASSES = 2  # over all lengths in one fit
LEAST_TIMES = 2  # of configs that worked, without which nothing can be guessed
MOST_KNOWN = 256  # trials that are learned from: the effort grows with their cube
REFIT_GROWTH = 1.1  # of the trials since the last fit


@dataclass(frozen=True)
class Scales:
    """What a fit learns: a length for each parameter, and the noise."""

    lengths: Array
    noise: float = FIRST_NOISE


def first_scales(spec: KernelSpec) -> Scales:
    """Before anything is known."""
    return Scales(np.full(len(spec.params), FIRST_LENGTH))


def encode(spec: KernelSpec, configs: Sequence[Config]) -> list[Array]:
    """For each parameter the configs as points: a number by its place among the values, a switch one-hot."""
    tables = [(param.name, _points(param)) for param in spec.params]
    return [np.array([table[config[name]] for config in configs], dtype=float) for name, table in tables]


def _points(param: Param) -> dict[Value, list[float]]:
    if is_ordered(param):
        return {value: [float(at)] for at, value in enumerate(param.widest)}
    return {value: [0.5 * (value == other) for other in param.values] for value in param.values}  # one step apart


def distances(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """[params, configs of a, configs of b]: steps between each two."""
    return np.stack([np.abs(x[:, None, :] - y[None, :, :]).sum(axis=2) for x, y in zip(a, b, strict=True)])


def targets(times_us: Sequence[float | None]) -> Array:
    """Log-times of which at least one worked, none above their median; failures count as the median."""
    known = np.log([time_us for time_us in times_us if time_us is not None])
    middle = float(np.median(known))
    return np.array([middle if time_us is None else min(math.log(time_us), middle) for time_us in times_us])


def _standard(values: Array) -> Array:
    scaled: Array = (values - values.mean()) / (values.std() + 1e-9)
    return scaled


def fit(apart: Array, values: Array, scales: Scales) -> Scales:
    """Scales that make the values likely, found by steps from the given ones; `apart` as of `distances`."""
    wanted = _standard(values)
    best = _unlikeliness(apart, wanted, scales)
    for _ in range(PASSES):
        for at in range(len(scales.lengths)):
            for factor in (1 / LENGTH_FACTOR, LENGTH_FACTOR):
                lengths = scales.lengths.copy()
                lengths[at] = np.clip(lengths[at] * factor, SHORTEST, LONGEST)
                best, scales = _better(apart, wanted, best, scales, replace(scales, lengths=lengths))
        for factor in (1 / NOISE_FACTOR, NOISE_FACTOR):
            noise = min(MOST_NOISE, max(LEAST_NOISE, scales.noise * factor))
            best, scales = _better(apart, wanted, best, scales, replace(scales, noise=noise))
    return scales


def _better(apart: Array, wanted: Array, best: float, scales: Scales, other: Scales) -> tuple[float, Scales]:
    found = _unlikeliness(apart, wanted, other)
    return (found, other) if found < best else (best, scales)


def _covariance(apart: Array, scales: Scales) -> Array:
    alike: Array = np.exp(-np.tensordot(1 / scales.lengths, apart, axes=1))
    return alike


def _unlikeliness(apart: Array, wanted: Array, scales: Scales) -> float:
    """Negative log-likelihood without its constant, the variance at its best, plus the penalty of the lengths."""
    root = np.linalg.cholesky(_covariance(apart, scales) + scales.noise * np.eye(len(wanted)))
    whitened = np.linalg.solve(root, wanted)
    variance = max(float(whitened @ whitened) / len(wanted), 1e-9)
    penalty = LENGTH_PENALTY * float((np.log(scales.lengths / FIRST_LENGTH) ** 2).sum())
    return 0.5 * len(wanted) * math.log(variance) + float(np.log(np.diag(root)).sum()) + penalty


def predict(own: Array, values: Array, to_others: Array, scales: Scales) -> tuple[Array, Array]:
    """Mean and standard deviation of other configs' log-times; `own` and `to_others` as of `distances`."""
    centre, spread = float(values.mean()), float(values.std()) + 1e-9
    root = np.linalg.cholesky(_covariance(own, scales) + scales.noise * np.eye(len(values)))
    whitened = np.linalg.solve(root, (values - centre) / spread)
    across = np.linalg.solve(root, _covariance(to_others, scales))
    variance = float(whitened @ whitened) / len(values)
    deviation = np.sqrt(np.maximum(1e-9, (1 - (across**2).sum(axis=0)) * variance))
    return across.T @ whitened * spread + centre, deviation * spread


def expected_gain(mean: Array, deviation: Array, best: float) -> Array:
    """Expected improvement on the best log-time."""
    z = (best - mean) / deviation
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    gain: Array = deviation * (z * below + np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    return gain


class Surrogate:
    """The process of one search: keeps what it learned of the scales, and learns anew as trials become more."""

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self._scales = first_scales(spec)
        self._fitted_to = 0

    def choose(
        self, known: Sequence[tuple[Config, float | None]], pending: Sequence[Config], candidates: Sequence[Config]
    ) -> Config | None:
        """The candidate with the largest expected gain, if those under way turn out as guessed; None before 2 times."""
        known = _most_telling(known)
        if sum(time_us is not None for _, time_us in known) < LEAST_TIMES:
            return None
        values = targets([time_us for _, time_us in known])
        points = encode(self._spec, [config for config, _ in known])
        own = distances(points, points)
        if len(known) >= REFIT_GROWTH * self._fitted_to:
            self._scales, self._fitted_to = fit(own, values, self._scales), len(known)
        if pending:
            more = encode(self._spec, pending)
            guesses, _ = predict(own, values, distances(points, more), self._scales)
            values = np.concatenate([values, guesses])
            points = [np.concatenate(pair) for pair in zip(points, more, strict=True)]
            own = distances(points, points)
        to_candidates = distances(points, encode(self._spec, candidates))
        mean, deviation = predict(own, values, to_candidates, self._scales)
        return candidates[int(np.argmax(expected_gain(mean, deviation, float(values.min()))))]


def _most_telling(known: Sequence[tuple[Config, float | None]]) -> Sequence[tuple[Config, float | None]]:
    """Of many trials the fastest and the newest, half each."""
    if len(known) <= MOST_KNOWN:
        return known
    times = [math.inf if time_us is None else time_us for _, time_us in known]
    fastest = set(sorted(range(len(known)), key=times.__getitem__)[: MOST_KNOWN // 2])
    newest = [at for at in range(len(known)) if at not in fastest][-(MOST_KNOWN // 2) :]
    return [known[at] for at in sorted([*fastest, *newest])]
