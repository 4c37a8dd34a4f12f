"""Compile many variants in child processes: a hang or a crash of the compiler costs one variant."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..cores import usable_cores
from ..errors import InvalidConfig, InvalidProblem, KernelError, NSAError, RenderError
from ..spec import KernelSpec, Problem
from .compile import compile_variant, need_compiler
from .jobs import CompileJob, CompileOutcome, WaitingJobs
from .lifetime import die_with_parent, has_ended, odd_state
from .warm import Collector, prepare_parent

__all__ = ["CompileJob", "CompileOutcome", "CompilePool", "compile_many"]

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 24
KILL_WAIT_S = 5.0
LAST_WORDS_S = 5.0
JOBS_AHEAD = 2  # with a child: the one it compiles, and the next, since the pool's owner may be busy


@dataclass
class _Child:
    process: Any
    pipe: Connection
    jobs: deque[CompileJob] = field(default_factory=deque)  # the first is being compiled
    deadline: float = float("inf")  # of the first


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
    collector = Collector()
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
        collector.count()


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


class CompilePool:
    """Processes that compile what is submitted while their owner does other things; close it when done.

    A compiler that crashes or runs past `timeout_s` costs the variant it worked on. Children are forked by the thread
    that calls, so one thread at a time. `specs` holds the spec of every family that jobs may name. A child is handed
    `jobs_ahead` jobs; more than one keeps it busy while the owner is, but a job can wait behind a long one.
    """

    def __init__(
        self,
        specs: dict[str, KernelSpec],
        target: str,
        processes: int,
        timeout_s: float,
        jobs_ahead: int = JOBS_AHEAD,
    ) -> None:
        need_compiler()
        prepare_parent()
        self._specs, self._target, self._timeout_s, self._jobs_ahead = specs, target, timeout_s, jobs_ahead
        self._waiting = WaitingJobs()
        self._crashed: list[CompileJob] = []  # once
        self._children: list[_Child] = []
        self._processes = processes

    @property
    def is_idle(self) -> bool:
        """True if nothing is under way."""
        return not self._waiting and not any(child.jobs for child in self._children)

    def submit(self, jobs: Iterable[CompileJob]) -> None:
        """Queue jobs; families that take long come first."""
        self._waiting.extend(jobs)
        busy = sum(bool(child.jobs) for child in self._children)
        while len(self._children) < min(self._processes, busy + len(self._waiting)):
            self._children.append(_start(self._specs, self._target))
        self._hand_out()

    def wait(self) -> list[CompileOutcome]:
        """The outcomes that are there, after waiting for one; empty if nothing is under way."""
        found: list[CompileOutcome] = []
        while not found and not self.is_idle:
            self._hand_out()
            found = list(self._collect())
        self._hand_out()
        return found

    def cancel(self) -> None:
        """Forget what waits; what was handed out is compiled and told still."""
        self._waiting.clear()

    def close(self) -> None:
        """End all processes, the assemblers that they started too."""
        self.cancel()
        while self._children:
            _stop(self._children.pop())

    def _hand_out(self) -> None:
        """Give each child a job, then others that it finds when it is done with the first."""
        for depth in range(self._jobs_ahead):
            for index, child in enumerate(self._children):
                if len(child.jobs) != depth or not self._waiting:
                    continue
                job = self._waiting.take()
                try:
                    child.pipe.send(job)
                except OSError:  # it died
                    self._waiting.put_back([job])
                    if not child.jobs:  # of nothing that we gave it; else _collect finds out
                        _stop(child)
                        self._children[index] = _start(self._specs, self._target)
                    continue
                child.deadline = child.deadline if child.jobs else time.monotonic() + self._timeout_s
                child.jobs.append(job)

    def _collect(self) -> Iterator[CompileOutcome]:
        """Answers, deaths and overruns of the busy children; blocks for at most a fifth of a second."""
        ready = wait([child.pipe for child in self._children if child.jobs], timeout=0.2)
        now = time.monotonic()
        for index, child in enumerate(self._children):
            if child.jobs and child.pipe in ready:
                outcome = _answer(child)
                if outcome.status == "crash":
                    self._lose(index)
                    if self._may_try_again(outcome.job):
                        continue
                else:
                    child.jobs.popleft()
                    child.deadline = now + self._timeout_s
                    self._waiting.learn(outcome)
                yield outcome
            elif child.jobs and now > child.deadline:
                state = odd_state(child.process.pid)
                reason = "the compiler ran past its time limit" + (f"; the process is {state}" if state else "")
                outcome = CompileOutcome(child.jobs[0], "timeout", reason)
                self._lose(index)
                yield outcome

    def _may_try_again(self, job: CompileJob) -> bool:
        """Put a job back whose process died for the first time: the host may have killed it for want of memory."""
        if job in self._crashed:
            return False
        self._crashed.append(job)
        self._waiting.put_back([job])
        return True

    def _lose(self, index: int) -> None:
        """Replace a child; the job that it worked on is to blame, the one behind it goes back."""
        child = self._children[index]
        _stop(child)
        child.jobs.popleft()
        self._waiting.put_back(child.jobs)
        self._children[index] = _start(self._specs, self._target)


def compile_many(
    specs: dict[str, KernelSpec],
    jobs: Sequence[CompileJob],
    target: str = "cuda:90",
    processes: int | None = None,
    timeout_s: float = 60.0,
) -> Iterator[CompileOutcome]:
    """Outcomes as they come; `specs` holds the spec of every family named by the jobs."""
    pool = CompilePool(specs, target, processes or usable_cores(), timeout_s, jobs_ahead=1)  # its owner only waits
    try:
        pool.submit(jobs)
        while outcomes := pool.wait():
            yield from outcomes
    finally:
        pool.close()


def _answer(child: _Child) -> CompileOutcome:
    """What a child says that has something to say, or how it died."""
    job = child.jobs[0]
    try:
        outcome = pickle.loads(child.pipe.recv_bytes(MAX_ANSWER_BYTES))
    except (EOFError, ConnectionResetError):
        has_ended(child.process.pid, LAST_WORDS_S)  # its pipe is closed: it is ending
        code = _exit_code(child)
        return CompileOutcome(job, "crash", f"the compiler died, exit code {code}")
    except Exception as error:  # unpickling garbage raises anything
        return CompileOutcome(job, "crash", f"the compiler answered nonsense: {type(error).__name__}: {error}")
    if not isinstance(outcome, CompileOutcome) or outcome.job != job:
        return CompileOutcome(job, "crash", f"the compiler answered nonsense: {str(outcome)[:200]}")
    return outcome


def _exit_code(child: _Child) -> int | None:
    """The exit code of a child that has ended; what it started is ended first, while its group is surely its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.join(KILL_WAIT_S)
    code: int | None = child.process.exitcode
    return code
