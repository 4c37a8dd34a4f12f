"""Real faults on the device: each costs its variant and its process, and the next result is there within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu.bench_fakes import SMALL
from gpu.fault_kernels import FAMILY

from nsa_autotune.bench.journal import Journal
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.bench.worker import MeasureWorker

RECOVERY_S = 10.0
FAULTS = {
    "illegal": ("runtime", "illegal memory access"),
    "misaligned": ("runtime", "misaligned address"),
    "assert": ("runtime", "device-side assert"),
    "hang": ("timeout", "In stage 'launch': no answer within 2 s"),
    "oom": ("resource", "out of memory"),
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasureWorker]:
    """One worker for all faults."""
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    with (
        Journal("cuda:0", tmp_path_factory.mktemp("state")) as journal,
        MeasureWorker("cuda:0", env=env, toolchain="gpu.fault_kernels", journal=journal) as shared,
    ):
        yield shared
    assert journal.path.read_bytes() == b""


def measure(worker: MeasureWorker, fault: str) -> TrialResult:
    """One trial of the copy with a fault."""
    return worker.measure(FAMILY, SMALL, {"fault": fault}, rounds=5)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_session_goes_on(worker: MeasureWorker, fault: str) -> None:
    status, words = FAULTS[fault]
    right = measure(worker, "right")
    assert right.ok, right.reason
    result = measure(worker, fault)
    told = time.monotonic()
    assert result.status == status and words in result.reason, result.reason
    after = measure(worker, "right")
    print(f"{fault}: the next result came after {time.monotonic() - told:.2f} s")
    assert time.monotonic() - told < RECOVERY_S
    assert after.ok and after.max_error == 0.0, after.reason


def test_a_hang_is_told_soon(worker: MeasureWorker) -> None:
    measure(worker, "right")
    asked = time.monotonic()
    result = worker.measure(FAMILY, SMALL.replace(seq_q=64, seq_k=64), {"fault": "hang"})  # not the one it knows
    assert result.status == "timeout"
    assert time.monotonic() - asked < 2.0 + RECOVERY_S
