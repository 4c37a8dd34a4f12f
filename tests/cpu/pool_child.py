"""Run by test_pool_faults in a process of its own, where Triton compiles: one fault each, among jobs that are fine.

Prints one JSON object: by fault the outcomes of the jobs, in the order in which they came, with seconds since the
start. `python pool_child.py FAULT...`
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu.codegen_child import PROBLEM, default, left_over, saboteur

from nsa_autotune.codegen import pool
from nsa_autotune.codegen.pool import CompileJob, compile_many
from nsa_autotune.errors import KernelError
from nsa_autotune.kernels import get_spec

TIMEOUT_S = {"stop": 0.5, "bomb": 0.5, "deaf": 0.5}  # others do not hang


def scribble(text: bytes) -> None:
    """Garbage on the pipe that carries the answers, as a stray write of a native library."""
    for descriptor in range(3, 64):
        try:
            if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("socket:"):
                os.write(descriptor, text)
        except OSError:
            continue
    time.sleep(600)


def bomb() -> None:
    """A tree of processes of which none ends."""
    subprocess.Popen(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sh -c 'sleep 600 & sleep 600 & wait' & done; wait"])
    time.sleep(600)


def deaf() -> None:
    """A compiler that does not listen to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def fill_disk() -> None:
    """From here on this process can write no file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS: dict[str, Callable[[], object]] = {
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "oom_killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "babble": lambda: os.write(1, b"garbage" * 1000),
    "scribble": lambda: scribble(b"\x00\x00\x00\x08garbage!"),  # a length and what is no pickle
    "long_scribble": lambda: scribble(b"garbage!"),  # a length of a gigabyte
    "bomb": bomb,
    "deaf": deaf,
    "full_disk": fill_disk,
}


def outcomes(fault: str) -> list[dict[str, Any]]:
    """A faulty job between two that are refused, which is quick, in one process or its replacement."""
    specs = {"gate_sum_fwd": get_spec("gate_sum_fwd"), "faulty": saboteur(FAULTS[fault])}
    problem, config = PROBLEM.to_dict(), default("gate_sum_fwd")
    refused = CompileJob("gate_sum_fwd", problem, {**config, "BLOCK": 7})
    jobs = [refused, CompileJob("faulty", problem, config), refused]
    started = time.monotonic()
    return [
        {
            "family": outcome.job.family,
            "status": outcome.status,
            "reason": outcome.reason,
            "after_s": time.monotonic() - started,
        }
        for outcome in compile_many(specs, jobs, "cuda:90", processes=1, timeout_s=TIMEOUT_S.get(fault, 60.0))
    ]


def idle_death() -> list[str]:
    """A child that dies between two jobs, as by the host's lack of memory."""
    spec = get_spec("gate_sum_fwd")
    configs = [{**default("gate_sum_fwd"), "BLOCK": size} for size in (7, 9, 11)]
    jobs = [CompileJob("gate_sum_fwd", PROBLEM.to_dict(), config) for config in configs]
    started: list[Any] = []
    start = pool._start
    pool._start = lambda *arguments: started.append(start(*arguments)) or started[-1]
    found = []
    for outcome in compile_many({"gate_sum_fwd": spec}, jobs, "cuda:90", processes=1, timeout_s=60.0):
        found.append(outcome.status)
        os.kill(started[-1].process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, started[-1].process.pid, os.WEXITED | os.WNOWAIT)
    pool._start = start
    return found


def beside_busy_ones() -> list[int]:
    """Children after each of three submissions, with at most three: what comes while others work need not wait."""
    spec = get_spec("gate_sum_fwd")
    jobs = [CompileJob("gate_sum_fwd", PROBLEM.to_dict(), {**default("gate_sum_fwd"), "BLOCK": n}) for n in range(3, 8)]
    opened, counts = pool.CompilePool({"gate_sum_fwd": spec}, "cuda:90", 3, 60.0), []
    for some in (jobs[:1], jobs[1:2], jobs[2:]):
        opened.submit(some)
        counts.append(len(opened._children))
        opened._hand_out()
    opened.close()
    return counts


def settled() -> list[str]:
    """A child that compiled running totals tells whether cycles are looked for at any time, and what it imported."""

    def tell() -> None:
        raise KernelError(f"automatic: {gc.isenabled()}, sympy: {'sympy' in sys.modules}")

    specs = {"slc_attn_bwd_dkv": get_spec("slc_attn_bwd_dkv"), "teller": saboteur(tell)}
    jobs = [CompileJob(family, PROBLEM.to_dict(), default(specs[family].family)) for family in specs]
    return [f"{outcome.status} {outcome.reason}" for outcome in compile_many(specs, jobs, "cuda:90", processes=1)]


def main() -> None:
    """See the module's docstring."""
    seen: dict[str, Any] = {fault: outcomes(fault) for fault in sys.argv[1:]}
    seen["idle_death"] = idle_death()
    seen["beside_busy_ones"] = beside_busy_ones()
    seen["settled"] = settled()
    seen["left_over"] = left_over()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
