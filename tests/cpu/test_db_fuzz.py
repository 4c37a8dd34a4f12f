"""Hostile files: an import takes all of a file or refuses it with a reason, executes nothing and changes nothing.

`make fuzz` tries 10,000 files; HYPOTHESIS_EXAMPLES=N tries N.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu.store_fakes import EXAMPLES, clear, contents, make_design, make_trial, make_winner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_autotune.db import TuningStore
from nsa_autotune.db.checks import MAX_ENTRIES, MAX_TEXT_CHARS
from nsa_autotune.db.exchange import format_line
from nsa_autotune.errors import StoreError

RECORDS = [json.loads(format_line(r)) for r in (make_winner(), make_trial(), make_design())]
LONG_INT = "an integer too long for Python to parse"
TRICKS = st.sampled_from(
    [
        "../../../../etc/passwd",
        "/dev/zero",
        "C:\\..\\x",
        "file:///etc/passwd",
        "x'); DROP TABLE nsa_trials; --",
        '" OR 1=1; DELETE FROM nsa_winners; --',
        "{{ ''.__class__.__mro__ }}",
        "{% import os %}",
        "__import__('os').system('true')",
        "cos\nsystem\n(S'true'\ntR.",
        "%s%n%x",
        "a\x00b",
        "\ud800",
        "\u202e\ufeff",
        "",
        " ",
        "x" * (MAX_TEXT_CHARS + 1),
        "NaN",
        "1e999",
        "9999-12-31T23:59:59+00:00",
        "2025-03-01",
    ]
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**63), 10**300, 10**400, LONG_INT, 0.0, -0.0, -1.5, 5e-324, 1e308, 1e-9]
) | st.floats(allow_nan=True, allow_infinity=True)
SCALARS = st.none() | st.booleans() | NUMBERS | TRICKS | st.text(max_size=20)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
HUGE = st.sampled_from(
    [
        {str(i): i for i in range(MAX_ENTRIES + 1)},
        {f"k{i}": 0 for i in range(60_000)},
        [0.5] * 100_001,
        [[[[[[[[1]]]]]]]],
        {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}},
    ]
)
VALUES = SCALARS | TREES | HUGE


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


@st.composite
def hostile_lines(draw: st.DrawFn) -> bytes:
    """A line that is right, or wrong in a few places."""
    record = copy.deepcopy(draw(st.sampled_from(RECORDS)))
    targets = places(record)[1:]
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from(targets))
        inner = record
        for key in path:
            inner = inner.get(key) if isinstance(inner, dict) else None
        action = draw(st.sampled_from(["put", "put", "drop", "add", "version"]))
        if action == "version":
            record["schema_version"] = draw(st.sampled_from([0, 1, 2, 3, 2.0, "2", True, None, [2], 10**30]))
        elif isinstance(inner, dict):
            if action == "drop":
                inner.pop(last, None)
            elif action == "add":
                inner[draw(TRICKS | st.text(max_size=8))] = copy.deepcopy(draw(VALUES))
            else:
                inner[last] = copy.deepcopy(draw(VALUES))
        elif isinstance(inner, list):
            inner[:1] = [copy.deepcopy(draw(VALUES))]
    return spoilt(draw, dump(record))


def dump(record: dict[str, Any]) -> bytes:
    """JSON as an attacker writes it: NaN, Infinity and integers of any length."""
    return json.dumps(record).replace(f'"{LONG_INT}"', "9" * 5000).encode()


def spoilt(draw: st.DrawFn, line: bytes) -> bytes:
    """The bytes of a line, at times damaged."""
    how = draw(st.sampled_from(["no"] * 12 + ["cut", "twice", "bytes", "deep", "long", "utf16", "bom", "nested"]))
    if how == "cut":
        return line[: draw(st.integers(0, len(line)))]
    if how == "twice":
        return line[:-1] + b"," + line[1:]
    if how == "bytes":
        at = draw(st.integers(0, len(line)))
        return line[:at] + draw(st.binary(max_size=6)) + line[at:]
    return {
        "deep": b"[" * 200_000,
        "long": line[:-1] + b" " * 1_000_001 + b"}",
        "utf16": line.decode().encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + line,
        "nested": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    }.get(how, line)


FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
)
watching: list[list[str]] = []  # an audit hook stays for good: it looks here whether anybody wants to know


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watching:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            watching[-1].append(f"{event} {arguments!r}"[:200])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TuningStore]:
    """A store in memory, warmed up: what SQLAlchemy compiles and imports is there already."""
    sys.addaudithook(_audit)
    path = tmp_path_factory.mktemp("warm") / "a.jsonl"
    with TuningStore("sqlite://", import_shipped=False) as opened:
        for lines in (RECORDS * 2, [{**RECORDS[0], "tool_version": "0.2"}], [{**RECORDS[2], "latency_us": 2.0}]):
            path.write_bytes(b"\n".join(map(dump, lines)))
            opened.import_jsonl(path)
        yield opened


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(lines=st.lists(hostile_lines(), min_size=1, max_size=3))
def test_all_of_a_file_or_nothing(store: TuningStore, tmp_path: Path, lines: list[bytes]) -> None:
    clear(store)
    store.set_winner(make_winner(template_digest="mine"))
    before, path, events = contents(store), tmp_path / "hostile.jsonl", []
    path.write_bytes(b"\n".join(lines) + b"\n")
    watching.append(events)
    try:
        summary = store.import_jsonl(path)
    except StoreError as error:
        assert contents(store) == before, "a refused file changes nothing"
        assert "line " in str(error) and len(str(error)) < 5000, "the reason names the line and fits a screen"
    else:
        count = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
        assert summary.winners + summary.trials + summary.designs == count, "all of it was taken"
        assert set(before) <= set(contents(store))
        assert_round_trip(store, tmp_path / "again.jsonl")
    finally:
        watching.pop()
    assert events == [], "nothing was executed, imported or written"


def assert_round_trip(store: TuningStore, path: Path) -> None:
    """What was taken exports and comes back."""
    watching.append([])  # writing the export is what we asked for
    try:
        store.export_jsonl(path)
        found = contents(store)
        clear(store)
        store.import_jsonl(path, source=None)
        assert contents(store) == found
    finally:
        watching.pop()


@pytest.mark.parametrize(
    ("record", "changes"),
    [
        (2, {"group_size": 2**31}),
        (1, {"config": {"BLOCK_M": 2**63}}),
        (1, {"config": {str(i): i for i in range(MAX_ENTRIES + 1)}}),
        (1, {"samples_us": [1.0] * 100_001}),
        (1, {"reason": "x" * (MAX_TEXT_CHARS + 1)}),
        (1, {"problem": {**RECORDS[1]["problem"], "seq_k": 10**30}}),
        (0, {"rivals": [{}] * (MAX_ENTRIES + 1)}),
        (0, {f"k{i}": 0 for i in range(60_000)}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_limits_of_a_record(store: TuningStore, tmp_path: Path, record: int, changes: dict[str, Any]) -> None:
    clear(store)
    path = tmp_path / "large.jsonl"
    path.write_bytes(dump({**RECORDS[record], **changes}))
    with pytest.raises(StoreError, match=r"^line 1 of ") as told:
        store.import_jsonl(path)
    assert len(str(told.value)) < 2000 and contents(store) == []


def test_a_file_is_not_read_beyond_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.jsonl"
    line = dump(RECORDS[1]) + b"\n"
    path.write_bytes(line * 5)
    with TuningStore("sqlite://", import_shipped=False) as store:
        monkeypatch.setattr("nsa_autotune.db.exchange.MAX_LINES", 4)
        with pytest.raises(StoreError, match=r"line 5.*must not exceed 4 lines"):
            store.import_jsonl(path)
        monkeypatch.setattr("nsa_autotune.db.exchange.MAX_FILE_BYTES", len(line))
        with pytest.raises(StoreError, match=r"must not exceed .* bytes"):
            store.import_jsonl(path)
        with pytest.raises(StoreError, match="regular file"):
            store.import_jsonl("/dev/zero")
        assert contents(store) == []
