"""What crashed twice or hung once stays away; what a journal suspects is tried once more, last."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from cpu.search_fakes import DEFAULT, FINGERPRINT, PROBLEM, SPACE, SPEC, digest_of, timed

from nsa_autotune.bench.journal import SUSPICION, Journal, StageLines
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.cli import tune_measure, tune_run
from nsa_autotune.cli.app import main
from nsa_autotune.cli.doctor import quarantine_text
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db.records import TrialRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.errors import WorkerError
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.quarantine import (
    all_quarantined,
    context_of_run,
    faulty,
    quarantined,
    retry_suspected,
    store_suspects,
    suspected,
)
from nsa_autotune.search.space import config_key
from nsa_autotune.search.study import ConfigSearch
from nsa_autotune.search.task import Task
from nsa_autotune.spec import Config, Problem

TASK = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC))
KEY = config_key(DEFAULT)
CRASH = TrialResult("crash", "In stage 'launch': the measuring process ended with signal SIGSEGV.")
HANG = TrialResult("timeout", "In stage 'launch': no answer within 2 s.")
SUSPICIOUS = TrialResult("crash", f"{SUSPICION} journal.jsonl: in stage 'launch' when host or tuner died.")
RAISED = TrialResult("runtime", "an illegal memory access")
OTHER: Config = {**DEFAULT, "num_warps": 8}


@pytest.fixture
def store() -> TuningStore:
    return TuningStore("sqlite://", import_shipped=False)


def add(store: TuningStore, *results: TrialResult, task: Task = TASK, config: Config = DEFAULT) -> list[TrialRecord]:
    """Store results of one config, oldest first."""
    records = [
        replace(task.trial(config, result, "search"), created=f"2026-01-01T00:00:{number:02}+00:00")
        for number, result in enumerate(results)
    ]
    store.add_trials(records)
    return records


@pytest.mark.parametrize(
    ("results", "stays_away"),
    [
        ((), False),
        ((timed(5.0),), False),
        ((CRASH,), True),  # the worker tried twice
        ((HANG,), True),
        ((SUSPICIOUS,), False),
        ((SUSPICIOUS, SUSPICIOUS), True),
        ((timed(5.0), HANG), True),
        ((HANG, timed(5.0)), False),  # tried by demand, and it worked
        ((SUSPICIOUS, timed(5.0), SUSPICIOUS), False),
        ((SUSPICIOUS, timed(None)), False),  # wrong, but it ran to its end
        ((SUSPICIOUS, RAISED, SUSPICIOUS), True),
        ((RAISED, RAISED, RAISED), False),  # known to fail, and no danger
    ],
    ids=lambda value: "-".join(result.status for result in value) if isinstance(value, tuple) else None,
)
def test_two_crashes_or_one_hang(store: TuningStore, results: Sequence[TrialResult], stays_away: bool) -> None:
    add(store, *results)
    found = quarantined(store, TASK)
    assert (KEY in found) is stays_away and len(found) <= 1
    if stays_away:
        assert found[KEY] == f"{results[-1].status}: {results[-1].reason}"
    once = [(SUSPICIOUS,), (SUSPICIOUS, timed(5.0), SUSPICIOUS)]
    assert suspected(store, TASK) == ([DEFAULT] if tuple(results) in once else [])


def test_the_order_of_trials_is_that_of_their_times(store: TuningStore) -> None:
    records = add(store, HANG, timed(5.0))
    assert faulty(records) == faulty(records[::-1]) == {}


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(TASK, fingerprint={**FINGERPRINT, "driver": "2"}),
        replace(TASK, template_digest="changed since"),
        replace(TASK, problem=PROBLEM.replace(seq_q=2048, seq_k=2048)),
    ],
    ids=["driver", "template", "problem"],
)
def test_another_machine_template_or_problem_is_another_matter(store: TuningStore, elsewhere: Task) -> None:
    add(store, HANG, task=elsewhere)
    assert quarantined(store, TASK) == {} and KEY in quarantined(store, elsewhere)
    near = replace(TASK, problem=PROBLEM.replace(seq_q=500, seq_k=500))
    add(store, HANG, task=near, config=OTHER)
    assert config_key(OTHER) in quarantined(store, TASK), "a bucket shares its kernels"


def test_configs_are_told_apart_and_predictions_do_not_count(store: TuningStore) -> None:
    add(store, HANG)
    add(store, timed(5.0), config=OTHER)
    predicted = TASK.prediction({**DEFAULT, "num_warps": 2}, "timeout", "the compiler ran past its limit", None, None)
    store.add_trial(predicted)
    assert set(quarantined(store, TASK)) == {KEY}


def test_quarantined_configs_are_never_proposed(store: TuningStore) -> None:
    """The two lines that a tuner needs: drop what is stored of them, and let the search know them as failures."""
    add(store, timed(5.0), HANG)
    search = ConfigSearch(SPACE, seed=1, seeds=[DEFAULT, OTHER])
    for key in quarantined(store, TASK):
        search.remember(json.loads(key), None)
    proposed = [search.propose() for _ in range(50)]
    assert OTHER in proposed and DEFAULT not in proposed and search.ranked() == []


class Recorder:
    """Answers as told, and remembers what it was asked."""

    def __init__(self, result: TrialResult) -> None:
        self.result, self.asked = result, list[Config]()

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """One trial."""
        self.asked.append(config)
        return self.result


@pytest.mark.parametrize(("result", "stays_away"), [(timed(5.0), False), (CRASH, True), (HANG, True)])
def test_a_suspect_gets_one_more_chance(store: TuningStore, result: TrialResult, stays_away: bool) -> None:
    add(store, SUSPICIOUS)
    measurer = Recorder(result)
    (trial,) = retry_suspected(store, TASK, measurer)
    assert trial.status == result.status and measurer.asked == [DEFAULT]
    assert (KEY in quarantined(store, TASK)) is stays_away
    assert retry_suspected(store, TASK, measurer) == [], "it is cleared or in quarantine"


HERE = Fingerprint(**FINGERPRINT)
GATE_SUM = get_spec("gate_sum_fwd")
SMALL = Problem(seq_q=1024, seq_k=1024)


def dead_run(folder: Path | None = None, device: str = "cuda:0") -> Config:
    """The journal of a run that died in a launch of the default config."""
    journal = Journal(device, folder, context_of_run(HERE.to_dict()))
    config = GATE_SUM.default_config(SMALL)
    journal.ask("gate_sum_fwd", SMALL.to_dict(), [config])
    StageLines(str(journal.path)).tell(0, "launch")
    os.close(journal._file)
    return config


def test_what_a_journal_names_is_stored_once(tmp_path: Path, store: TuningStore) -> None:
    config = dead_run(tmp_path)
    with Journal("cuda:0", tmp_path) as journal:
        suspects = journal.unfinished()
    assert store_suspects(store, suspects) == 1
    assert store_suspects(store, suspects) == 1
    (trial,) = store.trials()
    assert trial.config == config and trial.fingerprint == HERE.to_dict() and trial.created == suspects[0].when
    assert trial.template_digest == template_digest(GATE_SUM) and "'launch'" in trial.reason
    task = Task(GATE_SUM, SMALL, HERE.to_dict(), trial.template_digest)
    assert suspected(store, task) == [config] and quarantined(store, task) == {}
    assert store_suspects(store, [replace(suspects[0], family="gone"), replace(suspects[0], provider="cudnn")]) == 0

    again = replace(suspects[0], when="2099-01-01T00:00:00+00:00")
    store_suspects(store, [again])
    assert suspected(store, task) == [] and config_key(config) in quarantined(store, task), "the second time"


class FakeWorker:
    """Every config takes as long as it has warps, and the order of what was asked is kept."""

    lose_after = 10_000
    asked: list[tuple[int, str]] = []  # noqa: RUF012 - one for each test, see the fixture

    def __init__(self, device: str, **options: object) -> None:
        pass

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """One trial."""
        if len(self.asked) >= self.lose_after:
            raise WorkerError("the device is lost: it failed its check in two new processes", {"said": "ECC"})
        self.asked.append((problem.seq_k, config_key(config)))
        return timed(float(config["num_warps"]))

    def renew(self) -> None:
        """Nothing: there is no process."""

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        """All of them."""
        return [self.measure(family, problem, config) for config in configs]


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeWorker]:
    """A machine with a GPU, its worker, its fingerprint and its journal pretended."""

    class Worker(FakeWorker):
        asked: list[tuple[int, str]] = []  # noqa: RUF012
        policy = "eager-cold"

    monkeypatch.setenv("NSA_AUTOTUNE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("nsa_autotune.bench.worker.MeasureWorker", Worker)
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: HERE)
    return Worker


def command(tmp_path: Path) -> list[str]:
    """A small run of two problems."""
    line = ["tune", "--families", "gate_sum_fwd", "--seq", "1k,2k", "--trials", "4", "--jobs", "1"]
    return [*line, "--db", f"sqlite:///{tmp_path / 'tuning.sqlite'}"]


def test_a_run_after_a_dead_host_names_the_killer_and_tries_it_last(
    fake_worker: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dead_run()
    assert main(command(tmp_path)) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "an earlier run died" in err and "tried once more: ok" in err
    mine = [at for at, asked in enumerate(fake_worker.asked) if asked == (1024, config_key(config))]
    assert mine == [len(fake_worker.asked) - 1], "once, after everything else"
    with TuningStore(f"sqlite:///{tmp_path / 'tuning.sqlite'}") as store:
        trials = [t for t in store.trials(stage="search") if t.config == config and t.problem["seq_k"] == 1024]
    assert [trial.status for trial in trials] == ["ok", "crash"]
    (journal,) = (tmp_path / "state").iterdir()
    assert journal.read_bytes() == b""


@pytest.mark.usefixtures("nothing_shipped")
def test_a_lost_device_ends_the_run_with_everything_stored(
    fake_worker: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_worker.lose_after = 8  # in the second problem
    assert main(command(tmp_path)) == 2
    captured = capsys.readouterr()
    assert "device is lost" in captured.err and "winners" in captured.out
    with TuningStore(f"sqlite:///{tmp_path / 'tuning.sqlite'}") as store:
        winners, trials = store.winners(gpu=FINGERPRINT["gpu"]), store.trials()
    assert [winner.problem["seq_k"] for winner in winners] == [1024]
    assert len(trials) == len(fake_worker.asked) == 8


@pytest.mark.usefixtures("nothing_shipped")
def test_a_full_database_ends_the_run_and_loses_nothing(
    fake_worker: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite's own limit stands for a full disk: the error is the same."""
    real = tune_measure.measure

    def with_a_full_disk(run: tune_run.Run, store: TuningStore, display: object) -> None:
        @sa.event.listens_for(store._engine, "begin")
        def limit(connection: object) -> None:
            if len(fake_worker.asked) >= 3:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar()  # type: ignore[attr-defined]
                connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # type: ignore[attr-defined]

        real(run, store, display)  # type: ignore[arg-type]

    monkeypatch.setattr(tune_measure, "measure", with_a_full_disk)
    monkeypatch.setattr(FakeWorker, "measure", measure_with_long_reason)
    assert main(command(tmp_path)) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "the disk of the database is full" in err and "nothing was half-written" in err
    with TuningStore(f"sqlite:///{tmp_path / 'tuning.sqlite'}") as store:
        kept = len(store.trials())
    assert 2 <= kept == len(fake_worker.asked) - 1
    monkeypatch.setattr(tune_measure, "measure", real)
    assert main(command(tmp_path)) == 0
    with TuningStore(f"sqlite:///{tmp_path / 'tuning.sqlite'}") as store:
        assert len(store.winners(gpu=FINGERPRINT["gpu"])) == 2 and len(store.trials()) > kept


def measure_with_long_reason(self: FakeWorker, family: str, problem: Problem, config: Config) -> TrialResult:
    """A record that needs pages of its own."""
    self.asked.append((problem.seq_k, config_key(config)))
    return replace(timed(float(config["num_warps"])), reason="x" * 7900)


def test_doctor_counts_what_is_in_quarantine(store: TuningStore) -> None:
    here = template_digest(GATE_SUM)
    for driver in ("1", "2"):
        task = Task(GATE_SUM, SMALL, {**FINGERPRINT, "driver": driver}, here)
        for warps in (1, 2):
            add(store, HANG, task=task, config={"BLOCK": 64, "num_warps": warps})
        add(store, CRASH, task=task, config={"BLOCK": 64, "num_warps": 4})
        add(store, SUSPICIOUS, task=task, config={"BLOCK": 64, "num_warps": 8})
    add(store, HANG, task=Task(GATE_SUM, SMALL, FINGERPRINT, "changed since"))
    assert len(all_quarantined(store.trials(), {"gate_sum_fwd": here})) == 6
    text = quarantine_text(store.trials())
    assert text.startswith("6; 4 x timeout: In stage 'launch': no answer within 2 s.; 2 x crash: In stage 'launch'")
    assert quarantine_text([]) == "0"
