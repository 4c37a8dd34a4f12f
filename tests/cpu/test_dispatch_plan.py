"""Prepared launches call Triton's C launcher with what Triton itself would; see plan_child, which compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.plan_child import CHECKS

from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.dispatch.self_test import failure, require_prepared_launches
from nsa_autotune.dispatch.triton_launch import CannotPrepareError, TensorMap
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The errors of the child's checks by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    child = [sys.executable, str(TESTS / "cpu" / "plan_child.py")]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_a_stub_driver(name: str, found: dict[str, str]) -> None:
    assert found[name] == "", found[name]


def test_interpreted_kernels_are_launched_as_they_are() -> None:
    """A real result, and the reason is counted."""
    problem = Problem(seq_q=4, seq_k=4, num_q_heads=2, num_kv_heads=1, d_qk=16, d_v=16, dtype="float32")
    dispatcher = Dispatcher(None, fingerprint=for_target("cuda:90"))
    parts = [torch.randn(1, 4, 2, 16) for _ in range(3)]
    gates, out = torch.rand(1, 4, 2, 3), torch.empty(1, 4, 2, 16)
    tensors = dict(zip(("o_cmp", "o_slc", "o_win", "gates", "out"), (*parts, gates, out), strict=True))
    for _ in range(2):
        out.fill_(0.0)
        dispatcher.launch(get_spec("gate_sum_fwd"), "shape", lambda: problem, "cpu", tensors)
        wanted = sum(gates[..., n, None] * part for n, part in enumerate(parts))
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert dispatcher.ordinary == Counter({"kernels are interpreted": 2})


def test_without_a_gpu_nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotPrepareError, match="there is no CUDA device"):
        require_prepared_launches()


def test_a_variable_sends_every_launch_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("the variable is looked at first"))
    monkeypatch.setenv("NSA_AUTOTUNE_ORDINARY_LAUNCHES", "1")
    with pytest.raises(CannotPrepareError, match="NSA_AUTOTUNE_ORDINARY_LAUNCHES is set"):
        require_prepared_launches()


def test_a_self_test_that_fails_is_logged_once_and_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("another launcher")

    monkeypatch.setattr("nsa_autotune.dispatch.self_test._compare", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    failure.cache_clear()
    for _ in range(2):
        with pytest.raises(CannotPrepareError, match="the self-test failed: RuntimeError: another launcher"):
            require_prepared_launches()
    assert len(caplog.records) == 1 and "launched by Triton itself" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CannotPrepareError, match="a CUDA graph is being captured"):
        require_prepared_launches()
    failure.cache_clear()


def test_a_tensor_map_is_encoded_once_an_address() -> None:
    encoded: list[int] = []

    class Descriptor:
        base: Any = torch.zeros(1)

    def encode(descriptor: Any) -> list[Any]:
        encoded.append(descriptor.base.data_ptr())
        return [("map", descriptor.base.data_ptr()), 8, 1]

    one = TensorMap(encode, Descriptor())
    assert [one.at(address) for address in (16, 32, 16, 32)] == [("map", a) for a in (16, 32, 16, 32)]
    assert encoded == [16, 32]
    for address in range(0, 16 * 200, 16):
        one.at(address)
    assert len(one.known) <= 64  # of 128 bytes each
