"""Problems that were served below the exact step: counted while a program runs, written for `tune --from-misses`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, NSAError, UnknownName
from ..files import numbered_lines, write_atomic
from ..kernels import get_spec
from ..spec import KernelSpec, Problem, canonical_json
from .ladder import Step

MOST_MISSES = 1000
FIELDS = ("family", "problem", "count", "step")
ANEW = "Delete the line, or export anew with nsa_autotune.export_misses(path)."


@dataclass
class Miss:
    """A family's problem, the step that served it, and how many launches asked for it so far."""

    spec: KernelSpec
    problem: Problem
    step: Step | None  # None: refused, since only an exact winner would do
    count: int = 0

    def to_dict(self) -> dict[str, Any]:
        """By name, ready for JSON."""
        step = "refused" if self.step is None else str(self.step)
        return {"family": self.spec.family, "problem": self.problem.to_dict(), "count": self.count, "step": step}


class Misses:
    """The first thousand missed problems; lengths of one bucket are one problem."""

    def __init__(self) -> None:
        self.left_out = 0  # shapes of problems that came when the thousand were full
        self._known: dict[tuple[str, str], Miss] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, spec: KernelSpec, problem: Problem, step: Step | None) -> Miss:
        """The entry of a missed problem, to count its launches in."""
        key = (spec.family, spec.problem_key(problem))
        if key not in self._known and len(self._known) >= MOST_MISSES:
            self.left_out += 1
            return Miss(spec, problem, step)
        return self._known.setdefault(key, Miss(spec, problem, step))

    def most_asked(self) -> list[Miss]:
        """All entries, the most launched first."""
        return sorted(self._known.values(), key=lambda miss: -miss.count)

    def export(self, path: str | Path) -> int:
        """Write one JSON object a line, whole or not at all; returns how many. Raises InvalidInput if it cannot."""
        entries = self.most_asked()
        try:
            write_atomic(Path(path), "".join(canonical_json(miss.to_dict()) + "\n" for miss in entries))
        except OSError as error:
            values = {"file": str(path), "reason": error.strerror}
            raise InvalidInput("misses need a file that can be written", values, "Name another one.") from error
        return len(entries)


def read_misses(path: str | Path) -> list[tuple[KernelSpec, Problem]]:
    """Families and problems of an exported file, in its order; raises InvalidInput with the line of a mistake."""
    remedy = "Write one with nsa_autotune.export_misses(path)."
    numbered = numbered_lines(path, "file", "misses are read from a text file", remedy)
    return [_parse(line, {"file": str(path), "line": number}) for number, line in numbered]


def _parse(line: str, where: Mapping[str, object]) -> tuple[KernelSpec, Problem]:
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or set(data) != set(FIELDS):
            raise InvalidInput(f"a line must be a JSON object of {', '.join(FIELDS)}", where, ANEW)
        if not isinstance(data["count"], int) or data["count"] < 0:
            raise InvalidInput("count must be a whole number of at least 0", {**where, "count": data["count"]})
        _check_fields(data["problem"], where)
        spec = get_spec(data["family"])
        problem = Problem.from_dict(data["problem"])
        spec.check_problem(problem)
    except json.JSONDecodeError as error:
        raise InvalidInput("a line must be JSON", {**where, "reason": error.msg}, ANEW) from error
    except UnknownName as error:
        raise InvalidInput(
            "a line must name a known family", {**where, "family": data["family"]}, error.remedy
        ) from error
    except NSAError as error:
        raise InvalidInput(error.rule, {**where, **error.values}, error.remedy) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise InvalidInput(
            "a line's problem must have the fields of Problem", {**where, "reason": str(error)}, ANEW
        ) from error
    return spec, problem


def _check_fields(problem: Any, where: Mapping[str, object]) -> None:
    """Every field is given: a missing one would silently become its default."""
    whole = Problem().to_dict()
    for given, wanted in ((problem, whole), (problem.get("nsa"), whole["nsa"])):
        different = sorted(set(given) ^ set(wanted))
        if different:
            rule = "a line's problem must have just the fields of Problem"
            raise InvalidInput(rule, {**where, "missing or unknown": different}, "Export the file anew.")
