"""`tune --ray` on a cluster of several nodes on this machine, with pretended GPUs, on a real PostgreSQL server."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cpu import pg_server
from cpu.fleet_fakes import FINGERPRINT, member_command, until

from nsa_autotune.cli import tune_ray
from nsa_autotune.cli.app import main
from nsa_autotune.db.shared import SharedStore
from nsa_autotune.db.store import TuningStore

COMMAND = ("tune", "--families", "gate_sum_fwd", "--seq", "1k,2k,4k", "--trials", "50", "--jobs", "1")
PROBLEMS, CONFIGS, NODES = 3, 20, 3
SMALL = {"num_cpus": 1, "object_store_memory": 80_000_000}
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install nsa-autotune[ray]")
needs_server = pytest.mark.skipif(bool(pg_server.why_not()), reason=pg_server.why_not() or "a server is here")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pg_server.Server() as server:
        yield server.make_database("fleet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(**SMALL, num_gpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def after_trials(url: str, number: int, act: Callable[[], object]) -> threading.Thread:
    """Do something once so many trials are stored."""

    def wait() -> None:
        with TuningStore(url) as store:
            until(lambda: len(store.trials(gpu=FINGERPRINT.gpu)) >= number, 90.0)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@needs_ray
@needs_server
def test_ctrl_c_ends_all_and_gives_claims_back(
    cluster: Any, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_ray, "MEMBER", member_command(delay_s=0.2, lease_s=60.0))
    main_pid = os.getpid()
    thread = after_trials(url, 3, lambda: os.kill(main_pid, signal.SIGINT))
    assert main([*COMMAND, "--db", url, "--ray", cluster.address]) == 130
    thread.join()
    assert "the same command resumes" in " ".join(capsys.readouterr().err.split())
    with SharedStore(url) as store:
        assert [claim for claim in store.claims() if claim.done_s is None] == []
        assert 3 <= len(store.trials(gpu=FINGERPRINT.gpu)) < PROBLEMS * CONFIGS


@needs_ray
@needs_server
def test_a_node_is_removed_and_its_work_is_taken_over(
    cluster: Any, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_ray, "MEMBER", member_command(delay_s=0.05, lease_s=1.0))
    with TuningStore(url) as store:
        known = len(store.trials(gpu=FINGERPRINT.gpu))
    node = next(node for node in cluster.worker_nodes)
    thread = after_trials(url, known + 5, lambda: cluster.remove_node(node, allow_graceful=False))
    code = main([*COMMAND, "--db", url, "--ray", cluster.address])
    thread.join()
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "lost with its actor or host; the others take its work over" in captured.err
    assert captured.out.count("gate_sum_fwd  ") == PROBLEMS == captured.out.count("confirmed")
    with TuningStore(url) as store:
        trials = store.trials(gpu=FINGERPRINT.gpu, stage="search")
        winners = store.winners(gpu=FINGERPRINT.gpu)
    counts = Counter((t.problem["seq_k"], str(sorted(t.config.items()))) for t in trials)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}
    assert [(w.config["num_warps"], w.median_us) for w in winners] == [(2, 10.0)] * PROBLEMS


@needs_ray
def test_a_file_is_no_database_for_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--db", "sqlite:///x.sqlite", "--ray", "auto"]) == 2
    assert "needs a PostgreSQL database" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*COMMAND, "--db", "postgresql+psycopg://x/y", "--ray", "auto"]) == 2
    assert "pip install nsa-autotune[ray]" in capsys.readouterr().err
    assert main([*COMMAND, "--ray", "auto", "--devices", "all"]) == 2
    assert "Choose one of them" in capsys.readouterr().err
    assert main([*COMMAND, "--ray", "auto", "--target", "cuda:90"]) == 2
    assert "a --target is absent" in capsys.readouterr().err
