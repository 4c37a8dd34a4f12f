"""CPU tests run kernels in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/cpu could choose its interpreter; run tests/cpu alone")
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def nothing_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Databases hold what a test puts there, whatever the repository ships."""
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)
