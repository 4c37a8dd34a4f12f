"""Compile many variants in child processes: a hang or a crash of the compiler costs one variant."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import InvalidConfig, InvalidProblem, KernelError, NSAError, RenderError
from ..spec import Config, KernelSpec, Problem
from .compile import Resources, compile_variant, need_compiler
from .lifetime import die_with_parent, has_ended, odd_state

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 24
KILL_WAIT_S = 5.0
LAST_WORDS_S = 5.0


@dataclass(frozen=True)
class CompileJob:
    """One variant to compile, in plain values that cross a process boundary."""

    family: str
    problem: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class CompileOutcome:
    """What became of a job: status is ok, constraint, render, compile, resource, timeout or crash."""

    job: CompileJob
    status: str
    reason: str = ""
    resources: Resources | None = None


@dataclass
class _Child:
    process: Any
    pipe: Connection
    job: CompileJob | None = None
    deadline: float = field(default=float("inf"))


def _compile(spec: KernelSpec, job: CompileJob, target: str) -> CompileOutcome:
    try:
        resources = compile_variant(spec, Problem.from_dict(job.problem), job.config, target)
    except (InvalidProblem, InvalidConfig) as error:
        return CompileOutcome(job, "constraint", str(error))
    except RenderError as error:
        return CompileOutcome(job, "render", str(error))
    except KernelError as error:
        short = "limit_bytes" in error.values or isinstance(error.__cause__, OSError)  # of shared memory, of disk
        return CompileOutcome(job, "resource" if short else "compile", str(error))
    except OSError as error:
        return CompileOutcome(job, "resource", f"the compiler cannot read or write its files: {error}")
    except NSAError as error:
        return CompileOutcome(job, "compile", str(error))
    return CompileOutcome(job, "ok", resources=resources)


def _serve(pipe: Connection, specs: dict[str, KernelSpec], target: str, parent: int) -> None:
    """A child's life: take a job, answer, until the parent hangs up or dies."""
    die_with_parent(parent)  # the ends of pipes that a fork inherits would keep it waiting for ever
    os.setpgid(0, 0)  # so that the assembler it starts can be ended with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # ptxas prints to the terminal otherwise
    os.dup2(quiet, 2)
    while True:
        try:
            job: CompileJob = pipe.recv()
        except EOFError:
            return
        try:
            outcome = _compile(specs[job.family], job, target)
        except Exception:  # a bug of ours must not look like a crash of the compiler
            outcome = CompileOutcome(job, "compile", traceback.format_exc(limit=4))
        pipe.send(outcome)


def _start(specs: dict[str, KernelSpec], target: str) -> _Child:
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, specs, target, os.getpid())
    process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return _Child(process, ours)


def _stop(child: _Child) -> None:
    """End a child with all it started; one that is stuck in a system call is told, and left behind."""
    pid = child.process.pid
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # it may not have come to that itself
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # the assembler too
    child.process.kill()
    child.process.join(KILL_WAIT_S)
    if child.process.exitcode is None:
        logger.error("compiler process %d does not end when it is killed: it is %s", pid, odd_state(pid) or "running")
    child.pipe.close()


def _hand_over(child: _Child, job: CompileJob, timeout_s: float) -> bool:
    """Give a job to an idle child; False if the child has died meanwhile."""
    try:
        child.pipe.send(job)
    except OSError:
        return False
    child.job, child.deadline = job, time.monotonic() + timeout_s
    return True


def compile_many(
    specs: dict[str, KernelSpec],
    jobs: Sequence[CompileJob],
    target: str = "cuda:90",
    processes: int | None = None,
    timeout_s: float = 60.0,
) -> Iterator[CompileOutcome]:
    """Outcomes as they come; `specs` holds the spec of every family named by the jobs."""
    need_compiler()
    import triton  # noqa: F401 - imported once here, inherited by every child

    waiting = list(reversed(jobs))
    count = min(processes or os.cpu_count() or 1, len(waiting))
    children = [_start(specs, target) for _ in range(count)]
    try:
        while waiting or any(child.job for child in children):
            for index, child in enumerate(children):
                if child.job is None and waiting:
                    if _hand_over(child, waiting[-1], timeout_s):
                        waiting.pop()
                    else:
                        _stop(child)
                        children[index] = _start(specs, target)
            for index, outcome in _collect(children):
                if outcome.status in ("timeout", "crash"):
                    _stop(children[index])
                    children[index] = _start(specs, target)
                children[index].job = None
                yield outcome
    finally:
        for child in children:
            _stop(child)


def _collect(children: list[_Child]) -> Iterator[tuple[int, CompileOutcome]]:
    """Answers, deaths and overruns of the busy children; blocks for at most a fifth of a second."""
    busy = [child for child in children if child.job is not None]
    ready = wait([child.pipe for child in busy], timeout=0.2)
    now = time.monotonic()
    for index, child in enumerate(children):
        if child.job is None:
            continue
        if child.pipe in ready:
            yield index, _answer(child)
        elif now > child.deadline:
            state = odd_state(child.process.pid)
            reason = "the compiler ran past its time limit" + (f"; the process is {state}" if state else "")
            yield index, CompileOutcome(child.job, "timeout", reason)


def _answer(child: _Child) -> CompileOutcome:
    """What a child says that has something to say, or how it died."""
    assert child.job is not None
    try:
        outcome = pickle.loads(child.pipe.recv_bytes(MAX_ANSWER_BYTES))
    except (EOFError, ConnectionResetError):
        has_ended(child.process.pid, LAST_WORDS_S)  # its pipe is closed: it is ending
        code = _exit_code(child)
        return CompileOutcome(child.job, "crash", f"the compiler died, exit code {code}")
    except Exception as error:  # unpickling garbage raises anything
        return CompileOutcome(child.job, "crash", f"the compiler answered nonsense: {type(error).__name__}: {error}")
    if not isinstance(outcome, CompileOutcome) or outcome.job != child.job:
        return CompileOutcome(child.job, "crash", f"the compiler answered nonsense: {str(outcome)[:200]}")
    return outcome


def _exit_code(child: _Child) -> int | None:
    """The exit code of a child that has ended; what it started is ended first, while its group is surely its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.join(KILL_WAIT_S)
    code: int | None = child.process.exitcode
    return code
