"""The order of compilation: long families first, what came back before all, equals as they were submitted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.jobs import CompileJob, CompileOutcome, WaitingJobs


def jobs(*names: str) -> list[CompileJob]:
    """`slow1` is a job of the family slow."""
    return [CompileJob(name[:-1], {}, {"number": int(name[-1])}) for name in names]


def names(waiting: WaitingJobs) -> list[str]:
    """Takes all."""
    taken = [waiting.take() for _ in range(len(waiting))]
    return [f"{job.family}{job.config['number']}" for job in taken]


def took(name: str, compile_ms: float | None) -> CompileOutcome:
    """A job that compiled; None: that did not."""
    if compile_ms is None:
        return CompileOutcome(*jobs(name), "compile", "no")
    resources = Resources(64, 0, 0, 4, "sha", compile_ms)
    return CompileOutcome(*jobs(name), "ok", resources=resources)


def test_jobs_of_unknown_families_keep_their_order() -> None:
    waiting = WaitingJobs()
    waiting.extend(jobs("a1", "b1", "a2"))
    waiting.extend(jobs("c1", "a3"))
    assert names(waiting) == ["a1", "b1", "a2", "c1", "a3"]


def test_families_that_take_long_come_first_and_unknown_ones_before_them() -> None:
    waiting = WaitingJobs()
    waiting.extend(jobs("fast1", "slow1", "new1", "slow2", "fast2"))
    for outcome in (took("fast8", 10.0), took("slow8", 9.0), took("slow9", 13.0), took("new9", None)):
        waiting.learn(outcome)  # slow: 11 ms a job in the mean
    assert names(waiting) == ["new1", "slow1", "slow2", "fast1", "fast2"]


def test_what_a_job_took_before_counts_more_than_the_mean_of_its_family() -> None:
    waiting = WaitingJobs()
    told = zip(jobs("a1", "a2", "b1", "a3", "a4"), (5.0, 20.0, None, 12.0, 12.0), strict=True)
    waiting.extend(replace(job, expected_ms=expected_ms) for job, expected_ms in told)
    for outcome in (took("a9", 100.0), took("b9", 10.0)):
        waiting.learn(outcome)
    assert names(waiting) == ["a2", "a3", "a4", "b1", "a1"]


def test_what_came_back_is_next_in_its_order() -> None:
    waiting = WaitingJobs()
    waiting.extend(jobs("a1", "a2", "a3", "b1"))
    first = [waiting.take(), waiting.take()]
    waiting.put_back(first)
    waiting.put_back(jobs("c1"))
    assert len(waiting) == 5 and names(waiting) == ["c1", "a1", "a2", "a3", "b1"]


def test_forgetting_the_jobs_keeps_the_times() -> None:
    waiting = WaitingJobs()
    waiting.extend(jobs("fast1", "slow1"))
    waiting.put_back(jobs("fast2"))
    for outcome in (took("fast8", 1.0), took("slow8", 2.0)):
        waiting.learn(outcome)
    waiting.clear()
    assert not waiting
    with pytest.raises(IndexError, match="no job waits"):
        waiting.take()
    waiting.extend(jobs("fast1", "slow1"))
    assert names(waiting) == ["slow1", "fast1"]
