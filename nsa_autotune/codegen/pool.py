"""Compile many variants in child processes: a hang or a crash of the compiler costs one variant."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import InvalidConfig, InvalidProblem, KernelError, NSAError, RenderError
from ..spec import Config, KernelSpec, Problem
from .compile import Resources, compile_variant, need_compiler
from .lifetime import die_with_parent

JOBS_AHEAD = 2  # with a child: the one it compiles, and the next


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
        return CompileOutcome(job, "resource" if "limit_bytes" in error.values else "compile", str(error))
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
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(child.process.pid, child.process.pid)  # it may not have come to that itself
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)  # the assembler too
    child.process.kill()
    child.process.join()
    child.pipe.close()


class CompilePool:
    """Processes that compile what is submitted while their owner does other things; close it when done.

    A compiler that crashes or runs past `timeout_s` costs the variant it worked on. Children are forked by the thread
    that calls, so one thread at a time. `specs` holds the spec of every family that jobs may name.
    """

    def __init__(self, specs: dict[str, KernelSpec], target: str, processes: int, timeout_s: float) -> None:
        need_compiler()
        import triton  # noqa: F401 - imported once here, inherited by every child

        self._specs, self._target, self._timeout_s = specs, target, timeout_s
        self._waiting: deque[CompileJob] = deque()
        self._children: list[_Child] = []
        self._processes = processes

    @property
    def is_idle(self) -> bool:
        """True if nothing is under way."""
        return not self._waiting and not any(child.jobs for child in self._children)

    def submit(self, jobs: Iterable[CompileJob]) -> None:
        """Queue jobs behind those that wait."""
        self._waiting.extend(jobs)
        while len(self._children) < min(self._processes, len(self._waiting)):
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
        """Give each child a job, then a second one that it finds when it is done with the first."""
        for depth in range(JOBS_AHEAD):
            for child in self._children:
                if len(child.jobs) == depth and self._waiting:
                    job = self._waiting.popleft()
                    if not child.jobs:
                        child.deadline = time.monotonic() + self._timeout_s
                    child.jobs.append(job)
                    with suppress(BrokenPipeError):  # it died: _collect finds out
                        child.pipe.send(job)

    def _collect(self) -> Iterator[CompileOutcome]:
        """Answers, deaths and overruns of the busy children; blocks for at most a fifth of a second."""
        ready = wait([child.pipe for child in self._children if child.jobs], timeout=0.2)
        now = time.monotonic()
        for index, child in enumerate(self._children):
            if child.jobs and child.pipe in ready:
                try:
                    outcome = child.pipe.recv()
                except (EOFError, ConnectionResetError):
                    child.process.join()
                    yield self._lose(index, "crash", f"the compiler died, exit code {child.process.exitcode}")
                    continue
                child.jobs.popleft()
                child.deadline = now + self._timeout_s
                yield outcome
            elif child.jobs and now > child.deadline:
                yield self._lose(index, "timeout", "the compiler ran past its time limit")

    def _lose(self, index: int, status: str, reason: str) -> CompileOutcome:
        """Replace a child; the job that it worked on is to blame, the one behind it goes back."""
        child = self._children[index]
        _stop(child)
        job = child.jobs.popleft()
        self._waiting.extendleft(reversed(child.jobs))
        self._children[index] = _start(self._specs, self._target)
        return CompileOutcome(job, status, reason)


def compile_many(
    specs: dict[str, KernelSpec],
    jobs: Sequence[CompileJob],
    target: str = "cuda:90",
    processes: int | None = None,
    timeout_s: float = 60.0,
) -> Iterator[CompileOutcome]:
    """Outcomes as they come; `specs` holds the spec of every family named by the jobs."""
    pool = CompilePool(specs, target, processes or os.cpu_count() or 1, timeout_s)
    try:
        pool.submit(jobs)
        while outcomes := pool.wait():
            yield from outcomes
    finally:
        pool.close()
