"""Several `tune` processes on one database: no trial twice, none lost, and the winners that one process finds."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cpu import fleet_fakes
from cpu.fleet_fakes import FINGERPRINT, Forker

from nsa_autotune.cli import tune_predict
from nsa_autotune.cli.app import main
from nsa_autotune.db.claims import Unit
from nsa_autotune.db.records import TrialRecord
from nsa_autotune.db.shared import SharedStore
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import ClaimLost
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.lease import Lease
from nsa_autotune.search.presets import get_preset
from nsa_autotune.search.ranking import Prediction
from nsa_autotune.spec import Problem

COMMAND = ("tune", "--families", "gate_sum_fwd", "--seq", "1k,2k,4k,8k", "--trials", "50", "--jobs", "1")
PROBLEMS, CONFIGS = 4, 20  # the space of gate_sum_fwd: 50 trials cover it
UNIT = Unit("gate_sum_fwd", "{}", "t", "f", "eager-cold")
FOREVER_S = 1e12  # later than any time
TRIAL = TrialRecord({"gpu": "g", "capability": "9.0"}, "gate_sum_fwd", {}, "{}", {"i": 1}, "t", "ok")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tuning.sqlite'}"


@pytest.fixture
def store(url: str) -> Iterator[SharedStore]:
    with SharedStore(url, import_shipped=False) as opened:
        yield opened


# claims


def test_a_unit_has_one_owner_until_it_is_given_back(store: SharedStore) -> None:
    assert store.claim(UNIT, "a", 60, 0) == "mine"
    assert store.claim(UNIT, "a", 60, 0) == "mine"
    assert store.claim(UNIT, "b", 60, 0) == "busy"
    other_gpu = replace(UNIT, fingerprint_digest="another")
    assert store.claim(other_gpu, "b", 60, 0) == "mine", "a different GPU waits for nobody"
    assert store.release([UNIT], "b") == 0 and store.claim(UNIT, "b", 60, 0) == "busy"
    assert store.release([UNIT], "a") == 1 and store.claim(UNIT, "b", 60, 0) == "mine"
    assert {claim.unit: claim.owner for claim in store.claims()} == {UNIT: "b", other_gpu: "b"}


def test_a_lease_that_ran_out_is_taken_over_and_then_lost(store: SharedStore) -> None:
    assert store.claim(UNIT, "a", -1, 0) == "mine"
    assert store.renew([UNIT], "a", -1) == 1, "nobody has it yet"
    assert store.claim(UNIT, "b", 60, 0) == "mine"
    assert store.renew([UNIT], "a", 60) == 0
    assert not store.finish(UNIT, "a")
    with store.fenced(UNIT, "a", 60), pytest.raises(ClaimLost, match="taken over"):
        store.add_trial(TRIAL)
    assert store.trials() == [], "what the dead wrote late is in nobody's way"
    with store.fenced(UNIT, "b", 60):
        store.add_trial(TRIAL)
    assert store.trials() == [TRIAL]


def test_what_is_done_is_done_for_those_who_began_before(store: SharedStore) -> None:
    began_s = store.now_s()
    assert store.claim(UNIT, "a", 60, began_s) == "mine" and store.finish(UNIT, "a")
    assert store.claim(UNIT, "b", 60, began_s) == "done"
    assert store.claim(UNIT, "b", 60, FOREVER_S) == "mine", "who comes later may do it again"


def test_of_many_that_ask_at_once_one_gets_it(url: str, store: SharedStore) -> None:
    answers: list[str] = []
    start = threading.Barrier(8)

    def ask(owner: str) -> None:
        with SharedStore(url, import_shipped=False) as own:
            start.wait()
            answers.append(own.claim(UNIT, owner, 60, 0))

    threads = [threading.Thread(target=ask, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answers) == {"mine": 1, "busy": 7}


def test_a_lease_is_renewed_by_itself_and_given_back(store: SharedStore) -> None:
    with Lease(store, since_s=store.now_s(), seconds=0.4) as lease:
        assert lease.take(UNIT) == "mine"
        first_s = store.claims()[0].expires_s
        fleet_fakes.until(lambda: store.claims()[0].expires_s > first_s, 5.0)
        assert store.claim(UNIT, "b", 60, 0) == "busy"
    assert store.claims() == []


def test_an_error_gives_the_unit_back(store: SharedStore) -> None:
    with Lease(store, since_s=store.now_s()) as lease:
        lease.take(UNIT)
        with pytest.raises(KeyboardInterrupt), lease.working(UNIT):
            raise KeyboardInterrupt
        assert store.claims() == []
        lease.take(UNIT)
        with lease.working(UNIT):
            store.add_trial(TRIAL)
        assert store.claim(UNIT, "b", 60, lease.since_s) == "done"
        with lease.working(UNIT), pytest.raises(ClaimLost):  # it was finished, so it is no longer ours
            store.add_trial(replace(TRIAL, status="crash"))


def test_predictions_are_claimed_too(
    url: str, store: SharedStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = get_spec("gate_sum_fwd")
    ranked = [Prediction(spec.default_config(Problem()), 1.5, {"registers": 31, "shared_bytes": 0})]
    predicted: list[tuple[str, int]] = []

    def predict(spec: object, problem: Problem, *, target: str, **_: object) -> list[Prediction]:
        predicted.append((target, problem.seq_k))
        return ranked

    command = ["tune", "--families", "gate_sum_fwd", "--seq", "1k,2k", "--target", "cuda:90", "--preset", "gqa16-d128"]
    usual = get_preset("gqa16-d128").problem
    parts = (("cuda:90", spec, usual.replace(seq_q=n, seq_k=n)) for n in (1024, 2048))
    first, second = map(tune_predict.unit_for, parts)
    monkeypatch.setattr("nsa_autotune.search.predict.predict_problem", predict)
    monkeypatch.setattr("nsa_autotune.search.predict.stored_predictions", lambda *_, target, **__: ranked)
    assert store.claim(first, "another", 60, 0) == "mine"
    assert main([*command, "--db", url, "--no-check", "--minutes", "0.01"]) == 0
    assert predicted == [("cuda:90", 2048)] and "1 left to other processes" in capsys.readouterr().err
    monkeypatch.setattr(tune_predict.time, "sleep", lambda _: store.finish(first, "another"))
    assert main([*command, "--db", url, "--no-check", "--trials", "5"]) == 0
    assert predicted == [("cuda:90", 2048)] * 2
    captured = capsys.readouterr()
    assert "predicted for cuda:90 by another process" in captured.err and "T 1024" in captured.out
    assert [claim.unit for claim in store.claims() if claim.done_s is None] == [] and second != first


# whole runs


def winners_of(url: str) -> dict[int, tuple[str, float, str]]:
    """Config, time and verdict of each problem's winner."""
    with TuningStore(url) as store:
        found = store.winners(gpu=FINGERPRINT.gpu)
        return {w.problem["seq_k"]: (str(sorted(w.config.items())), w.median_us, w.verdict) for w in found}


