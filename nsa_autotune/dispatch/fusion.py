"""Whether one kernel takes the place of several: only where it was measured to be faster."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .ladder import Choice


def is_faster(fused: Choice, parts: Sequence[Choice]) -> bool:
    """True if the fused kernel's median is below the sum of the parts', measured alike and for the same problem.

    Alike is on one GPU and under one policy. A default or predicted config was not measured, so it fuses nothing.
    """
    total, one = 0.0, fused.measured
    for part in parts:
        if one is None or part.measured is None or not _is_part(part.tuned_key, fused.tuned_key):
            return False
        if (part.measured.gpu, part.measured.policy) != (one.gpu, one.policy):
            return False
        total += part.measured.median_us
    return one is not None and one.median_us < total


def _is_part(part_key: str, fused_key: str) -> bool:
    """True if the fused problem says the same of all that a part's problem tells."""
    part, fused = json.loads(part_key), json.loads(fused_key)
    if fused.get("layout") == "packed" and "layout" not in part:
        fused["batch"] = 1  # packed lengths count all sequences
    constants = part.pop("nsa", {})
    same = all(fused.get(name) == value for name, value in part.items())
    return same and all(fused.get("nsa", {}).get(name) == value for name, value in constants.items())
