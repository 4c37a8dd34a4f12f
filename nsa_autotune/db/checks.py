"""What each field of a record may hold: one rule a field, used before writing and while importing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from ..errors import StoreError
from ..plain import has_controls

STATUSES = ("ok", "same_code", "constraint", "render", "compile", "resource", "accuracy", "runtime", "timeout", "crash")
KINDS = ("measured", "predicted")
STAGES = ("search", "final", "confirm", "baseline")
RACED = "raced"  # one race in one process, without intervals: what versions before 0.2 stored
VERDICTS = (RACED, "provisional", "confirmed", "carried")
SOURCES = ("shipped", "imported", "local")  # a later one is never overwritten by an earlier one

MAX_DEPTH = 6  # of nested JSON in a record
MAX_ENTRIES = 1024  # of an object or a list in a record
MAX_SAMPLES = 100_000
MAX_TEXT_CHARS = 10_000
MAX_INT = 2**63 - 1  # what every database and every other reader of JSON takes
MAX_COLUMN_INT = 2**31 - 1  # of a column of its own
MAX_SHOWN_CHARS = 120
MAX_SHOWN_NAMES = 5


class Rule(NamedTuple):
    """What a field must be, in words and as a test."""

    expects: str
    holds: Callable[[object], bool]


def _is_text(value: object) -> bool:
    return _is_message(value) and "\n" not in str(value) and "\t" not in str(value)


def _is_message(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or has_controls(value):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and value >= 0
    except OverflowError:  # an int beyond the range of float
        return False


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return abs(value) <= MAX_INT if isinstance(value, int) else _is_text(value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_ENTRIES and all(map(_is_text, value))


def _is_json(value: object, depth: int = MAX_DEPTH) -> bool:
    if value is None or _is_scalar(value):
        return True
    if depth == 0:
        return False
    if isinstance(value, list | tuple):
        return len(value) <= MAX_ENTRIES and all(_is_json(item, depth - 1) for item in value)
    return isinstance(value, dict) and _is_object(value) and all(_is_json(v, depth - 1) for v in value.values())


def _is_fingerprint(value: object) -> bool:
    if not isinstance(value, dict) or not {"gpu", "capability"} <= value.keys():
        return False
    return _is_object(value) and all(map(_is_text, value.values())) and value["gpu"] != ""


def _is_json_object(value: object) -> bool:
    if not _is_text(value):
        return False
    try:
        return isinstance(json.loads(str(value)), dict)
    except (ValueError, RecursionError):
        return False


def _is_utc(value: object) -> bool:
    if not _is_text(value):
        return False
    try:
        return datetime.fromisoformat(str(value)).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _is_samples(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MAX_SAMPLES and all(map(_is_number, value))


def _is_positive(value: object) -> bool:
    return _is_number(value) and value != 0


def _is_scalars(value: object) -> bool:
    return isinstance(value, dict) and _is_object(value) and all(map(_is_scalar, value.values()))


def _or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.expects}, or null", lambda value: value is None or rule.holds(value))


def _one_of(values: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _is_rivals(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MAX_ENTRIES and all(map(_is_rival, value))


def _is_rival(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"config", "tied", "blocks", "log_ratio", "low", "high"}:
        return False
    numbers = [value[name] for name in ("log_ratio", "low", "high")]
    finite = all(isinstance(n, int | float) and not isinstance(n, bool) and _is_scalar(n) for n in numbers)
    return finite and _is_count(value["blocks"]) and isinstance(value["tied"], bool) and _is_scalars(value["config"])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COLUMN_INT


TEXT = Rule(f"a string without control characters or lone surrogates of at most {MAX_TEXT_CHARS} characters", _is_text)
MESSAGE = Rule(f"{TEXT.expects}, but for newlines and tabs", _is_message)
NAME = Rule(
    f"a string of 1 to {MAX_TEXT_CHARS} characters, none of them for control",
    lambda value: _is_text(value) and value != "",
)
FAMILY = Rule(
    "a plain identifier such as win_attn_fwd",
    lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", value) is not None,
)
NUMBER = Rule("a finite number, not negative", _is_number)
POSITIVE = Rule("a finite number above 0", _is_positive)
SHARE = Rule("a number from 0 to 1", lambda value: _is_number(value) and value <= 1)  # type: ignore[operator]
SCALARS = Rule("an object of numbers, booleans and strings without control characters", _is_scalars)

_SHARED = {
    "fingerprint": Rule("an object of strings without control characters, with gpu and capability", _is_fingerprint),
    "family": FAMILY,
    "problem": Rule(
        "a JSON object without control characters", lambda value: isinstance(value, dict) and _is_json(value)
    ),
    "problem_key": Rule("a string with a JSON object", _is_json_object),
    "config": SCALARS,
    "template_digest": TEXT,
    "policy": NAME,
    "created": Rule("an ISO 8601 time in UTC", _is_utc),
    "tool_version": NAME,
}
TRIAL_RULES: Mapping[str, Rule] = {
    **_SHARED,
    "status": _one_of(STATUSES),
    "reason": MESSAGE,
    "samples_us": Rule("a list of finite numbers, not negative", _is_samples),
    **{name: _or_none(NUMBER) for name in ("median_us", "p20_us", "p80_us", "max_error", "baseline_error")},
    "kind": _one_of(KINDS),
    "provider": NAME,
    "stage": _one_of(STAGES),
    "resources": _or_none(SCALARS),
    "predicted_us": _or_none(NUMBER),
    "environment": _or_none(SCALARS),
}
WINNER_RULES: Mapping[str, Rule] = {
    **_SHARED,
    **dict.fromkeys(("median_us", "p20_us", "p80_us"), POSITIVE),
    # a winner without a sample would be a prediction
    "samples_us": Rule("a list of at least one finite number", lambda v: _is_samples(v) and len(v) > 0),  # type: ignore[arg-type]
    "default_config": _or_none(SCALARS),
    "default_median_us": _or_none(POSITIVE),
    "library": TEXT,
    "library_median_us": _or_none(POSITIVE),
    "source": _one_of(SOURCES),
    "verdict": _one_of(VERDICTS),
    "rivals": Rule("a list of configs with tied, blocks, log_ratio, low and high", _is_rivals),
    "resources": _or_none(SCALARS),
}
DESIGN_RULES: Mapping[str, Rule] = {
    **{name: _SHARED[name] for name in ("fingerprint", "created", "tool_version")},
    "study": _SHARED["problem"],
    "nsa": SCALARS,
    "group_size": Rule("a whole number above 0", _is_count),
    "latency_us": POSITIVE,
    "parts": Rule(
        "an object of numbers above 0",
        lambda v: _is_scalars(v) and all(map(_is_positive, v.values())),  # type: ignore[attr-defined]
    ),
    **dict.fromkeys(("mass_kept", "mass_kept_p10"), SHARE),
    "output_error": NUMBER,
    "locality": _or_none(SHARE),
    "kind": _one_of(KINDS),
}


def check_fields(values: Mapping[str, object], rules: Mapping[str, Rule]) -> None:
    """Raise StoreError for an unknown, missing or wrong field."""
    unknown, missing = sorted(values.keys() - rules.keys()), sorted(rules.keys() - values.keys())
    if unknown:
        raise StoreError("a record has fields that this program does not know", {"fields": _first(unknown)})
    if missing:
        raise StoreError("a record lacks fields", {"fields": _first(missing)})
    for name, rule in rules.items():
        if not rule.holds(values[name]):
            raise StoreError(f"{name} must be {rule.expects}", {name: shorten(values[name])})


def _first(names: list[str]) -> list[object]:
    return [*map(shorten, names[:MAX_SHOWN_NAMES]), *(["..."] if len(names) > MAX_SHOWN_NAMES else [])]


def shorten(value: object) -> object:
    """The value, or the beginning of a long text."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
