"""`nsa-autotune recertify` and what `doctor` says of stale winners, on a pretended GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.cli.app import main
from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.pool import CompileJob, CompileOutcome
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db.records import WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Config, KernelSpec, Problem, canonical_json

OLD = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
OLD |= {"assembler": "ptxas 12.8"}
HERE = {**OLD, "triton": "3.9", "assembler": "ptxas 13.4"}
FAMILY = "gate_sum_fwd"
COMMAND = ("recertify", "--families", FAMILY, "--jobs", "1")

Run = Callable[..., tuple[int, str, str]]


class Worker:
    """512 elements with 2 warps take 10 us, every other config of gate_sum_fwd 20."""

    best_us = 10.0
    races = 0
    measured = 0
    renewed = 0
    interrupt = False

    def __init__(self, device: str, policy: str = "eager-cold") -> None:
        self.policy = policy

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def renew(self) -> None:
        type(self).renewed += 1

    def _time(self, config: Config) -> TrialResult:
        time_us = self.best_us if (config["BLOCK"], config["num_warps"]) == (512, 2) else 20.0
        return TrialResult("ok", "", (time_us,) * 8, time_us, time_us, time_us)

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        type(self).measured += 1
        return self._time(config)

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        type(self).races += 1
        if self.interrupt and self.races == 2:
            raise KeyboardInterrupt
        return [self._time(config) for config in configs]


def winner(seq: int, **changes: Any) -> WinnerRecord:
    """A winner of other versions, whose machine code is known as `old`."""
    spec, problem = get_spec(FAMILY), Problem(seq_q=seq, seq_k=seq)
    default = spec.default_config(problem)
    record = WinnerRecord(
        fingerprint=OLD,
        family=FAMILY,
        problem=problem.to_dict(),
        problem_key=spec.problem_key(problem),
        config={**default, "BLOCK": 512, "num_warps": 2},
        template_digest=template_digest(spec),
        median_us=10.0,
        p20_us=9.9,
        p80_us=10.1,
        samples_us=(9.9, 10.0, 10.1),
        default_config=default,
        default_median_us=20.0,
        resources={"binary_sha": "old"},
        created=f"2026-01-01T00:00:{seq // 1024:02d}+00:00",
    )
    return replace(record, **changes)


def compiles_to(sha_of: Callable[[CompileJob], str]) -> Callable[..., Iterator[CompileOutcome]]:
    """In the place of `compile_many`."""

    def compile_many(specs: dict[str, KernelSpec], jobs: Sequence[CompileJob], *_: object) -> Iterator[CompileOutcome]:
        return (CompileOutcome(job, "ok", resources=Resources(32, 0, 0, 2, sha_of(job), 1.0)) for job in jobs)

    return compile_many


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    """A machine with a GPU and newer versions; what is 2048 tokens long keeps its machine code, the rest does not."""

    class Own(Worker):
        pass

    fingerprint = Fingerprint(**HERE)
    sha_of = lambda job: "old" if job.problem["seq_k"] == 2048 else "new"  # noqa: E731
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: HERE["gpu"])
    monkeypatch.setattr("nsa_autotune.bench.worker.MeasureWorker", Own)
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: fingerprint)
    monkeypatch.setattr("nsa_autotune.codegen.pool.compile_many", compiles_to(sha_of))
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)
    return Own


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a database with four stale winners, one of them under another policy."""
    url = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    with TuningStore(url, import_shipped=False) as store:
        for seq in (2048, 4096, 8192):
            store.set_winner(winner(seq))
        store.set_winner(winner(4096, policy="graph-warm"))
        store.set_winner(winner(2048, fingerprint={**OLD, "gpu": "Other GPU"}))
    return url


def verdicts(url: str) -> dict[tuple[int, str], str]:
    """By length and policy, of the winners of the present."""
    with TuningStore(url) as store:
        found = [w for w in store.winners(gpu="Test GPU") if w.fingerprint == HERE]
    return {(w.problem["seq_k"], w.policy): w.verdict for w in found}


def test_the_same_code_is_carried_and_the_rest_is_raced_and_confirmed(gpu: type[Worker], url: str, run: Run) -> None:
    code, out, err = run(*COMMAND, "--db", url)
    assert code == 0
    assert verdicts(url) == {
        (2048, "eager-cold"): "carried",
        (4096, "eager-cold"): "confirmed",
        (8192, "eager-cold"): "confirmed",
        (4096, "graph-warm"): "confirmed",
    }
    assert gpu.races == 6 and gpu.measured == 0 and gpu.renewed == 2
    assert out.count("raced: kept") == 3 and out.count("triton, assembler") == 4
    assert f"{FAMILY} T 2048 HQ 64 H 4 d 128 bfloat16: carried" in err
    code, out, _ = run(*COMMAND, "--db", url)
    assert (code, out.strip(), gpu.races) == (0, "nothing is stale", 6)


