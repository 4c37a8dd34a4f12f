"""Stored trials as Optuna studies, and the two servers that read the files."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from cpu.report_fakes import fill, search_records

from nsa_autotune.cli.app import main
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidInput
from nsa_autotune.search.mirror import group_trials, importances, write_studies

BEST = """
SELECT min(t.median_us), v.config
FROM nsa_trials t JOIN nsa_problems p ON p.id = t.problem_id JOIN nsa_variants v ON v.id = t.variant_id
WHERE t.status = 'ok' AND p.family = ? AND t.policy = ?
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "tuning.sqlite"
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        fill(store, count=20)
    return path


@pytest.fixture(scope="module")
def mirrored(database: Path) -> Path:
    path = database.with_name("studies.sqlite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_autotune.db.store.shipped_files", dict)  # nor the trials of shipped winners
        assert main(["db", "studies", str(path), "--db", f"sqlite:///{database}"]) == 0
    return path


def test_each_study_has_the_best_trial_of_the_database(database: Path, mirrored: Path) -> None:
    studies = optuna.get_all_study_names(f"sqlite:///{mirrored}")
    assert len(studies) == 4
    for name in studies:
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{mirrored}")
        family, policy = study.user_attrs["family"], study.user_attrs["policy"]
        best_us, config = sqlite3.connect(database).execute(BEST, (family, policy)).fetchone()
        assert study.best_value == best_us
        assert study.best_trial.params == json.loads(config)
    assert not list(mirrored.parent.glob(".*")), "a temporary file was left"


def test_tile_sizes_are_ints_and_failures_are_pruned(tmp_path: Path) -> None:
    records = search_records(count=40)
    write_studies(tmp_path / "s.sqlite", group_trials(records))
    (summary,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 's.sqlite'}")
    trials = optuna.load_study(study_name=summary.study_name, storage=f"sqlite:///{tmp_path / 's.sqlite'}").trials
    assert [dict(trial.params) for trial in trials] == [record.config for record in records]
    warps = [record.config["num_warps"] for record in records]
    assert trials[0].distributions["num_warps"] == optuna.distributions.IntDistribution(min(warps), max(warps))
    pruned = [trial for trial in trials if trial.state is optuna.trial.TrialState.PRUNED]
    assert [trial.number for trial in pruned] == [7, 17, 27, 37]
    assert pruned[0].user_attrs["status"] == "compile" and pruned[0].user_attrs["reason"] == "made-up failure"


def test_values_of_mixed_types_are_kept_apart(tmp_path: Path) -> None:
    values = (0, False, "0", 2**70, 1.5)
    records = [replace(r, config={"x": v}) for r, v in zip(search_records(count=5), values, strict=True)]
    write_studies(tmp_path / "s.sqlite", group_trials(records))
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path / 's.sqlite'}")
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 's.sqlite'}").trials
    assert [trial.params["x"] for trial in trials] == ["0", "false", '"0"', str(2**70), "1.5"]


def test_searches_are_told_apart() -> None:
    records = search_records(count=3)
    other = [replace(record, template_digest="1" * 20) for record in records]
    library = [replace(record, provider="flex_attention", stage="baseline") for record in records]
    guesses = [replace(record, kind="predicted") for record in records]
    groups = group_trials([*records, *other, *library, *guesses])
    assert [len(group.records) for group in groups] == [3, 3]
    assert len({group.name for group in groups}) == 2


def test_the_parameter_that_decides_is_the_most_important() -> None:
    found = importances(search_records(count=100))
    assert found is not None and next(iter(found)) == "num_warps"
    assert sum(found.values()) == pytest.approx(1)
    assert importances(search_records(count=15)) is None


def test_an_existing_file_and_an_empty_database_are_refused(tmp_path: Path) -> None:
    db = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    assert main(["db", "studies", str(tmp_path / "new.sqlite"), "--family", "gate_sum", "--db", db]) == 2
    taken = tmp_path / "taken.sqlite"
    taken.write_text("mine")
    with pytest.raises(InvalidInput, match="must be new"):
        write_studies(taken, group_trials(search_records(count=1)))
    assert taken.read_text() == "mine"
    with pytest.raises(InvalidInput, match="no measured trials"):
        write_studies(tmp_path / "new.sqlite", [])
    with pytest.raises(InvalidInput, match="cannot be written"):
        write_studies(tmp_path / "nowhere" / "s.sqlite", group_trials(search_records(count=1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.sqlite"]


def answers(command: list[str], url: str, log: Path) -> int:
    """The HTTP status of a server that is started for it and ended afterwards."""
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as server:
        try:
            for _ in range(150):
                if server.poll() is not None:
                    break
                try:
                    with urllib.request.urlopen(url, timeout=2) as answer:
                        return int(answer.status)
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    time.sleep(0.1)
            raise AssertionError(f"no answer: {log.read_text()}")
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(shutil.which("optuna-dashboard") is None, reason="optuna-dashboard is not installed")
def test_optuna_dashboard_opens_the_studies(mirrored: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [
        "optuna-dashboard",
        f"sqlite:///{mirrored}",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    assert answers(command, f"http://127.0.0.1:{port}/api/studies", tmp_path / "log") == 200


@pytest.mark.skipif(shutil.which("datasette") is None, reason="datasette is not installed")
def test_datasette_opens_the_database(database: Path, tmp_path: Path) -> None:
    port = free_port()
    command = ["datasette", "serve", str(database), "--host", "127.0.0.1", "--port", str(port)]
    assert answers(command, f"http://127.0.0.1:{port}/tuning/nsa_winners.json", tmp_path / "log") == 200
