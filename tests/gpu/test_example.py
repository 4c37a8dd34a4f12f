"""The example on the device: sparse attention learns to recall what it must select."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train.py"
OPTIONS = "--task recall --attention nsa --seq 1024 --pairs 16 --window 64 --num-selected 8 --steps 500 --stop-at 0.95"


def test_recall_is_learned(tmp_path: Path) -> None:
    """8 of 16 blocks are selected at 1,024 tokens: chosen at random they hold the answer about half the time."""
    command = [sys.executable, str(EXAMPLE), *OPTIONS.split(), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["evaluation_accuracy"] > 0.9, result