def search_trials(url: str) -> Counter[tuple[int, str]]:
    """How often each problem and config was measured in a search."""
    with TuningStore(url) as store:
        found = store.trials(gpu=FINGERPRINT.gpu, stage="search")
        return Counter((t.problem["seq_k"], str(sorted(t.config.items()))) for t in found)


def stored_digests(url: str) -> set[str]:
    """Digests of all trials."""
    with TuningStore(url) as store:
        return {trial.digest for trial in store.trials(gpu=FINGERPRINT.gpu)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, float, str]]:
    """The winners that one process finds."""
    url = f"sqlite:///{tmp_path_factory.mktemp('alone') / 'tuning.sqlite'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("nsa_autotune.bench.worker.MeasureWorker", fleet_fakes.FakeWorker)
        patch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: FINGERPRINT)
        assert main([*COMMAND, "--db", url]) == 0
    assert set(search_trials(url).values()) == {1}
    found = winners_of(url)
    assert len(found) == PROBLEMS and {verdict for _, _, verdict in found.values()} == {"confirmed"}
    return found


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as opened:
        yield opened


def test_three_processes_do_every_trial_once(
    forker: Forker, tmp_path: Path, url: str, alone: dict[int, tuple[str, float, str]]
) -> None:
    fleet = forker.start(tmp_path / "fleet", [*COMMAND, "--db", url], 3)
    fleet.ends(0, 0, 0)
    counts = search_trials(url)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}
    told = [digest for index in range(3) for digest in fleet.told(index)]
    assert len(told) == len(set(told)) and set(told) <= stored_digests(url)
    assert sum(bool(fleet.told(index)) for index in range(3)) >= 2, "the work was divided"
    assert winners_of(url) == alone
    assert any("tuned by other processes meanwhile" in fleet.said(index) for index in range(3))
    with SharedStore(url) as store:
        assert all(claim.done_s is not None for claim in store.claims())


