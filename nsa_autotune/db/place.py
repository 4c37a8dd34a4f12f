"""What lies where a database is named, looked at before anything is made or changed there."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from ..errors import StoreError
from .engine import OTHER_DATABASE, Location, connect_read_only

OURS = "nsa_"  # how the names of our tables begin
MAX_NAMES = 5  # of another program's tables that an error lists


def check_place(location: Location, *, must_exist: bool) -> None:
    """Raise StoreError for a SQLite file that is missing and must not be, or that is another program's."""
    path = location.path
    if path is None:
        return
    try:
        is_there, is_file = path.exists(), path.is_file()
    except OSError:  # a folder that may not be looked into: opening tells
        return
    if is_file:
        _refuse_other_programs(location)
    elif must_exist and not is_there:
        remedy = "Name an existing one; `nsa-autotune tune`, `db import` and `db merge` make new ones."
        raise StoreError("there is no such database", {"database": str(path)}, remedy)


def table_names(location: Location) -> list[str]:
    """Names of a SQLite file's tables as far as its pages tell; none where they cannot be read."""
    try:
        # without locks, and without a log beside a file that may not be ours; opening it will tell what is wrong
        with closing(connect_read_only(location, "ro&immutable=1")) as connection:
            return [str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.Error:
        return []


def _refuse_other_programs(location: Location) -> None:
    names = table_names(location)
    if names and not any(name.lower().startswith(OURS) for name in names):
        values = {"database": str(location), "tables": sorted(names)[:MAX_NAMES]}
        raise StoreError("the file is another program's database and stays as it is", values, OTHER_DATABASE)
