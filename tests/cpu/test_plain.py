"""Texts from elsewhere do nothing to a terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from nsa_autotune.cli.console import cell_text, errors, make_table, output
from nsa_autotune.cli.rows import RowFormat, give_rows
from nsa_autotune.plain import has_controls, visible

HOSTILE = "\x1b[2J\x1b]0;pwn\x07\x9b31m\u202eabc\r"
SHOWN = r"\x1b[2J\x1b]0;pwn\x07\x9b31m\u202eabc\r"


def test_control_characters_are_written_out_and_all_else_stays() -> None:
    assert visible(HOSTILE) == SHOWN and has_controls(HOSTILE) and not has_controls(SHOWN)
    plain = "tab\tline\nünïcode 漢字 \\x1b [red]"
    assert visible(plain) == plain and not has_controls(plain)


def test_no_table_line_or_csv_has_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cell_text(HOSTILE) == SHOWN.replace("[", "\\[")
    output().print(make_table(HOSTILE, ["what"], [[HOSTILE]]))
    output().print(HOSTILE, markup=False)
    errors().print(HOSTILE, markup=False)
    give_rows([{"a": HOSTILE, "b": 1}], ["a", "b"], RowFormat.csv, tmp_path / "x.csv", title="")
    found = capsys.readouterr()
    assert found.out.count(SHOWN) == 3 and SHOWN in found.err and not has_controls(found.out + found.err)
    assert list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text())))[1] == [SHOWN, "1"]
