"""A fleet on a real PostgreSQL server: workers die, the server restarts, and nothing is lost or done twice."""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cpu import pg_server
from cpu.fleet_fakes import FINGERPRINT, Forker, until
from cpu.pg_server import Server
from cpu.test_fleet import COMMAND, CONFIGS, FOREVER_S, PROBLEMS, TRIAL, UNIT, search_trials, stored_digests, winners_of

from nsa_autotune.db import engine, migrate, shared
from nsa_autotune.db.shared import SharedStore
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import ClaimLost, DatabaseAway

pytestmark = pytest.mark.skipif(bool(pg_server.why_not()), reason=pg_server.why_not() or "a server is here")
WORKERS = 8


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as opened:
        yield opened


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.make_database(request.node.name)


def test_many_may_set_it_up_and_one_gets_a_unit(url: str) -> None:
    answers: list[str] = []
    start = threading.Barrier(WORKERS)

    def ask(owner: str) -> None:
        start.wait()
        with SharedStore(url) as own:
            answers.append(own.claim(UNIT, owner, 60, 0))

    threads = [threading.Thread(target=ask, args=(str(number),)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answers) == {"mine": 1, "busy": WORKERS - 1}
    with SharedStore(url) as store, store._engine.connect() as connection:
        assert migrate.current_revision(connection) == migrate.head_revision()
        assert store.winners(source="shipped") != []


def test_claims_end_as_on_sqlite(url: str) -> None:
    with SharedStore(url, import_shipped=False) as store:
        assert store.claim(UNIT, "a", -1, 0) == "mine"
        assert store.claim(UNIT, "b", 60, 0) == "mine" and store.renew([UNIT], "a", 60) == 0
        with store.fenced(UNIT, "a", 60), pytest.raises(ClaimLost):
            store.add_trial(TRIAL)
        assert store.trials() == []
        with store.fenced(UNIT, "b", 60):
            store.add_trials([TRIAL, replace(TRIAL, status="crash")])
        assert len(store.trials()) == 2
        began_s = store.now_s()
        assert store.finish(UNIT, "b") and store.claim(UNIT, "a", 60, began_s) == "done"
        assert store.claim(UNIT, "a", 60, FOREVER_S) == "mine"


def test_patience_ends_with_a_sentence(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "PATIENCE_S", 0.5)
    with SharedStore(url, import_shipped=False) as store:
        server.stop()
        try:
            with caplog.at_level(logging.WARNING), pytest.raises(DatabaseAway, match="does not answer"):
                store.add_trial(TRIAL)
            assert "Trying again for" in caplog.text
            with pytest.raises(DatabaseAway):
                SharedStore(url, import_shipped=False)
        finally:
            server.start()
        store.add_trial(TRIAL)
        assert store.trials() == [TRIAL]


def test_a_host_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIVELINESS", {"connect_timeout": 2})
    monkeypatch.setattr(shared, "PATIENCE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(DatabaseAway, match="does not answer"):
            SharedStore(f"postgresql+psycopg://tuner@127.0.0.1:{port}/x")


def test_a_fleet_survives_deaths_and_a_restart(server: Server, url: str, tmp_path: Path) -> None:
    alone = server.make_database("alone")
    with Forker() as forker:
        forker.start(tmp_path / "alone", [*COMMAND, "--db", alone], 1).ends(0)
        fleet = forker.start(tmp_path / "fleet", [*COMMAND, "--db", url], WORKERS, delay_s=0.04)
        all_told = lambda: sum(len(fleet.told(index)) for index in range(WORKERS))  # noqa: E731
        until(lambda: all_told() >= 8, 60.0)
        busiest = sorted(range(WORKERS), key=lambda index: len(fleet.told(index)))[-2:]
        for index in busiest:
            fleet.kill(index, after=0)  # one that has told nothing may never come to it
        until(lambda: all_told() >= 20, 60.0)
        server.stop()
        server.start()
        codes = fleet.wait()
        said = [fleet.said(index) for index in range(WORKERS)]
    assert any("does not answer" in text and "Trying again for" in text for text in said), "the restart was noticed"
    assert [codes[index] for index in busiest] == [-9, -9]
    assert all(code == 0 for index, code in enumerate(codes) if index not in busiest), codes
    counts = search_trials(url)
    assert len(counts) == PROBLEMS * CONFIGS and set(counts.values()) == {1}
    told = [digest for index in range(WORKERS) for digest in fleet.told(index)]
    assert len(told) == len(set(told)) and set(told) <= stored_digests(url)
    assert winners_of(url) == winners_of(alone) and len(winners_of(url)) == PROBLEMS
    with TuningStore(url) as store:
        assert len(store.winners(gpu=FINGERPRINT.gpu)) == PROBLEMS
