"""Records of the database for tests, and what a store holds as values that compare."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from sqlalchemy import delete

from nsa_autotune.bench.timing import summarize
from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.db.designs import DesignRecord
from nsa_autotune.db.models import Base
from nsa_autotune.spec import Problem, canonical_json

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "100"))  # that a property is tried on
RIVAL = {"config": {"BLOCK_M": 16}, "tied": False, "blocks": 30, "log_ratio": 0.1, "low": 0.09, "high": 0.11}
H100 = {"gpu": "NVIDIA H100", "capability": "9.0", "driver": "570", "torch": "2.11", "triton": "3.6"}


def make_trial(**changes: Any) -> TrialRecord:
    """A good measurement."""
    values: dict[str, Any] = {
        "fingerprint": H100,
        "family": "slc_attn_fwd",
        "problem": Problem().to_dict(),
        "problem_key": '{"seq_k":8192}',
        "config": {"BLOCK_M": 64, "use_tma": True},
        "template_digest": "t1",
        "status": "ok",
        "samples_us": (10.0, 11.0, 12.5),
        "median_us": 11.0,
        "p20_us": 10.4,
        "p80_us": 11.9,
        "resources": {"registers": 168},
        "created": "2025-03-01T10:00:00.000000+00:00",
        "tool_version": "0.1.0",
    }
    return TrialRecord(**{**values, **changes, **times_of(changes)})


def make_winner(**changes: Any) -> WinnerRecord:
    """A winner of the same problem."""
    trial, names = make_trial(), [f.name for f in fields(WinnerRecord)]
    values = {name: getattr(trial, name) for name in names if hasattr(trial, name)}
    rivals = (RIVAL,) if changes.get("verdict") == "confirmed" else ()
    return WinnerRecord(**{**values, "rivals": rivals, **changes, **times_of(changes)})


def times_of(changes: dict[str, Any]) -> dict[str, Any]:
    """Samples and what the timer makes of them, where a test names good ones of either."""
    samples = changes.get("samples_us", () if changes.get("median_us") in (None, 11.0) else (changes["median_us"],))
    good = samples and all(0 < sample < float("inf") for sample in samples)
    return vars(summarize(samples)) if good else {}


def make_design(**changes: Any) -> DesignRecord:
    """Constants of NSA with their price."""
    values: dict[str, Any] = {
        "fingerprint": H100,
        "study": {"what": "a study"},
        "nsa": {"window_size": 512},
        "group_size": 16,
        "latency_us": 30.0,
        "parts": {"slc_attn_fwd": 30.0},
        "mass_kept": 0.9,
        "mass_kept_p10": 0.8,
        "output_error": 0.1,
        "created": "2025-03-01T10:00:00.000000+00:00",
        "tool_version": "0.1.0",
    }
    return DesignRecord(**{**values, **changes})


def contents(store: TuningStore) -> list[str]:
    """Every record of a store as text, sorted."""
    trials = [*store.trials(), *store.trials(kind="predicted")]
    records = [*trials, *store.winners(), *store.designs()]
    return sorted(f"{type(r).__name__} {canonical_json(r.to_dict())}" for r in records)


def clear(store: TuningStore) -> None:
    """Delete every row."""
    with store.transaction(write=True) as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
