"""A sweep: which problems of a grid are tuned, at which member of a bucket, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidInput, InvalidProblem
from ..spec import KernelSpec, Problem
from .presets import doublings, tuning_problems
from .task import problem_distance

MAX_COUNT = 1 << 20  # of sequences or heads; beyond it a number is a slip of the keyboard


@dataclass(frozen=True)
class Step:
    """One problem to tune."""

    spec: KernelSpec
    problem: Problem


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep does, and what it leaves out with the reasons."""

    steps: tuple[Step, ...]
    merged: int = 0  # problems that the largest one of their bucket stands for
    skipped: tuple[tuple[str, int], ...] = ()  # reason, combinations; most frequent first


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Numbers of a list such as `1,4`, or of a range that doubles, `8..64`; repeated ones are dropped."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        numbers = [_parse_count(number, text, option) for number in ((first, last) if dots else (first,))]
        found += doublings(numbers[0], numbers[1], part) if dots else numbers
    return tuple(dict.fromkeys(found))


def _parse_count(part: str, text: str, option: str) -> int:
    digits = part.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9 and 0 < int(digits) <= MAX_COUNT):
        rule = f"{option} takes whole numbers from 1 to {MAX_COUNT}"
        raise InvalidInput(rule, {option: text[:40]}, f"Write for example {option} 4, {option} 4,8 or {option} 4..32.")
    return int(digits)


def plan_sweep(
    specs: Sequence[KernelSpec],
    problems: Iterable[Problem],
    skipped: Mapping[str, int] | None = None,
) -> SweepPlan:
    """Family by family, neighbours together, one problem a bucket; `skipped` counts combinations refused before.

    Raises InvalidProblem if nothing is left.
    """
    reasons = Counter(skipped or {})
    every = list(problems)
    steps: list[Step] = []
    merged = 0
    for spec in specs:
        members, refused = _legal(spec, every)
        reasons.update(refused)
        largest = largest_of_buckets(spec, members)
        merged += len(members) - len(largest)
        steps += [Step(spec, problem) for problem in ordered(spec, largest)]
    if not steps:
        listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        remedy = "Choose other lengths, batches or heads."
        raise InvalidProblem("the sweep has no legal problem", {"skipped": listed or "no combination"}, remedy)
    return SweepPlan(tuple(steps), merged, tuple(reasons.most_common()))


def _legal(spec: KernelSpec, problems: Iterable[Problem]) -> tuple[list[Problem], Counter[str]]:
    """The problems that are different ones to the family, and why others were refused."""
    found: dict[str, Problem] = {}
    refused: Counter[str] = Counter()
    for problem in problems:
        for part in tuning_problems(spec, problem):
            try:
                spec.check_problem(part)
            except InvalidProblem as error:
                refused[error.rule] += 1
                continue
            found.setdefault(spec.problem_key(part, bucket=False), part)
    return list(found.values()), refused


def largest_of_buckets(spec: KernelSpec, problems: Iterable[Problem]) -> list[Problem]:
    """One problem for each key under which winners are stored: the one with most tokens."""
    found: dict[str, Problem] = {}
    for problem in problems:
        key = spec.problem_key(problem)
        if key not in found or _size(problem) > _size(found[key]):
            found[key] = problem
    return list(found.values())


def _size(problem: Problem) -> tuple[int, int, int]:
    return problem.seq_k, problem.seq_q, problem.batch


def ordered(spec: KernelSpec, problems: Sequence[Problem]) -> list[Problem]:
    """The smallest problem first, then always the one that is nearest to any before it.

    A search starts from the nearest winners, so each problem then has one as near as the set allows; ties go to the
    nearest to the last one, then to the smaller.
    """
    left = sorted(problems, key=_size)
    if not left:
        return []
    found = [left.pop(0)]
    nearest = {index: problem_distance(spec, found[0], problem) for index, problem in enumerate(left)}
    while nearest:
        last = found[-1]
        best = min(nearest, key=lambda index: (nearest[index], problem_distance(spec, last, left[index]), index))
        found.append(left[best])
        del nearest[best]
        for index in nearest:
            nearest[index] = min(nearest[index], problem_distance(spec, left[best], left[index]))
    return found
