"""What the README shows is so: its Python runs, its presets are the program's, its queries have rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cpu.test_docs import blocks

from nsa_autotune.cli.app import main
from nsa_autotune.search.presets import PRESETS, parse_seq_lens

TEXT = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON = blocks("../README.md")
QUERIES = re.findall(r"^nsa-autotune (db (?:query|best|compare) [^#\n]*)(# .*)?$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON, ids=["module", "cache"])
def test_its_python_runs_on_a_cpu(code: str) -> None:
    found: dict[str, object] = {}
    exec(code, found)
    assert found["y"].shape[-1] == 512  # type: ignore[attr-defined]


def test_it_has_every_preset_with_its_shape() -> None:
    rows = re.findall(r"^\| `([\w-]+)`.*?\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\dk, ]+) \|$", TEXT, re.MULTILINE)
    told = {name: (*map(int, sizes), parse_seq_lens(tokens)) for name, *sizes, tokens in rows}
    shapes = {
        name: (p.problem.num_q_heads, p.problem.num_kv_heads, p.problem.d_qk, p.problem.d_v, p.seq_lens)
        for name, p in PRESETS.items()
    }
    assert told == shapes
    assert {(preset.problem.dtype, preset.problem.batch) for preset in PRESETS.values()} == {("bfloat16", 1)}


@pytest.mark.parametrize(("words", "note"), QUERIES, ids=[words.strip() for words, _ in QUERIES])
def test_its_queries_have_rows_on_a_fresh_checkout(
    words: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NSA_AUTOTUNE_DB", str(tmp_path / "fresh.sqlite"))
    assert main(shlex.split(words)) == 0
    captured = capsys.readouterr()
    assert ("no row" in captured.err) == ("no row before" in note)
    assert ("NVIDIA H200" in captured.out) == ("no row before" not in note)
