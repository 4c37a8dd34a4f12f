"""What is compiled ahead: who counts as a twin, what is refused, and that nothing cancelled comes back."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from cpu.search_fakes import DEFAULT, PROBLEM, SPEC

from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.grid import Launches
from nsa_autotune.codegen.pool import CompileJob, CompileOutcome
from nsa_autotune.search import ahead
from nsa_autotune.search.ahead import MAX_SPILL_BYTES, CompileAhead, Prepared, Unprepared, compile_ahead, prepared
from nsa_autotune.spec import Config

USUAL = {"registers": 64, "shared_bytes": 0, "spill_bytes": 0, "num_warps": 4, "compile_ms": 1.0}


def outcome(
    binary_sha: str = "a", call_sha: str = "b", spill_bytes: int = 0, config: Config = DEFAULT
) -> CompileOutcome:
    """A compilation that worked."""
    usual = {**USUAL, "spill_bytes": spill_bytes}
    resources = Resources(**usual, binary_sha=binary_sha, call_sha=call_sha)  # type: ignore[arg-type]
    return CompileOutcome(CompileJob(SPEC.family, PROBLEM.to_dict(), config), "ok", resources=resources)


def test_twins_have_the_machine_code_and_the_calls_of_each_other() -> None:
    code = prepared(outcome("a", "b")).code
    assert code and code == prepared(outcome("a", "b", config={**DEFAULT, "num_stages": 3})).code
    assert code != prepared(outcome("a", "c")).code  # the same kernel on another grid
    assert code != prepared(outcome("c", "b")).code
    assert prepared(outcome("a", "")).code == ""  # unknown calls make no twins


def test_calls_differ_by_grid_numbers_and_shapes() -> None:
    def sha(*calls: str) -> str:
        return Launches(calls=list(calls)).call_sha

    assert sha("(4,) [2]") == sha("(4,) [2]")
    assert len({sha(), sha("(4,) [2]"), sha("(8,) [2]"), sha("(4,) [3]"), sha("(4,) [2]", "(4,) [2]")}) == 5


def test_what_spills_or_failed_need_not_be_measured() -> None:
    assert prepared(outcome(spill_bytes=MAX_SPILL_BYTES)).failure is None
    refused = prepared(outcome(spill_bytes=MAX_SPILL_BYTES + 1)).failure
    assert prepared(outcome()).resources["registers"] == 64 and prepared(outcome()).resources["call_sha"] == "b"
    assert refused is not None and refused.status == "resource" and f"over {MAX_SPILL_BYTES}" in refused.reason
    failed = prepared(CompileOutcome(outcome().job, "timeout", "too long")).failure
    assert failed is not None and (failed.status, failed.reason) == ("timeout", "too long")


class FakePool:
    """Compiles one job with each wait; what was cancelled while it was under way comes back as well."""

    def __init__(self, *_: object) -> None:
        self.jobs: list[CompileJob] = []
        self.closed = False

    def submit(self, jobs: Iterable[CompileJob]) -> None:
        self.jobs += jobs

    def wait(self) -> list[CompileOutcome]:
        return [outcome(config=self.jobs.pop(0).config)] if self.jobs else []

    def cancel(self) -> None:
        del self.jobs[1:]  # the first is being compiled

    def close(self) -> None:
        self.closed = True


def test_what_was_cancelled_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CompilePool", FakePool)
    configs = [{**DEFAULT, "num_warps": warps} for warps in (1, 2, 4, 8)]
    with CompileAhead("cuda:90", 2) as compiling:
        compiling.submit(SPEC, PROBLEM, configs[:2])
        compiling.cancel()
        compiling.submit(SPEC, PROBLEM, configs[2:])
        taken = [one.config for _ in range(2) for one in compiling.take()]
        assert taken == configs[2:]
        assert compiling.take() == []
        pool = compiling._pool
    assert isinstance(pool, FakePool) and pool.closed


@pytest.mark.parametrize(("processes", "aside"), [(16, 8), (8, 4), (7, 0), (2, 0)])
def test_half_of_many_compilers_may_work_beside_the_search(
    processes: int, aside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "CompilePool", FakePool)
    with CompileAhead("cuda:90", processes) as compiling:
        assert compiling.aside == aside
    assert Unprepared.aside == 0


@pytest.mark.parametrize(("capability", "processes"), [("9.0", 1), ("7.0", 16)])
def test_nothing_is_compiled_ahead_where_it_is_pointless(capability: str, processes: int) -> None:
    with compile_ahead(capability, processes) as preparer:
        assert isinstance(preparer, Unprepared)
        preparer.submit(SPEC, PROBLEM, [DEFAULT])
        assert preparer.take() == [Prepared(DEFAULT)]