def test_the_work_of_a_killed_process_is_taken_over(
    forker: Forker, tmp_path: Path, url: str, alone: dict[int, tuple[str, float, str]]
) -> None:
    fleet = forker.start(tmp_path / "fleet", [*COMMAND, "--db", url], 2, delay_s=0.02)
    fleet.kill(0, after=5)
    fleet.ends(-9, 0)
    counts = search_trials(url)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}, "its trials count"
    assert set(fleet.told(0)) <= stored_digests(url), "what it told is stored"
    assert winners_of(url) == alone


def is_stopped(pid: int) -> bool:
    """True once no thread of it runs; in Linux's line the state follows the name, which may hold spaces."""
    lines = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(line.rpartition(")")[2].split()[0] == "T" for line in lines)


def stopped_between_writes(pid: int, url: str) -> bool:
    """Stop a process unless it holds the lock of the database, for which others wait 30 seconds and then give up."""
    os.kill(pid, signal.SIGSTOP)
    fleet_fakes.until(lambda: is_stopped(pid), 60.0)  # a signal is only a wish: it may first take the lock
    database = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0.2, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")
    except sqlite3.OperationalError:
        os.kill(pid, signal.SIGCONT)
        return False
    finally:
        database.close()
    return True


def test_a_process_that_was_stopped_stores_nothing_for_work_that_is_no_longer_its_own(
    forker: Forker, tmp_path: Path, url: str, alone: dict[int, tuple[str, float, str]]
) -> None:
    fleet = forker.start(tmp_path / "fleet", [*COMMAND, "--db", url], 2, delay_s=0.02)
    fleet_fakes.until(lambda: len(fleet.told(0)) >= 3, 60.0)
    fleet_fakes.until(lambda: stopped_between_writes(fleet.pid(0), url), 60.0)
    fleet_fakes.until((tmp_path / "fleet" / "1.code").exists, 60.0)
    os.kill(fleet.pid(0), signal.SIGCONT)
    fleet.ends(0, 0)
    assert "taken over by another process" in fleet.said(0)
    counts = search_trials(url)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}
    assert winners_of(url) == alone


def test_retuned_problems_are_measured_once_by_all_together(forker: Forker, tmp_path: Path, url: str) -> None:
    began = forker.start(tmp_path / "first", [*COMMAND, "--db", url], 1)
    began.ends(0)
    fleet = forker.start(tmp_path / "again", [*COMMAND, "--db", url, "--retune"], 2)
    fleet.ends(0, 0)
    with TuningStore(url) as store:
        races = Counter(
            t.problem["seq_k"] for t in store.trials(gpu=FINGERPRINT.gpu, stage="final", provider="template")
        )
    assert len(races) == PROBLEMS
    first = set(began.told(0))
    raced_again = {digest for index in range(2) for digest in fleet.told(index)} - first
    assert raced_again and len(raced_again) == sum(len(fleet.told(index)) for index in range(2))
