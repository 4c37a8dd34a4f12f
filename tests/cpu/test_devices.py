"""`tune --devices`: a process for each GPU, lines with the device in front, deaths that others survive, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from cpu.fleet_fakes import FINGERPRINT, member_command, until

from nsa_autotune.cli import tune as tune_command
from nsa_autotune.cli import tune_devices
from nsa_autotune.cli.app import main
from nsa_autotune.cli.member import order_of, run_of
from nsa_autotune.cli.tune_run import Run, share
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.budget import Budget
from nsa_autotune.spec import Problem

COMMAND = ("tune", "--families", "gate_sum_fwd", "--seq", "1k,2k,4k", "--trials", "50", "--jobs", "2")
PROBLEMS, CONFIGS = 3, 20


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tune_devices.Member]:
    """Pretended GPUs; what was started."""
    started: list[tune_devices.Member] = []
    real = tune_devices.Member.start

    def start(run: Run, command: list[str]) -> tune_devices.Member:
        started.append(real(run, command))
        return started[-1]

    monkeypatch.setattr(tune_devices.Member, "start", start)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: FINGERPRINT)
    return started


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tuning.sqlite'}"


def test_two_devices_divide_the_work_and_one_may_die(
    on_gpus: list[tune_devices.Member],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune_devices, "MEMBER", member_command(delay_s=0.02, lease_s=1.0))

    def kill_the_second() -> None:
        with TuningStore(url) as store:
            until(lambda: len(store.trials(gpu=FINGERPRINT.gpu)) >= 5, 60.0)
        os.kill(on_gpus[1].process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    code = main([*COMMAND, "--db", url, "--devices", "cuda:0,cuda:1"])
    killer.join()
    captured = capfd.readouterr()
    assert code == 0, captured.err
    assert "cuda:1| it was ended by SIGKILL" in captured.err and "cuda:0| gate_sum_fwd" in captured.err
    assert captured.out.count("gate_sum_fwd  ") == PROBLEMS == captured.out.count("confirmed")
    with TuningStore(url) as store:
        trials = store.trials(gpu=FINGERPRINT.gpu, stage="search")
        winners = store.winners(gpu=FINGERPRINT.gpu)
    counts = Counter((t.problem["seq_k"], str(sorted(t.config.items()))) for t in trials)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}
    assert [(w.config["num_warps"], w.median_us) for w in winners] == [(2, 10.0)] * PROBLEMS


def test_ctrl_c_ends_all(
    on_gpus: list[tune_devices.Member], url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waits = "import sys, time; sys.stdin.readline(); print('begun', file=sys.stderr, flush=True); time.sleep(60)"
    monkeypatch.setattr(tune_devices, "MEMBER", [sys.executable, "-c", waits])
    main_pid = os.getpid()

    def interrupt() -> None:
        until(lambda: len(on_gpus) == 2, 30.0)
        os.kill(main_pid, signal.SIGINT)

    thread = threading.Timer(0.5, interrupt)
    thread.start()
    assert main([*COMMAND, "--db", url, "--devices", "cuda:0,cuda:1"]) == 130
    thread.join()
    assert all(member.process.returncode is not None for member in on_gpus)
    assert "the same command resumes" in " ".join(capfd.readouterr().err.split())


def test_an_order_arrives_as_it_was_given() -> None:
    work = tuple((get_spec("gate_sum_fwd"), Problem(seq_q=n, seq_k=n)) for n in (1024, 2048))
    run = Run(
        work,
        Budget(7, 3.0, confirm=False),
        "sqlite:///x",
        "cuda:1",
        (),
        True,
        3,
        False,
        "graph-warm",
        True,
        5.5,
        2,
        tries=(("gate_sum_fwd", {"BLOCK": 1024}),),
    )
    assert run_of(order_of(run, 42)) == (run, 42)


def test_devices_are_named_or_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune_devices.choose_devices("cuda:1, cuda:0,cuda:1") == ("cuda:1", "cuda:0")
    assert tune_devices.choose_devices("all") == ("cuda:0", "cuda:1", "cuda:2")
    with pytest.raises(InvalidInput, match="is a CUDA device"):
        tune_devices.choose_devices("gpu7")
    assert main([*COMMAND, "--devices", "all", "--db", "sqlite://"]) == 2
    assert "a database all can write" in capsys.readouterr().err
    assert main([*COMMAND, "--devices", "all", "--target", "cuda:90"]) == 2
    assert "and a --target is absent" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InvalidInput, match="needs a GPU"):
        tune_devices.choose_devices("all")


def test_a_device_that_is_not_here_is_told_before_anything_starts(
    on_gpus: list[tune_devices.Member], url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_devices.choose_devices("cuda") == ("cuda",)
    for count, sentence in ((3, "there is no such GPU here; got --devices=['cuda:3'], found=3"), (0, "needs a GPU")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert main([*COMMAND, "--db", url, "--devices", "cuda:0,cuda:3"]) == 2
        assert sentence in capsys.readouterr().err and on_gpus == []


def test_minutes_of_a_problem_grow_with_the_processes() -> None:
    budget = Budget(9, 12.0)
    assert share(budget, 2.0, to_do=5) == Budget(9, 2.0)
    assert share(budget, 2.0, to_do=5, members=2) == Budget(9, 4.0)
    assert share(budget, 2.0, to_do=1, members=8) == Budget(9, 10.0), "no more than is left"


def test_members_share_cores_and_minutes(
    on_gpus: list[tune_devices.Member], url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saves = f"import os, sys; open(r'{tmp_path}/' + str(os.getpid()), 'w').write(sys.stdin.readline())"
    monkeypatch.setattr(tune_devices, "MEMBER", [sys.executable, "-c", saves])
    runs: list[Run] = []
    monkeypatch.setattr(tune_command, "execute", lambda run: runs.append(run) or 0)
    assert main([*COMMAND, "--db", url, "--minutes", "5"]) == 0
    assert main([*COMMAND, "--db", url, "--minutes", "5", "--devices", "cuda:0,cuda:1"]) == 1, "nothing was measured"
    found = [run_of((tmp_path / str(member.process.pid)).read_text())[0] for member in on_gpus]
    assert [(run.device, run.jobs, run.members) for run in found] == [("cuda:0", 1, 2), ("cuda:1", 1, 2)]
    assert found[0].since_s == found[1].since_s is not None
    assert {(run.work, run.budget, run.db) for run in found} == {(runs[0].work, runs[0].budget, url)}
