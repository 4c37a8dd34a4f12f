"""Somebody else's database: only read, refused if it holds more than data, whatever its schema."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cpu.store_fakes import contents, make_trial, make_winner

from nsa_autotune.db import TuningStore
from nsa_autotune.db.foreign import open_foreign
from nsa_autotune.errors import StoreError

DATABASES = Path(__file__).parent / "databases"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A database that somebody sent."""
    path = tmp_path / "other.sqlite"
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        store.set_winner(make_winner())
        store.add_trial(make_trial())
    return path


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def spoil(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_the_other_database_is_only_read(other: Path, store: TuningStore) -> None:
    before = other.read_bytes()
    with open_foreign(f"sqlite:///{other}") as theirs:
        store.merge(theirs)
        with pytest.raises(StoreError, match="reading only"):
            theirs.add_trial(make_trial(status="crash"))
    assert other.read_bytes() == before
    assert [w.source for w in store.winners()] == ["imported"] and len(store.trials()) == 1


@pytest.mark.parametrize("revision", sorted(path.stem for path in DATABASES.glob("*.sql")))
def test_an_earlier_schema_is_migrated_in_a_copy(tmp_path: Path, store: TuningStore, revision: str) -> None:
    path = tmp_path / "old.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.executescript((DATABASES / f"{revision}.sql").read_text())
        old.execute("PRAGMA journal_mode=WAL")
    before = path.read_bytes()
    with open_foreign(f"sqlite:///{path}") as theirs:
        store.merge(theirs)
    assert len(store.trials()) == 2 and len(store.winners()) == 1
    assert path.read_bytes() == before and list(tmp_path.glob("*.bak")) == []


EVIL = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (("CREATE TRIGGER x AFTER INSERT ON nsa_trials BEGIN DELETE FROM nsa_winners; END",), "type='trigger'"),
        (("ALTER TABLE nsa_designs RENAME TO d", f"CREATE VIEW NSA_designs AS {EVIL}"), "type='view'"),
        (("DROP TABLE nsa_designs", "CREATE VIRTUAL TABLE nsa_designs USING fts5(x)"), "tables and indexes only"),
        (("UPDATE nsa_winners SET problem_id = 99",), "refers to a row of nsa_problems that is missing"),
        (("UPDATE nsa_alembic_version SET version_num = '9999'",), "newer than this program"),
        (("DELETE FROM nsa_alembic_version",), "no tuning database"),
        (("DROP TABLE nsa_alembic_version",), "no tuning database"),
        (("UPDATE nsa_trials SET samples_us = '[1,'",), "row 1 of nsa_trials"),
        (("UPDATE nsa_trials SET reason = x'ff00ff'",), "row 1 of nsa_trials"),
        (("UPDATE nsa_variants SET config = '[[[[[[[[[[]]]]]]]]]]'",), "config must be"),
        (("UPDATE nsa_problems SET problem = '{}'", "UPDATE nsa_problems SET problem_key = 5"), "problem_key"),
        (("UPDATE nsa_trials SET reason = zeroblob(70000000)",), "row 1 of nsa_trials"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_database_is_refused(
    other: Path, store: TuningStore, statements: tuple[str, ...], message: str
) -> None:
    spoil(other, *statements)
    with pytest.raises(StoreError, match=message), open_foreign(f"sqlite:///{other}") as theirs:
        store.merge(theirs)
    assert contents(store) == []


def test_files_that_are_no_databases(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such database"), open_foreign(f"sqlite:///{tmp_path}/none.sqlite"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text").write_text("words " * 1000)
    with pytest.raises(StoreError, match="damaged or no SQLite"), open_foreign(f"sqlite:///{tmp_path}/text"):
        pass
    with pytest.raises(StoreError, match="no tuning database"):
        spoil(tmp_path / "empty.sqlite", "CREATE TABLE x (y)")
        with open_foreign(f"sqlite:///{tmp_path}/empty.sqlite"):
            pass


def test_a_database_is_not_merged_with_itself(other: Path) -> None:
    url = f"sqlite:///{other}"
    with (
        TuningStore(url, import_shipped=False) as store,
        open_foreign(url) as theirs,
        pytest.raises(StoreError) as told,
    ):
        store.merge(theirs)
    assert "with itself" in str(told.value)
