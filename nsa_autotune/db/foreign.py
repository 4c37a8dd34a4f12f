"""Somebody else's database: looked over before a row is read, never changed, an earlier schema migrated in a copy."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from ..errors import StoreError
from .checks import shorten
from .engine import connect_read_only, parse_location, read_only_mode, store_errors
from .migrate import VERSION_TABLE, head_revision
from .place import OURS
from .store import TuningStore

MAX_FAULTS = 20  # that a check of a whole file lists


@contextmanager
def open_foreign(url: str) -> Iterator[TuningStore]:
    """A database to read records from, by its URL; StoreError if it is missing, damaged or holds more than tables."""
    location = parse_location(url)
    with ExitStack() as stack:
        if location.path is not None:
            if not location.path.is_file():
                raise StoreError("there is no such database", {"database": str(location)}, "Name an existing one.")
            with store_errors(location), closing(connect_read_only(location, read_only_mode(location))) as connection:
                _refuse_more_than_tables(connection, location.path)
                _refuse_damage(connection, location.path)
                is_old = _revision(connection) != head_revision()
                if is_old:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nsa_autotune_")))
                    url = f"sqlite:///{_copy(connection, folder)}"
            if is_old:  # migrated where it does not matter; a newer one is refused here
                TuningStore(url, import_shipped=False).close()
        yield stack.enter_context(TuningStore(url, import_shipped=False, read_only=True))


def file_faults(connection: sqlite3.Connection) -> list[str]:
    """What SQLite's own checks find wrong: pages, indexes, types, and rows that refer to nothing; at most 20 each."""
    damaged = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MAX_FAULTS})") if row[0] != "ok"]
    dangling = connection.execute("PRAGMA foreign_key_check").fetchmany(MAX_FAULTS)
    return damaged + [
        f"row {row} of {table} refers to a row of {there} that is missing" for table, row, there, _ in dangling
    ]


def _refuse_more_than_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Views and triggers are programs: a table of ours that is none would run somebody's query."""
    for kind, name, table, text in connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"):
        is_ours = any(str(n).lower().startswith(OURS) for n in (name, table))
        plain = kind in ("table", "index") and not str(text or "").lower().startswith("create virtual")
        if is_ours and not plain:
            raise StoreError(
                "a database that is merged holds tables and indexes only",
                {"database": str(path), "name": shorten(name), "type": kind},
                "Ask for an export: `nsa-autotune db export --records all FILE.jsonl`.",
            )


def _refuse_damage(connection: sqlite3.Connection, path: Path) -> None:
    faults = file_faults(connection)
    if faults:
        raise StoreError(
            "the database is damaged", {"database": str(path), "first": shorten(faults[0])}, "Nothing was merged."
        )


def _revision(connection: sqlite3.Connection) -> str | None:
    known = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", [VERSION_TABLE]).fetchone()[0]
    row = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() if known else None
    if row is None:
        raise StoreError("the file is no tuning database", {"table missing": VERSION_TABLE}, "Name another file.")
    return str(row[0])


def _copy(connection: sqlite3.Connection, folder: Path) -> Path:
    copy = folder / "copy.sqlite"
    with closing(sqlite3.connect(copy)) as target:
        connection.backup(target)
    return copy
