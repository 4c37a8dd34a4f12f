"""Does a record agree with itself? What can be told without knowing the kernels; a `Judge` knows them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..spec import Problem, canonical_json
from .checks import shorten

if TYPE_CHECKING:
    from .records import WinnerRecord

ROUNDED = ("seq_q", "seq_k", "batch")  # fields of a problem that a key may hold rounded up to a power of two
TOLERANCE = 1e-6  # relative: a time is a float that went through text

Judge = Callable[["WinnerRecord"], str]  # what the rules of kernels say against a winner, empty if nothing


def contradiction(data: Mapping[str, Any], problem: Problem) -> str:
    """What a trial's or winner's checked fields say against each other; empty if nothing."""
    if not _is_key_of(problem, data["problem_key"]):
        return "problem_key must hold fields of the problem, as the problem has them"
    if wrong := _wrong_time(data):
        return wrong
    # a race names every rival; only the default is ever raced alone
    alone = data.get("verdict") == "confirmed" and not data["rivals"]
    if alone and data["config"] != data["default_config"]:
        return "a confirmed winner must name the rivals that it was raced against, or be the default"
    return ""


def refuse_contradiction(data: Mapping[str, Any], problem: Problem) -> None:
    """Raise StoreError for fields that say something against each other."""
    if fault := contradiction(data, problem):
        names = ("family", "problem_key", "median_us", "verdict")
        raise StoreError(fault, {name: shorten(data[name]) for name in names if name in data})


def refuse_unfit(record: object, judge: Judge | None) -> None:
    """Raise StoreError for a winner that the rules of kernels refuse."""
    from .records import WinnerRecord

    if judge is not None and isinstance(record, WinnerRecord) and (fault := judge(record)):
        values = {"family": record.family, "problem_key": shorten(record.problem_key)}
        raise StoreError(f"a winner must be one that its kernel takes: {fault.rstrip('.')}", values)


def _is_key_of(problem: Problem, key: str) -> bool:
    """True if the key is canonical JSON of some of the problem's fields; which ones, only a spec knows."""
    known = {f.name: getattr(problem, f.name) for f in fields(problem)}
    constants, found, expected = problem.nsa.to_dict(), json.loads(key), dict[str, Any]()
    for name, value in found.items():
        if name == "nsa":
            names = value if isinstance(value, dict) else ()
            expected["nsa"] = {inner: constants[inner] for inner in names if inner in constants}
        elif name in known:
            above = 1 << (known[name] - 1).bit_length() if name in ROUNDED else known[name]
            expected[name] = above if value == above else known[name]
    return canonical_json(expected) == key


def _wrong_time(data: Mapping[str, Any]) -> str:
    """Which time the samples contradict: the median is theirs, the percentiles lie around it and among them."""
    samples = [float(sample) for sample in data["samples_us"]]
    if not samples:
        return ""
    median, least, most = statistics.median(samples), min(samples), max(samples)
    for name, low, high in (("median_us", median, median), ("p20_us", least, median), ("p80_us", median, most)):
        value = data[name]
        if value is not None and not low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE):
            span = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
            return f"{name} must be that of samples_us, which is {span}"
    return ""
