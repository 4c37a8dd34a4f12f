"""Which config to try next, never one twice: seeds, a few at random, then what a surrogate of the times promises most.

The surrogate looks at a pool of random configs and at the neighbours of the best. Every few proposals Optuna's TPE is
asked instead, which knows nothing of the surrogate's assumptions.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import optuna
from optuna.trial import Trial, TrialState

from ..spec import Config
from .space import ConfigSpace, config_key
from .surrogate import Surrogate

MAX_ASKS = 8  # proposals of the sampler that may turn out known or illegal before chance decides
POLISH_BASES = 3  # the best configs whose neighbourhoods are searched
START = 8  # configs known or under way before the surrogate is asked
TPE_EVERY = 8  # proposals, of which one is TPE's
POOL, POOL_GROWTH = 400, 16  # random configs that the surrogate looks at, and how many are new each time


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna's log lines and warnings of experimental switches are off inside, and as before afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


class ConfigSearch:
    """Proposes configs and learns from their times; lives in memory, rebuilt from stored trials with `remember`."""

    def __init__(self, space: ConfigSpace, *, seed: int = 0, seeds: Iterable[Config] = ()) -> None:
        self.space = space
        self._rng = random.Random(seed)
        self._times_us: dict[str, float | None] = {}  # config key -> median, None if it failed
        self._configs: dict[str, Config] = {}
        self._queue = deque(config for config in seeds if space.is_legal(config))
        self._twins: set[str] = set()  # keys of configs that run the code of another one
        self._asked: dict[str, Trial] = {}
        self._seen: set[str] = set()  # keys of all configs that are known or under way
        self._proposed: dict[str, Config] = {}
        self._surrogate = Surrogate(space.spec)
        self._pool: dict[str, Config] = {}
        self._num_guided = 0
        self._distributions = space.distributions()
        with quiet_optuna():
            sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
            self._study = optuna.create_study(direction="minimize", sampler=sampler)

    def ranked(self) -> list[tuple[Config, float]]:
        """Configs that worked with their medians in us, fastest first, one of each machine code; ties by their keys."""
        timed = ((time_us, key) for key, time_us in self._times_us.items() if time_us is not None)
        return [(self._configs[key], time_us) for time_us, key in sorted(timed) if key not in self._twins]

    @property
    def best(self) -> tuple[Config, float] | None:
        """The fastest config so far and its median in us."""
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def propose(self, *, polish: bool = False) -> Config | None:
        """A legal config that was never proposed or recorded, or None if there is none left.

        `polish` looks next to the best configs only, unless they have no unseen neighbour.
        """
        config = self._next_seed()
        if config is None and polish:
            config = self._next_neighbour()
        if config is None:
            config = self._next_guided() or self.space.sample(self._rng, self._seen) or self._next_neighbour()
        if config is not None:
            self._seen.add(config_key(config))  # several may be proposed before the first is recorded
            self._proposed[config_key(config)] = config
        return config

    def record(self, config: Config, median_us: float | None, *, twin: bool = False) -> None:
        """Learn the time of a config in us; None means that it failed, which counts as bad and not as unknown.

        A twin has the time of another config with the same machine code: the sampler learns it, no race needs it.
        """
        key = config_key(config)
        self._times_us[key] = median_us
        self._twins |= {key} if twin else set()
        self._configs[key] = config
        self._seen.add(key)
        value = math.log(median_us) if median_us is not None else None
        state = TrialState.COMPLETE if median_us is not None else TrialState.PRUNED  # TPE forgets what is told as FAIL
        with quiet_optuna():
            if key in self._asked:
                self._study.tell(self._asked.pop(key), value, state=state)
                return
            if not self.space.is_usual(config):
                return  # the sampler knows nothing beyond the ends
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state, value=value, params=self.space.to_params(config), distributions=self._distributions
                )
            )

    def remember(self, config: Config, median_us: float | None, *, twin: bool = False) -> None:
        """`record` for a stored trial: ignored if the space no longer holds the config, or if it is known already."""
        if self.space.is_legal(config) and config_key(config) not in self._times_us:
            self.record(config, median_us, twin=twin)

    def is_seen(self, config: Config) -> bool:
        """True for a config that is known, excluded or under way."""
        return config_key(config) in self._seen

    def exclude(self, keys: Iterable[str]) -> None:
        """Never propose the configs with these keys."""
        self._seen.update(keys)

    def _next_seed(self) -> Config | None:
        while self._queue:
            config = self._queue.popleft()
            if config_key(config) not in self._seen:
                return config
        return None

    def _next_neighbour(self) -> Config | None:
        """The most promising neighbour of the best config that has an unseen one."""
        for base, _ in self.ranked()[:POLISH_BASES]:
            neighbours = self._unseen(self.space.neighbours(base))
            if neighbours:
                return self._choose(neighbours)
        return None

    def _next_guided(self) -> Config | None:
        """The surrogate's choice or TPE's; None while too little is known, or if nothing is left to choose from."""
        if len(self._seen) < START or not self.ranked():
            return None
        self._num_guided += 1
        if self._num_guided % TPE_EVERY == 0:
            return self._ask()
        self._fill_pool()
        near = [config for base, _ in self.ranked()[:POLISH_BASES] for config in self.space.neighbours(base)]
        candidates = self._unseen([*self._pool.values(), *near])
        return self._choose(candidates) if candidates else None

    def _fill_pool(self) -> None:
        """Drop what was tried and the oldest, add what was not; a space that is a list is looked at whole."""
        if self.space.spec.only is not None:
            self._pool = {config_key(config): config for config in self.space.configs()}
            return
        left = [(key, config) for key, config in self._pool.items() if key not in self._seen]
        self._pool = dict(left[-(POOL - POOL_GROWTH) :])
        taken = self._seen | self._pool.keys()
        while len(self._pool) < POOL:
            config = self.space.sample(self._rng, taken)
            if config is None:
                return
            key = config_key(config)
            self._pool[key] = config
            taken.add(key)

    def _unseen(self, configs: Iterable[Config]) -> list[Config]:
        found = {config_key(config): config for config in configs}
        return [config for key, config in found.items() if key not in self._seen]

    def _choose(self, candidates: list[Config]) -> Config:
        known = [(config, self._times_us[key]) for key, config in self._configs.items()]
        pending = [config for key, config in self._proposed.items() if key not in self._times_us]
        return self._surrogate.choose(known, pending, candidates) or self._rng.choice(candidates)

    def _ask(self) -> Config | None:
        """TPE's proposal, moved to a legal unseen config one value away if need be."""
        with quiet_optuna():
            refused = []
            try:
                for _ in range(MAX_ASKS):
                    trial = self._study.ask(self._distributions)
                    config = self.space.from_params(trial.params)
                    key = config_key(config)
                    if key not in self._seen and self.space.is_legal(config):
                        self._asked[key] = trial
                        self._seen.add(key)
                        return config
                    refused.append(trial)  # stays running meanwhile, so that the sampler looks elsewhere
            finally:
                for trial in refused:
                    self._study.tell(trial, state=TrialState.FAIL)
        return self.space.repair(config, seen=self._seen, steps=1)
