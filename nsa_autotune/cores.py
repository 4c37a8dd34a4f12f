"""How many processes are worth starting."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may run on, at least 1: under taskset or in many containers fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
