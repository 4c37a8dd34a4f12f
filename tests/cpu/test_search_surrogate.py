"""The surrogate of the search: distances, targets, what it learns of the parameters, what it chooses."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from cpu.search_fakes import DEFAULT, SPACE, SPEC, make_landscape

from nsa_autotune.search import surrogate
from nsa_autotune.search.space import config_key
from nsa_autotune.search.surrogate import FIRST_LENGTH, Scales, Surrogate
from nsa_autotune.spec import Config

NAMES = [param.name for param in SPEC.params]
CONFIGS = list(SPACE.configs())


def apart(a: Config, b: Config) -> dict[str, float]:
    """Steps between two configs, by parameter."""
    steps = surrogate.distances(surrogate.encode(SPEC, [a]), surrogate.encode(SPEC, [b]))
    return {name: float(step) for name, step in zip(NAMES, steps[:, 0, 0], strict=True) if step}


def test_numbers_are_as_far_apart_as_their_places_and_switches_by_one() -> None:
    other = {**DEFAULT, "BLOCK_N": 128, "num_stages": 1, "swap": True, "order": "union"}
    assert apart(DEFAULT, other) == {"BLOCK_N": 2.0, "num_stages": 1.0, "swap": 1.0, "order": 1.0}
    assert apart(DEFAULT, DEFAULT) == {}


def test_slow_configs_and_failures_count_as_the_median() -> None:
    found = surrogate.targets([10.0, None, 20.0, 5000.0])
    assert list(found) == pytest.approx([math.log(10), math.log(20), math.log(20), math.log(20)])


def test_what_makes_no_difference_gets_a_long_length() -> None:
    rng = random.Random(0)
    some = rng.sample(CONFIGS, 60)
    values = np.array([0.3 * NAMES.index("BLOCK_N") * math.log2(int(config["BLOCK_N"])) for config in some])
    points = surrogate.encode(SPEC, some)
    scales = surrogate.fit(surrogate.distances(points, points), values, surrogate.first_scales(SPEC))
    lengths = dict(zip(NAMES, scales.lengths, strict=True))
    assert lengths["num_warps"] > 2 * lengths["BLOCK_N"] and lengths["num_stages"] > 2 * lengths["BLOCK_N"]
    assert lengths["pad"] == FIRST_LENGTH  # it has one value


def test_a_prediction_passes_through_what_was_measured_and_is_unsure_far_away() -> None:
    some = [DEFAULT, {**DEFAULT, "num_warps": 16}]
    far = {**DEFAULT, "order": "union", "BLOCK_T": 16, "BLOCK_N": 128, "num_stages": 5, "swap": True}
    points = surrogate.encode(SPEC, some)
    others = surrogate.encode(SPEC, [*some, far])
    scales = Scales(np.full(len(NAMES), 1.0), noise=1e-4)
    values = np.array([1.0, 3.0])
    own, across = surrogate.distances(points, points), surrogate.distances(points, others)
    mean, deviation = surrogate.predict(own, values, across, scales)
    assert mean == pytest.approx([1.0, 3.0, 2.0], abs=0.01)  # the mean of all, where nothing is known
    assert deviation[:2].max() < 0.1 * deviation[2]


def test_the_expected_gain_of_a_sure_and_of_an_unsure_guess() -> None:
    gain = surrogate.expected_gain(np.array([0.0, 1.0, 1.0]), np.array([1e-9, 1e-9, 1.0]), best=1.0)
    assert gain == pytest.approx([1.0, 0.0, 1 / math.sqrt(2 * math.pi)], abs=1e-6)


def test_nothing_is_chosen_before_two_times_are_known() -> None:
    other = {**DEFAULT, "num_warps": 8}
    assert Surrogate(SPEC).choose([(DEFAULT, 1.0), (other, None)], [], CONFIGS) is None


def test_what_is_under_way_is_not_what_is_proposed_beside_it() -> None:
    known = [({**DEFAULT, "num_stages": stages}, 100.0 / stages) for stages in (1, 2, 3)]
    candidates = [{**DEFAULT, "num_stages": stages, "swap": swap} for stages in (4, 5) for swap in (False, True)]
    first = Surrogate(SPEC).choose(known, [], candidates)
    assert first in candidates
    left = [config for config in candidates if config != first]
    assert Surrogate(SPEC).choose(known, [first], left) in left


def test_of_many_trials_the_fastest_and_the_newest_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "MOST_KNOWN", 4)
    times = [1.0, 9.0, None, 8.0, 2.0, 7.0, 6.0]
    known = list(zip(CONFIGS, times, strict=False))
    assert [time_us for _, time_us in surrogate._most_telling(known)] == [1.0, 2.0, 7.0, 6.0]
    assert surrogate._most_telling(known[:4]) == known[:4]


@pytest.mark.parametrize("seed", range(3))
def test_40_choices_beat_the_best_of_40_at_random(seed: int) -> None:
    time_us, rng = make_landscape(seed), random.Random(seed)
    drawn = rng.sample(CONFIGS, 40)
    known = [(config, time_us(config)) for config in drawn[:8]]
    learned = Surrogate(SPEC)
    while len(known) < 40:
        keys = {config_key(config) for config, _ in known}
        config = learned.choose(known, [], [config for config in CONFIGS if config_key(config) not in keys])
        assert config is not None
        known.append((config, time_us(config)))
    best = min(value for _, value in known if value is not None)
    assert best < min(value for value in map(time_us, drawn) if value is not None)
