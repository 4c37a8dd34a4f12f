"""benchmarks/database.py: its table from made-up samples, and the whole of it on a small file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("database", "database_fill", "forward"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import database

    return database


def test_a_mark_is_met_by_the_median_after_the_first(bench: Any) -> None:
    found = bench.Found("best: GPU", 50, [90.0, 40.0, 41.0, 42.0, 49.0, 50.0], [9.0, 4.0, 4.0, 4.0, 4.0, 4.0], 50.0)
    assert bench.row_of(found) == ("best: GPU", 50, "42.0", "40.2..49.8", "4.0", "90.0", "50 (met)")
    fresh = bench.Found("fresh process: open", 0, [90.0, 110.0, 120.0], [1.0, 2.0, 3.0], 100.0)
    assert bench.row_of(fresh)[2:] == ("110.0", "86.0..122.0", "2.0", "90.0", "100 (missed)")


@pytest.mark.usefixtures("nothing_shipped")
def test_it_runs_and_every_question_finds_something(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "fresh", lambda url, processes: iter(()))  # each takes seconds to import torch
    file = tmp_path / "tuning.sqlite"
    arguments = ["--trials", "30000", "--samples", "2", "--folder", str(tmp_path), "--file", str(file)]
    assert bench.main(arguments) == 0
    (page,), (data,) = tmp_path.glob("*-database.md"), tmp_path.glob("*-database.json")
    assert "| trials | 30,000 |" in page.read_text() and str(tmp_path) not in page.read_text()
    rows = {row["question"]: row for row in json.loads(data.read_text())["rows"]}
    assert all(len(row["samples_ms"]) == len(row["cpu_ms"]) == 3 for row in rows.values())
    assert rows["best: GPU, family"]["rows"] > 0 and rows["query: family, status ok"]["rows"] == bench.ROWS
