"""Configs that are compiled beside the search, so that the cost model can choose which of them are measured.

Compilers are idle where a GPU measures, and a guess from the binary (registers, shared memory, waves) names a config
near the best among its first sixteen. So several random configs are compiled for each one that is measured, and every
few trials the most promising of them takes a turn. What the search proposes itself need not be compiled again.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from ..db.store import TuningStore
from ..spec import Config
from .ahead import Prepared
from .guess import gpu_of
from .space import config_key
from .study import ConfigSearch
from .task import Task, known_correction

COMPILED_PER_TRIAL = 4
EVERY = 3  # trials of the search, after which a favourite of the model is measured


class Screen:
    """Random configs of one tuning, compiled or about to be; `at_once` of them at a time, none if 0."""

    def __init__(self, task: Task, store: TuningStore, at_once: int, seed: int) -> None:
        self._task = task
        self._gpu = gpu_of(task.fingerprint) if at_once else None
        self._correction = known_correction(store, task.spec) if self._gpu is not None else None
        self._at_once = at_once
        self._rng = random.Random(seed)
        self._drawn: set[str] = set()
        self._compiling: set[str] = set()
        self._held: dict[str, tuple[float, Prepared]] = {}  # by key: guess in us
        self._turns = 0

    def draw(self, num_trials: int, search: ConfigSearch) -> list[Config]:
        """What to begin to compile after so many trials, of what the search has not seen."""
        if self._correction is None:
            return []
        room = self._at_once - len(self._compiling)
        count = min(room, COMPILED_PER_TRIAL * (num_trials + 1) - len(self._drawn))
        found: list[Config] = []
        for _ in range(count):
            config = self._task.space.sample(self._rng, self._drawn)
            if config is None:
                break
            self._drawn.add(config_key(config))
            if not search.is_seen(config):
                found.append(config)
        self._compiling |= {config_key(config) for config in found}
        return found

    def collect(self, prepared: Prepared) -> bool:
        """Hold a config that was drawn here; False if it was not. One that cannot run is forgotten."""
        key = config_key(prepared.config)
        if key not in self._compiling:
            return False
        self._compiling.discard(key)
        guess_us = self._guess_us(prepared)
        if guess_us is not None:
            self._held[key] = (guess_us, prepared)
        return True

    def release(self, config: Config) -> bool:
        """True if the config is being compiled for the screen; from now on it is the caller's."""
        key = config_key(config)
        released = key in self._compiling
        self._compiling.discard(key)
        return released

    def take(self, config: Config) -> Prepared | None:
        """The config, if it is held."""
        found = self._held.pop(config_key(config), None)
        return found[1] if found is not None else None

    def favourite(self, measured_codes: Collection[str]) -> Prepared | None:
        """Every few calls the config with the best guess, of those whose machine code was not measured yet."""
        self._turns += 1
        if self._turns % EVERY:
            return None
        left = {key: held for key, held in self._held.items() if held[1].code not in measured_codes}
        self._held = left
        best = min(left, key=lambda key: (left[key][0], key), default=None)
        return self._held.pop(best)[1] if best is not None else None

    def _guess_us(self, prepared: Prepared) -> float | None:
        if prepared.failure is not None or self._correction is None or self._gpu is None:
            return None
        return self._correction.guess_us(self._task.problem, prepared.config, prepared.resources, self._gpu)
