"""Designs: constants of NSA and group size that the kernels can serve, and the problems that each one means."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..config import NSAConfig
from ..errors import InvalidConfig, InvalidProblem
from ..spec import KernelSpec, Problem
from .presets import takes_one_tensor, tuning_problems

GROUP_SIZE = "group_size"
DIMENSIONS = (  # that are searched
    "select_block_size",
    "num_selected",
    "window_size",
    "compress_stride",
    "compress_block_size",
    GROUP_SIZE,
)
MAX_COMBINATIONS = 20_000  # of values: a search of a few dozen designs sees nothing of a larger space

Choices = Mapping[str, Sequence[int]]  # dimension -> values to try


@dataclass(frozen=True, order=True)
class Design:
    """One point of the search."""

    values: tuple[int, ...]  # of DIMENSIONS, in their order

    def __getitem__(self, dimension: str) -> int:
        return self.values[DIMENSIONS.index(dimension)]

    @property
    def group_size(self) -> int:
        """G = HQ / H."""
        return self[GROUP_SIZE]

    def config(self, base: NSAConfig) -> NSAConfig:
        """`base` with the design's constants; InvalidConfig if they break a rule."""
        return replace(base, **{name: self[name] for name in DIMENSIONS if name != GROUP_SIZE})

    def problem(self, base: Problem) -> Problem:
        """`base` with the design's constants and kv heads; InvalidConfig or InvalidProblem if that cannot be."""
        if base.num_q_heads % self.group_size:
            raise InvalidProblem(
                "the group size must divide the query heads",
                {GROUP_SIZE: self.group_size, "num_q_heads": base.num_q_heads},
                "Name others with --group-sizes.",
            )
        return base.replace(nsa=self.config(base.nsa), num_kv_heads=base.num_q_heads // self.group_size)


def design_of(config: NSAConfig, group_size: int) -> Design:
    """The design with these constants."""
    known = {**config.to_dict(), GROUP_SIZE: group_size}
    return Design(tuple(known[name] for name in DIMENSIONS))


def complete_choices(base: Problem, asked: Choices) -> dict[str, tuple[int, ...]]:
    """Ascending values of every dimension; of one that is not asked for, the base's own."""
    own = {**base.nsa.to_dict(), GROUP_SIZE: base.group_size}
    return {name: tuple(sorted(set(asked.get(name) or [own[name]]))) for name in DIMENSIONS}


def legal_designs(base: Problem, choices: Choices, specs: Iterable[KernelSpec]) -> list[Design]:
    """All combinations that obey the rules of NSAConfig and of every kernel; InvalidConfig if there is none."""
    if (count := math.prod(len(choices[name]) for name in DIMENSIONS)) > MAX_COMBINATIONS:
        rule = f"there may be at most {MAX_COMBINATIONS} combinations of constants"
        raise InvalidConfig(rule, {"combinations": count}, "Give fewer values of some.")
    specs, found, reasons = list(specs), [], Counter[str]()
    for values in itertools.product(*(choices[name] for name in DIMENSIONS)):
        design = Design(values)
        try:
            _check(design.problem(base), specs)
        except (InvalidConfig, InvalidProblem) as error:
            reasons[str(error.rule)] += 1
        else:
            found.append(design)
    if not found:
        raise InvalidConfig(
            "no combination of the constants can work",
            {name: list(choices[name]) for name in DIMENSIONS},
            "; ".join(f"{count} of them: {rule}" for rule, count in reasons.most_common(3)) + ".",
        )
    return found


def launches(spec: KernelSpec, problem: Problem) -> list[tuple[Problem, int]]:
    """The problems that one pass asks of a family, and how often; some take keys and values in turn."""
    parts = tuning_problems(spec, problem)
    times = 2 if takes_one_tensor(spec) and len(parts) == 1 else 1
    return [(part, times) for part in parts]


def _check(problem: Problem, specs: Iterable[KernelSpec]) -> None:
    for spec in specs:
        for part, _ in launches(spec, problem):
            spec.default_config(part)  # obeys every rule and constraint, or raises
