"""benchmarks/dispatch.py: its table from made-up samples. The measurement itself needs a compiler or a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("dispatch", "dispatch_machine", "dispatch_raw", "forward", "stub_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import dispatch

    return dispatch


def test_a_mark_is_met_per_kernel(bench: Any) -> None:
    two, samples = bench.Line("union", print, kernels=2, mark_us=5.0), [8.0, 9.0, 9.5, 10.0, 40.0]
    whole = ("union", 2, "9.50", "8.20..34.00", "4.75", "", "5 (met)")
    assert bench.row_of(two, samples, {"union": 9.5}) == whole
    assert bench.row_of(two, [10.5] * 5, {"union": 10.5})[-3:] == ("5.25", "", "5 (missed)")
    lookup = bench.Line("lookup", print, mark_us=1.0)
    assert bench.row_of(lookup, [1.2] * 5, {"lookup": 1.2})[2:] == ("1.20", "1.20..1.20", "", "", "1 (missed)")


def test_what_the_c_launcher_takes_is_not_pythons(bench: Any) -> None:
    two = bench.Line("union", print, kernels=2, mark_us=5.0, without="alone")
    for alone_us, python, mark in ((8.0, "4.00", "5 (met)"), (4.0, "6.00", "5 (missed)")):
        cells = bench.row_of(two, [16.0] * 5, {"union": 16.0, "alone": alone_us})
        assert cells[-3:] == ("8.00", python, mark)


def test_the_page_has_facts_lines_and_notes(bench: Any) -> None:
    facts = {"GPU": "none: stub driver", "slug": "cpu-stub", "date": "2026-01-02T03:04:05+00:00"}
    page = bench.make_page(facts, [bench.Line("lookup", print)], [[0.5, 0.5, 0.5]])
    assert page.startswith("# Host cost of a launch, cpu-stub, 2026-01-02\n")
    assert "| GPU | none: stub driver |" in page and "| lookup |  | 0.50 | 0.50..0.50 |  |  |  |" in page
    assert "slug" not in page and all(note in page for note in bench.NOTES)


def test_each_line_is_sampled_in_turns_after_a_warm_up(bench: Any) -> None:
    import torch

    order: list[str] = []
    lines = [bench.Line("a", lambda: order.append("a"), 1), bench.Line("b", lambda: order.append("b"), 7)]
    found = bench.measure(lines, samples=2, calls=30, device=torch.device("cpu"))
    assert [len(times) for times in found] == [2, 2]
    assert order == (["a"] * 30 + ["b"] * 20) * 4
