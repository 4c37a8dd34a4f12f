"""Whether one kernel takes the place of several: only where it was measured to be faster."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .ladder import Choice


def is_faster(fused: Choice, parts: Sequence[Choice]) -> bool:
    """True if the fused kernel's median is below the sum of the parts', measured alike for outputs of one size.

    Alike is on one GPU and under one policy. A default or predicted config was not measured, so it fuses nothing.
    """
    one, *others = [fused, *parts]
    if one.measured is None or one.measured.median_us is None:
        return False
    total = 0.0
    for part in others:
        if part.measured is None or part.measured.median_us is None:
            return False
        alike = part.measured.gpu == one.measured.gpu and part.measured.policy == one.measured.policy
        if not alike or _rows(part.tuned_key) != _rows(one.tuned_key):
            return False
        total += part.measured.median_us
    return one.measured.median_us < total


def _rows(key: str) -> tuple[object, ...]:
    """The size of a tuned problem's output: tokens, heads, their width and type."""
    fields = json.loads(key)
    sequences = 1 if fields.get("layout") == "packed" else fields["batch"]  # packed lengths count all sequences
    return sequences * fields["seq_q"], fields["num_q_heads"], fields["d_v"], fields["dtype"]
