"""The plot of speed-ups: which measurements count."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speedup")


def row(work: str, tokens: int, gains: Any, **problem: Any) -> dict[str, Any]:
    """A measurement as training.py and decode.py write it."""
    return {"work": work, "problem": {"seq_k": tokens, "batch": 1, "d_qk": 128, **problem}, "speedup_over": gains}


def test_the_newest_of_each_length_counts_beside_the_fastest_library(speedup: ModuleType, tmp_path: Path) -> None:
    old = [
        row("forward", 8192, {"cudnn_sdpa": 0.5, "flash_sdpa": 0.9}),
        row("forward", 65536, {"cudnn_sdpa": 3.0, "flash_sdpa": 5.0}),
        row("forward", 65536, {"cudnn_sdpa": 9.0}, d_qk=192),
        row("cudnn_sdpa forward", 65536, {}),
        row("slc_attn_fwd", 65536, {"cudnn_sdpa": 7.0}),
    ]
    new = [row("forward", 65536, {"cudnn_sdpa": 4.0, "flash_sdpa": 3.5})]
    decode = [
        row(
            "step", 65536, {"graph": {"cudnn_sdpa": 5.0}, "eager": {"cudnn_sdpa": 2.0}}, batch=8, cache_dtype="problem"
        ),
        row("step", 65536, {"graph": {"cudnn_sdpa": 2.0}}, batch=1, cache_dtype="problem"),
        row("step", 65536, {"graph": {"cudnn_sdpa": 8.0}}, batch=8, cache_dtype="float8_e4m3fn"),
    ]
    files = {"1-x-training": ("2026-01-01", "rows", old), "2-x-training": ("2026-01-02", "rows", new)}
    files["1-x-decode"] = ("2026-01-01", "lines", decode)
    for name, (date, key, rows) in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"created": f"{date}T00:00:00", key: rows}))
    found = [speedup.points_of(json.loads(path.read_text())) for path in tmp_path.glob("*.json")]
    points = speedup.newest([point for part in found for point in part])
    assert [(p.work, p.tokens, p.ratio, p.date) for p in points] == [
        ("forward", 8192, 0.5, "2026-01-01"),
        ("forward", 65536, 3.5, "2026-01-02"),
        ("step", 65536, 5.0, "2026-01-01"),
    ]
    pytest.importorskip("matplotlib")
    out = tmp_path / "plot.svg"
    assert speedup.main(["--gpu", "x", "--folder", str(tmp_path), "--out", str(out)]) == 0
    first = out.read_bytes()
    assert speedup.main(["--gpu", "x", "--folder", str(tmp_path), "--out", str(out)]) == 0
    assert out.read_bytes() == first and b"<svg" in first


def test_no_results_is_told(speedup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speedup.main(["--folder", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err
