"""Speed-ups over dense attention from the JSON files of benchmarks; whatever else such a file holds is not read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, NSAError
from ..spec import DEFAULT_POLICY, Problem
from .data import Keys, Speedup
from .text import shape_text

SCHEMA = 1
WHOLE = "(whole attention)"  # stands among the families
MAX_BYTES = 64 * 1024 * 1024
REMEDY = "Name a file that `nsa-autotune bench`, benchmarks/forward.py, training.py or decode.py has written."


def read_speedups(path: Path) -> tuple[Speedup, ...]:
    """The lines of a benchmark that were compared with a dense library; InvalidInput names what is wrong."""
    data = _load(path)
    try:
        found = [speedup for row in _rows(data) for speedup in _speedups(row, data, path.name)]
    except (KeyError, TypeError, ValueError, AttributeError, NSAError) as error:
        values = {"path": str(path), "message": f"{type(error).__name__}: {error}"}
        raise InvalidInput("the file is not a benchmark's", values, REMEDY) from error
    if not found:
        raise InvalidInput("the benchmark was not compared with dense attention", {"path": str(path)}, REMEDY)
    return tuple(found)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidInput(f"a benchmark's file has at most {MAX_BYTES} bytes", {"path": str(path)}, REMEDY)
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput("the file cannot be read", {"path": str(path), "reason": error.strerror}, REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the file is not JSON", {"path": str(path), "message": str(error)}, REMEDY) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InvalidInput(f"a benchmark's file has schema {SCHEMA}", {"path": str(path)}, REMEDY)
    return data


def _rows(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows; of a line of decode.py one for each way of launching."""
    if "lines" not in data:
        yield from data["rows"]
        return
    for line in data["lines"]:
        for how, policy in (("graph", "graph-cold"), ("eager", "eager-cold")):
            timed = {"median_us": line[how]["median_us"], "speedup_over": line["speedup_over"].get(how, {})}
            yield {"work": line["work"], "problem": line["problem"], "policy": policy, **timed}


def _speedups(row: dict[str, Any], data: dict[str, Any], origin: str) -> list[Speedup]:
    """One for each library that the row was compared with."""
    compared = {str(name): ratio for name, ratio in row.get("speedup_over", {}).items() if ratio is not None}
    if not compared or row["median_us"] is None:
        return []
    problem, ours_us = Problem.from_dict(row["problem"]), _positive(row["median_us"])
    policy = str(row.get("policy", data.get("policy", DEFAULT_POLICY)))
    keys = Keys(str(data["fingerprint"]["gpu"]), WHOLE, problem.dtype, policy, problem.seq_k)
    locality = row.get("locality")
    work = str(row["work"]) if locality is None else f"{row['work']}, locality {float(locality):g}"
    created = datetime.fromisoformat(str(data["created"])).isoformat()
    return [
        Speedup(
            keys, shape_text(problem), work, library, ours_us, _positive(ours_us * _positive(ratio)), created, origin
        )
        for library, ratio in compared.items()
    ]


def _positive(value: object) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value!r} is not a number above 0")
    return number
