"""Compile many variants in child processes: a hang or a crash of the compiler costs one variant."""

from __future__ import annotations

import multiprocessing
import os
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
from .lifetime import die_with_parent


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
            for child in children:
                if child.job is None and waiting:
                    child.job = waiting.pop()
                    child.deadline = time.monotonic() + timeout_s
                    child.pipe.send(child.job)
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
            try:
                yield index, child.pipe.recv()
            except (EOFError, ConnectionResetError):
                child.process.join()
                yield (
                    index,
                    CompileOutcome(child.job, "crash", f"the compiler died, exit code {child.process.exitcode}"),
                )
        elif now > child.deadline:
            yield index, CompileOutcome(child.job, "timeout", "the compiler ran past its time limit")