def test_what_all_winners_need_is_compiled_together_and_once(
    gpu: type[Worker], url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[tuple[int, str]]] = []
    compile_many = compiles_to(lambda job: "old")

    def counting(specs: Any, jobs: Sequence[CompileJob], *rest: Any) -> Iterator[CompileOutcome]:
        batches.append([(job.problem["seq_k"], canonical_json(job.config)) for job in jobs])
        return compile_many(specs, jobs, *rest)

    monkeypatch.setattr("nsa_autotune.codegen.pool.compile_many", counting)
    assert run(*COMMAND, "--db", url)[0] == 0
    assert set(verdicts(url).values()) == {"carried"} and len(batches) == 1
    assert len(set(batches[0])) == len(batches[0]) and {seq for seq, _ in batches[0]} == {2048, 4096, 8192}


def test_a_loss_opens_a_search_only_if_it_may(gpu: type[Worker], url: str, run: Run) -> None:
    gpu.best_us = 12.0
    code, out, err = run(*COMMAND, "--db", url, "--no-search")
    assert code == 0 and gpu.measured == 0
    assert out.count("20.0%") == 3 and "searched" not in out
    assert f"nsa-autotune tune --retune --families {FAMILY} searches anew" in err


def test_a_search_after_a_loss_keeps_to_its_budget(gpu: type[Worker], url: str, run: Run) -> None:
    gpu.best_us = 12.0
    code, out, err = run(*COMMAND, "--db", url, "--budget", "5")
    assert code == 0 and 3 * 5 <= gpu.measured <= 3 * 8  # steps beyond the ends of a dimension are extra
    assert out.count("searched") == 3 and "searches anew" not in err


def test_ctrl_c_keeps_what_is_done_and_the_same_command_resumes(gpu: type[Worker], url: str, run: Run) -> None:
    gpu.interrupt = True
    code, out, err = run(*COMMAND, "--db", url)
    assert code == 130 and "the same command resumes" in err
    assert out.count("raced: kept") == 1
    assert verdicts(url) == {(8192, "eager-cold"): "provisional"}
    gpu.interrupt = False
    assert run(*COMMAND, "--db", url)[0] == 0
    assert set(verdicts(url).values()) == {"carried", "confirmed"}, "also the one that was not confirmed before"


def test_a_dry_run_tells_and_stores_nothing(gpu: type[Worker], url: str, run: Run) -> None:
    code, out, _ = run(*COMMAND, "--db", url, "--dry-run")
    assert code == 0 and gpu.races == 0 and verdicts(url) == {}
    assert out.count("carries over") == 1 and out.count("races: other machine code") == 3
    assert "Other GPU" not in out


def test_without_a_gpu_a_target_is_compiled_for(
    gpu: type[Worker], url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    versions = {"triton": "3.9", "assembler": "ptxas 13.4"}
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.compilers", lambda target: versions)
    code, out, _ = run(*COMMAND, "--db", url, "--dry-run", "--target", "cuda:90")
    assert code == 0 and out.count("carries over") == 2 and "Other GPU" in out
    out = run(*COMMAND, "--db", url, "--dry-run", "--gpu", "other")[1]
    assert out.count("carries over") == 1 and "Test GPU" not in out
    assert run(*COMMAND, "--db", url, "--dry-run", "--target", "cuda:80")[1].strip() == "nothing is stale"
    code, _, err = run(*COMMAND, "--db", url)
    assert code == 2 and "--dry-run --target cuda:90" in err


def test_mistakes_get_a_sentence(gpu: type[Worker], url: str, run: Run) -> None:
    for arguments, words in (
        (("--gpu", "H100"), "--gpu goes with --target"),
        (("--target", "cuda:90"), "it needs --dry-run"),
        (("--budget", "quik"), "Did you mean 'quick'"),
        (("--families", "gate"), "gate"),
    ):
        code, _, err = run("recertify", *arguments, "--db", url)
        assert code == 2 and words in err, err


def test_a_database_that_cannot_be_written_is_refused(
    gpu: type[Worker], url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_autotune.db.store.is_read_only", lambda location: True)
    code, _, err = run(*COMMAND, "--db", url)
    assert code == 2 and "can be written" in err and gpu.races == 0


def test_a_gpu_that_nothing_compiles_for_races_everything(
    gpu: type[Worker], url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = Fingerprint(**{**HERE, "capability": "8.7"})
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: fingerprint)
    code, out, err = run(*COMMAND, "--db", url)
    assert code == 0 and "nothing can be compiled ahead for capability 8.7" in err
    assert out.count("raced: kept") == 4


def test_doctor_counts_what_is_stale_and_what_it_may_cost(gpu: type[Worker], url: str, run: Run) -> None:
    with TuningStore(url) as store:
        store.set_winner(winner(16384, template_digest="0" * 20))
    code, out, _ = run("doctor", "--db", url)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip()[:4] in ("asse", "temp", "trit")]
    assert ["assembler", "ptxas", "12.8", "ptxas", "13.4", "5"] in rows and ["triton", "3.6", "3.9", "5"] in rows
    assert ["template", "1"] in [row for row in rows if len(row) == 2]
    assert "5 problems are stale: 4 are served meanwhile" in out and "1 are not, their template has changed" in out
    assert "unknown until they are raced" in out
    assert "compiles up to 45 configs" in out and "4 may carry over" in out


def test_doctor_is_silent_if_nothing_is_stale(gpu: type[Worker], url: str, run: Run) -> None:
    assert run(*COMMAND, "--db", url)[0] == 0
    assert "stale winners of this GPU" not in run("doctor", "--db", url)[1]
