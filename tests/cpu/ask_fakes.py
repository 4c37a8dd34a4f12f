"""Hand-made winners and trials of two GPUs and two sets of versions, for tests of questions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nsa_autotune.db import TrialRecord, WinnerRecord
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

FAMILY = "slc_attn_fwd"
OLD = {"driver": "570", "cuda": "12.8", "torch": "2.11", "triton": "3.6.0", "assembler": "ptxas 12.8"}
NEW = {"driver": "580", "cuda": "13.0", "torch": "2.13", "triton": "3.9.0", "assembler": "ptxas 13.0"}
H100, A100 = {"gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0"}, {"gpu": "NVIDIA A100", "capability": "8.0"}
BASE = get_spec(FAMILY).default_config(Problem())


def problem_of(tokens: int = 8192, **changes: Any) -> Problem:
    """A problem with as many queries as keys."""
    return Problem(seq_q=tokens, seq_k=tokens).replace(**changes)


def config_of(**changes: Any) -> dict[str, Any]:
    """The default config with other values."""
    return {**BASE, **changes}


def trial(median_us: float | None = 100.0, tokens: int = 8192, day: int = 1, **changes: Any) -> TrialRecord:
    """A search trial of the default config on the H100 with the old versions; spread 2 %."""
    family = changes.get("family", FAMILY)
    problem = changes.pop("problem", problem_of(tokens))
    times: dict[str, Any] = {}
    if median_us is not None:
        low, high = median_us * 0.99, median_us * 1.01
        times = {"median_us": median_us, "p20_us": low, "p80_us": high, "samples_us": (low, median_us, high)}
    values = {
        "fingerprint": {**H100, **OLD},
        "family": family,
        "problem": problem.to_dict(),
        "problem_key": get_spec(family).problem_key(problem),
        "config": BASE,
        "template_digest": "t1",
        "status": "ok" if median_us is not None else "compile",
        **times,
        "created": f"2026-01-{day:02d}T10:00:00+00:00",
        "tool_version": "0.1.0",
    }
    return TrialRecord(**{**values, **changes})


def winner(median_us: float = 100.0, tokens: int = 8192, day: int = 1, **changes: Any) -> WinnerRecord:
    """A confirmed winner of the same."""
    names = {f.name for f in fields(WinnerRecord)}
    own = {name: changes.pop(name) for name in ("verdict", "rivals", "source") if name in changes}
    like = trial(median_us, tokens, day, **changes)
    values = {name: getattr(like, name) for name in names if hasattr(like, name)}
    return WinnerRecord(**{**values, "verdict": "confirmed", "default_median_us": 2 * median_us, **own})
