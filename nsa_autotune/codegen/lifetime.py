"""Child processes that do not outlive their parent, however it ends, and what becomes of those that do not end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in a system call that cannot be interrupted"}


def die_with_parent(parent: int) -> None:
    """On Linux, have the kernel end this process with the thread that started it, even in the middle of a GPU call."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            raise SystemExit("the parent has ended")


def odd_state(pid: int) -> str:
    """Why a process does nothing (stopped, or stuck in a system call), in words; "" if it runs, sleeps or is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
    return STATES.get(letter, "")


def has_ended(pid: int, timeout_s: float) -> bool:
    """Wait for a child to end, without reaping it, so that its process group can still be killed by its number."""
    deadline = time.monotonic() + timeout_s
    seen = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, pid, seen) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
