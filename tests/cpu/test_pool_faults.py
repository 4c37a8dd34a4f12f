"""The compile pool outlives crashes, hangs, garbage, full disks and process trees of its compilers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
RECOVERY_S = 10.0
FAULTS = {
    "full_disk": ("resource", ""),  # first, before a cache spares the writing; the words are of who writes first
    "segv": ("crash", "exit code -11"),
    "abort": ("crash", "exit code -6"),
    "oom_killed": ("crash", "exit code -9"),
    "stop": ("timeout", "time limit; the process is stopped by a signal"),
    "babble": ("ok", ""),
    "scribble": ("crash", "answered nonsense"),
    "long_scribble": ("crash", "answered nonsense"),
    "bomb": ("timeout", "time limit"),
    "deaf": ("timeout", "time limit"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw in which Triton compiles; see pool_child.py."""
    folder = tmp_path_factory.mktemp("pool")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "NSA_AUTOTUNE_CACHE_DIR": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CODEGEN_CHILD": uuid.uuid4().hex,
    }
    environment.pop("TRITON_INTERPRET")
    command = [sys.executable, str(TESTS / "cpu" / "pool_child.py"), *FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_pool_goes_on_and_tells_what_happened(seen: dict[str, Any], fault: str) -> None:
    status, words = FAULTS[fault]
    before, faulty, after = seen[fault]
    assert [o["family"] for o in (before, faulty, after)] == ["gate_sum_fwd", "faulty", "gate_sum_fwd"]
    assert faulty["status"] == status and words in faulty["reason"]
    assert before["status"] == after["status"] == "constraint" and "BLOCK=7" in after["reason"]
    assert after["after_s"] - before["after_s"] < RECOVERY_S


def test_a_process_that_dies_idle_costs_no_job(seen: dict[str, Any]) -> None:
    assert seen["idle_death"] == ["constraint"] * 3


def test_a_process_starts_for_what_waits_beside_busy_ones(seen: dict[str, Any]) -> None:
    assert seen["beside_busy_ones"] == [1, 2, 3]


def test_a_child_collects_between_variants_and_does_not_import_sympy(seen: dict[str, Any]) -> None:
    compiled, told = seen["settled"]
    assert compiled == "ok " and "automatic: False, sympy: False" in told


def test_no_process_is_left(seen: dict[str, Any]) -> None:
    assert seen["left_over"] == []
