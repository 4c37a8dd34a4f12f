"""Configs compiled beside the search: what is drawn, held, handed over and measured because the model likes it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cpu.search_fakes import DEFAULT, FINGERPRINT, PROBLEM, SPEC, FakeMeasurer, digest_of, trials

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.db.store import TuningStore
from nsa_autotune.search import screen as module
from nsa_autotune.search.ahead import Prepared, Unprepared
from nsa_autotune.search.screen import COMPILED_PER_TRIAL, EVERY, Screen
from nsa_autotune.search.space import config_key
from nsa_autotune.search.task import Task
from nsa_autotune.search.tuner import tune_problem
from nsa_autotune.spec import Config

NOTHING_SEEN: Any = SimpleNamespace(is_seen=lambda config: False)


def liking(*favourites: Config) -> Any:
    """A cost model that guesses 1 us for some and more for others; without resources it knows nothing."""
    keys = [config_key(config) for config in favourites]

    def guess_us(problem: Any, config: Config, resources: Any, gpu: Any) -> float | None:
        if not resources:
            return None
        return 1.0 if config_key(config) in keys else 10.0 + float(config["num_stages"])  # type: ignore[arg-type]

    return SimpleNamespace(guess_us=guess_us)


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def make_screen(store: TuningStore, monkeypatch: pytest.MonkeyPatch, model: Any, at_once: int = 6) -> Screen:
    monkeypatch.setattr(module, "gpu_of", lambda fingerprint: "a GPU")
    monkeypatch.setattr(module, "known_correction", lambda store, spec: model)
    return Screen(Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC)), store, at_once, seed=1)


def compiled(config: Config, code: str = "") -> Prepared:
    return Prepared(config, code=code or config_key(config), resources={"registers": 32})


def test_a_few_configs_are_drawn_for_each_trial_and_never_twice(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = make_screen(store, monkeypatch, liking(), at_once=6)
    first = screen.draw(0, NOTHING_SEEN)
    assert len(first) == COMPILED_PER_TRIAL and screen.draw(0, NOTHING_SEEN) == []
    assert len(screen.draw(9, NOTHING_SEEN)) == 6 - COMPILED_PER_TRIAL  # no more at a time
    assert all(screen.collect(compiled(config)) for config in first)
    again = screen.draw(9, NOTHING_SEEN)
    assert len(again) == COMPILED_PER_TRIAL and not {*map(config_key, first)} & {*map(config_key, again)}
    everything_seen: Any = SimpleNamespace(is_seen=lambda config: True)
    assert make_screen(store, monkeypatch, liking()).draw(0, everything_seen) == []
    assert make_screen(store, monkeypatch, liking(), at_once=0).draw(0, NOTHING_SEEN) == []


def test_what_is_held_or_being_compiled_is_handed_over(store: TuningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = make_screen(store, monkeypatch, liking())
    held, compiling, broken, *_ = screen.draw(0, NOTHING_SEEN)
    assert not screen.collect(compiled(DEFAULT)) or config_key(DEFAULT) == config_key(held)
    assert screen.collect(compiled(held)) and screen.take(held) == compiled(held) and screen.take(held) is None
    assert screen.release(compiling) and not screen.release(compiling)
    assert not screen.collect(compiled(compiling)), "it belongs to whoever took it over"
    assert screen.collect(Prepared(broken, TrialResult("resource", "spills"))) and screen.take(broken) is None


def test_every_few_turns_the_best_guess_goes_unless_its_code_was_measured(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = make_screen(store, monkeypatch, liking())
    drawn = screen.draw(0, NOTHING_SEEN)
    screen._correction = liking(drawn[1], drawn[2])
    for number, config in enumerate(drawn):
        screen.collect(compiled(config, f"code {number}"))
    turns = [screen.favourite({"code 1"}) for _ in range(EVERY)]
    assert turns[:-1] == [None] * (EVERY - 1)
    assert turns[-1] is not None and turns[-1].config == drawn[2] and screen.take(drawn[1]) is None


class Compilers(Unprepared):
    """Compiles aside, and counts what it is asked for."""

    ahead = aside = 8

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def submit(self, spec: Any, problem: Any, configs: Any) -> None:
        """Queue and count."""
        self.asked += map(config_key, configs)
        super().submit(spec, problem, configs)

    def take(self) -> list[Prepared]:
        """The next, compiled."""
        return [replace(compiled(one.config), failure=one.failure) for one in super().take()]


@pytest.mark.parametrize("seed", range(3))
def test_what_only_the_model_knows_is_measured_and_nothing_is_done_twice(
    seed: int, store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One config of fifty is twice as fast, wherever it lies: no surrogate can tell which."""
    space = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC)).space
    needles = [config for config in space.configs() if zlib.crc32(config_key(config).encode()) % 50 == 0]
    keys = {config_key(config) for config in needles}
    monkeypatch.setattr(module, "gpu_of", lambda fingerprint: "a GPU")
    monkeypatch.setattr(module, "known_correction", lambda store, spec: liking(*needles))
    preparer, measurer = Compilers(), FakeMeasurer(lambda config: 50.0 if config_key(config) in keys else 100.0)
    how: dict[str, Any] = {"measurer": measurer, "preparer": preparer, "store": store, "digest_of": digest_of}
    winner = tune_problem(SPEC, PROBLEM, fingerprint=FINGERPRINT, budget=trials(24), seed=seed, **how)
    assert winner is not None and config_key(winner.config) in keys
    assert len(measurer.measured) == 24 == len({*measurer.measured})
    assert 48 < len(preparer.asked) == len({*preparer.asked})
    missed = keys & {*preparer.asked} - {*measurer.measured}
    assert len(missed) <= 1, "what was compiled last may come too late"
