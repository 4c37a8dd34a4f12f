"""SIGKILL at random points of a tuning run: nothing told is lost, and the same command ends with the same winner.

`make kill` tries 200 points; KILL_POINTS=N tries N.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsa_autotune.db import TuningStore, WinnerRecord
from nsa_autotune.db.migrate import head_revision
from nsa_autotune.spec import canonical_json

POINTS = int(os.environ.get("KILL_POINTS", "6"))
MAX_KILLS = 3  # of one run, before it may end
ROOT = Path(__file__).parents[2]


@dataclass
class Tuner:
    """A process that forks a tuning run for each folder it is given."""

    process: subprocess.Popen[str]

    def run(self, folder: Path, kill_after_s: float | None = None) -> tuple[int, float]:
        """Exit code (negative for a signal) and seconds of one run; it is killed if it takes longer than allowed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        child, started_s = int(self.process.stdout.readline()), time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)  # at worst a zombie: its id is still its own
        assert self.process.stdout.readline() == "over\n"
        seconds = time.monotonic() - started_s
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), seconds


@pytest.fixture(scope="module")
def tuner() -> Iterator[Tuner]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from cpu.kill_child import main; main()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Tuner(process)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=60)


@dataclass(frozen=True)
class Undisturbed:
    """What a run does that nobody kills."""

    winner: WinnerRecord
    trials: int
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tuner: Tuner, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    tuner.run(tmp_path_factory.mktemp("warm"))  # the first run imports
    code, seconds = tuner.run(folder)
    assert code == 0, (folder / "log").read_text()
    winner, stored, _ = look(folder)
    assert winner is not None and winner.verdict == "confirmed"
    return Undisturbed(winner, len(stored), seconds)


def look(folder: Path) -> tuple[WinnerRecord | None, set[str], set[str]]:
    """The winner, the digests stored, and those told: the database opens and passes SQLite's own check."""
    path, told = folder / "tuning.sqlite", folder / "told"
    said = set(told.read_text().split("\n")[:-1]) if told.exists() else set()
    if not path.exists():
        return None, set(), said
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert plain.execute("PRAGMA foreign_key_check").fetchall() == []
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store, store.transaction() as session:
        stored = {trial.digest for trial in store.trials()}
        winners = store.winners()
        assert session.connection().exec_driver_sql("SELECT * FROM nsa_alembic_version").all() == [(head_revision(),)]
    assert len(winners) <= 1
    return (winners[0] if winners else None), stored, said


@pytest.mark.parametrize("point", range(POINTS))
def test_a_killed_run_keeps_what_it_told_and_ends_as_if_nothing_was(
    tuner: Tuner, undisturbed: Undisturbed, tmp_path: Path, point: int
) -> None:
    chance = random.Random(point)
    for _ in range(chance.randint(1, MAX_KILLS)):
        tuner.run(tmp_path, kill_after_s=chance.uniform(0, undisturbed.seconds))
        _, stored, told = look(tmp_path)
        assert told <= stored, "what was told as stored is there"
        assert len(stored - told) <= 8, "only the last commit may be there and not told"
    code, _ = tuner.run(tmp_path)
    assert code == 0, (tmp_path / "log").read_text()
    winner, stored, told = look(tmp_path)
    assert winner is not None and told <= stored
    assert (winner.config, winner.median_us) == (undisturbed.winner.config, undisturbed.winner.median_us)
    assert winner.verdict == undisturbed.winner.verdict


@pytest.mark.parametrize("moment", ["best", "race", "renew"])
def test_a_run_killed_at_a_bad_moment_still_ends_with_the_best_confirmed(
    tuner: Tuner, undisturbed: Undisturbed, tmp_path: Path, moment: str
) -> None:
    order = tmp_path / "die_at"
    order.write_text(canonical_json(undisturbed.winner.config) if moment == "best" else moment)
    code, _ = tuner.run(tmp_path)
    assert code == -signal.SIGKILL and not order.exists()
    code, _ = tuner.run(tmp_path)  # suspects the config, tries it once more last, and lets it race
    assert code == 0, (tmp_path / "log").read_text()
    winner, stored, told = look(tmp_path)
    assert winner is not None and told <= stored
    assert (winner.config, winner.median_us) == (undisturbed.winner.config, undisturbed.winner.median_us)
    assert winner.verdict == "confirmed"
