"""The legal configs of a problem: enumeration, sampling, neighbourhoods and their form as Optuna parameters."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from ..spec import Config, KernelSpec, Param, Problem, Value, canonical_json

SCAN_LIMIT = 200_000  # points looked at before a space counts as too large to enumerate
SAMPLE_TRIES = 300  # random points tried before it is walked from the default config
WALKS = 40  # before a space counts as exhausted, each of at most as many steps as there are parameters
REPAIR_STEPS = 12  # configs from which a legal one is looked for, before there is none


def config_key(config: Mapping[str, Value]) -> str:
    """Canonical JSON of a config: the name under which it is counted, compared and never measured twice."""
    return canonical_json(dict(config))


def is_ordered(param: Param) -> bool:
    """True if a value's neighbours in `param.values` are its neighbours in meaning: numbers, but not switches."""
    return len(param.values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in param.values)


@dataclass(frozen=True)
class ConfigSpace:
    """All configs of one family that may serve one problem; every method is a pure function of the two."""

    spec: KernelSpec
    problem: Problem

    def is_legal(self, config: Config) -> bool:
        """True if the config has exactly the family's parameters and breaks no constraint."""
        return self.spec.broken_constraint(self.problem, config) is None

    def is_usual(self, config: Config) -> bool:
        """True if no value lies beyond the ends of its parameter, in the reserve."""
        return all(config[param.name] in param.values for param in self.spec.params)

    @property
    def num_points(self) -> int:
        """Size of the full grid, illegal points included."""
        return math.prod(len(param.values) for param in self.spec.params)

    def configs(self) -> Iterator[Config]:
        """Legal configs, lazily, in the order of the parameters' values."""
        if self.spec.only is not None:
            yield from filter(self.is_legal, self.spec.only)
            return
        names = [param.name for param in self.spec.params]
        for values in itertools.product(*(param.values for param in self.spec.params)):
            config = dict(zip(names, values, strict=True))
            if self.is_legal(config):
                yield config

    def all_if_at_most(self, limit: int) -> list[Config] | None:
        """Every legal config if there are at most `limit` and the grid is small enough to walk, else None."""
        if self.spec.only is None and self.num_points > SCAN_LIMIT:
            return None
        found = list(itertools.islice(self.configs(), limit + 1))
        return found if len(found) <= limit else None

    def sample(self, rng: random.Random, seen: Collection[str] = ()) -> Config | None:
        """A random legal config whose key is not in `seen`, or None if none turned up.

        Where hardly any point is legal, since switches need each other, random walks from one legal config to the next
        find them.
        """
        if self.spec.only is not None:
            left = [config for config in self.configs() if config_key(config) not in seen]
            return rng.choice(left) if left else None
        for _ in range(SAMPLE_TRIES):
            config = {param.name: rng.choice(param.values) for param in self.spec.params}
            if config_key(config) not in seen and self.is_legal(config):
                return config
        if self.num_points <= SCAN_LIMIT:
            return next((config for config in self.configs() if config_key(config) not in seen), None)
        walked = (self._walk(rng) for _ in range(WALKS))
        return next((config for config in walked if config_key(config) not in seen), None)

    def _walk(self, rng: random.Random) -> Config:
        """Where a walk over legal configs ends: each step sets a parameter at random, and another one if it must.

        It begins with a switch set at random and all that this needs, for chance seldom sets many at once.
        """
        config = self.spec.default_config(self.problem)
        movable = [param for param in self.spec.params if len(param.values) > 1]
        if switches := [param for param in movable if param.structural]:
            param = rng.choice(switches)
            config = self.repair({**config, param.name: rng.choice(param.values)}, param.name) or config
        for _ in range(rng.randrange(len(movable) + 1)):
            param = rng.choice(movable)
            config = self.repair({**config, param.name: rng.choice(param.values)}, param.name, steps=1) or config
        return config

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Legal configs one step away: the next legal value on either side of a number, any other value of a switch.

        A number at its end steps into the reserve. A switch that is illegal alone is tried together with the others
        that it needs.
        """
        for param in self.spec.params:
            if is_ordered(param):
                yield from self._steps(config, param)
            else:
                for value in param.values:
                    if value != config[param.name]:
                        moved = self.repair({**config, param.name: value}, keep=param.name)
                        if moved is not None:
                            yield moved

    def _steps(self, config: Config, param: Param) -> Iterator[Config]:
        at = param.widest.index(config[param.name])
        for side in (param.widest[at + 1 :], param.widest[:at][::-1]):
            moved = ({**config, param.name: value} for value in side)
            step = next((candidate for candidate in moved if self.is_legal(candidate)), None)
            if step is not None:
                yield step

    def repair(
        self, config: Config, keep: str = "", seen: Collection[str] = (), steps: int = REPAIR_STEPS
    ) -> Config | None:
        """The config if it is legal and unseen, else the first one found with other values (not of `keep`) that is.

        Of what was reached by changing single values, what breaks the fewest constraints is changed next.
        """
        if self.is_legal(config) and config_key(config) not in seen:
            return config
        order = itertools.count()  # of equals, what was found first
        reached, waiting = {config_key(config)}, [(self._broken(config), next(order), config)]
        for _ in range(steps):
            if not waiting:
                return None
            for moved in self._moves(heapq.heappop(waiting)[2], keep):
                if (key := config_key(moved)) not in reached:
                    if self.is_legal(moved) and key not in seen:
                        return moved
                    reached.add(key)
                    heapq.heappush(waiting, (self._broken(moved), next(order), moved))
        return None

    def _moves(self, config: Config, keep: str) -> Iterator[Config]:
        """The config with one other value of any parameter but `keep`, near values first."""
        for param in self.spec.params:
            if param.name != keep:
                for value in sorted(param.values, key=lambda v: _distance(param, config[param.name], v)):
                    yield {**config, param.name: value}

    def _broken(self, config: Config) -> int:
        """Constraints that the config breaks."""
        return sum(not constraint.holds(self.problem, config) for constraint in self.spec.constraints)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view: an index into the values for numbers, a choice for switches; fixed parameters are left out."""
        return {param.name: _distribution(param) for param in self.spec.params if len(param.values) > 1}

    def to_params(self, config: Config) -> dict[str, Any]:
        """A config as Optuna parameters."""
        return {
            param.name: param.values.index(config[param.name]) if is_ordered(param) else config[param.name]
            for param in self.spec.params
            if len(param.values) > 1
        }

    def from_params(self, params: Mapping[str, Any]) -> Config:
        """Optuna parameters as a config, fixed parameters filled in."""
        return {
            param.name: _value(param, params[param.name]) if len(param.values) > 1 else param.values[0]
            for param in self.spec.params
        }


def _distance(param: Param, a: Value, b: Value) -> int:
    return abs(param.widest.index(a) - param.widest.index(b))


def _distribution(param: Param) -> BaseDistribution:
    if is_ordered(param):  # an index serves powers of two by their exponent and uneven steps alike
        return IntDistribution(0, len(param.values) - 1)
    return CategoricalDistribution(param.values)


def _value(param: Param, suggested: Any) -> Value:
    return param.values[int(suggested) if is_ordered(param) else param.values.index(suggested)]
