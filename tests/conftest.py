"""Shared by all tests: folders of their own, fixed seeds, and the `gpu` marker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import one_dtype
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it too
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's database, journals or cache of rendered kernels."""
    root = tmp_path_factory.mktemp("nsa_autotune")
    patch = pytest.MonkeyPatch()
    patch.setenv("NSA_AUTOTUNE_CACHE_DIR", str(root / "cache"))
    patch.setenv("NSA_AUTOTUNE_STATE_DIR", str(root / "state"))
    patch.setenv("NSA_AUTOTUNE_DB", f"sqlite:///{root / 'tuning.sqlite'}")
    patch.delenv("COLUMNS", raising=False)  # which tables follow, and parallel test processes set
    yield root
    patch.undo()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed torch, if a test module imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def one_dtype_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of an operator is noted, if a test module imported them."""
    serve = sys.modules.get("nsa_autotune.ops.serve")
    if serve is None:
        return
    launch = serve.launch

    def noted(dispatcher: object, spec: Any, shape: Any, problem: object, tensors: Any, device: object) -> Any:
        one_dtype.note(spec.family, shape, tensors)
        return launch(dispatcher, spec, shape, problem, tensors, device)

    monkeypatch.setattr(serve, "launch", noted)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests/gpu, and skip what needs a GPU where none can be used."""
    gpu_folder = Path(__file__).parent / "gpu"
    for item in items:
        if gpu_folder in item.path.parents:
            item.add_marker("gpu")
    needing = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if needing else ""
    for item in needing:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set in this process; run tests/gpu alone"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"
