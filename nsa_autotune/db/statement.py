"""SQL of the user's own, which can read and nothing else."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from ..errors import InvalidInput, StoreError
from .checks import shorten
from .engine import Location
from .models import Base

# what SQLite may be asked to do; attaching files, pragmas, temporary tables and all writing are not among it
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension"}
REFUSALS = ("not authorized", "readonly database", "read-only transaction", "data-modifying", "cannot VACUUM")
# PostgreSQL's cursor calls these a mistake of syntax
WRITING = re.compile(
    r"\s*(insert|update|delete|merge|drop|create|alter|truncate|set|begin|commit|copy)\b", re.IGNORECASE
)
ONE_STATEMENT = ("one statement", "multiple commands")
LOOK_STEPS = 100_000  # of SQLite's machine, after which Python may carry a signal out
READ_REMEDY = "Write one SELECT, such as SELECT status, count(*) FROM nsa_trials GROUP BY status."


@dataclass(frozen=True)
class Answer:
    """The rows of a statement by column name; `cut` if there are more than were asked for."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    cut: bool


def ask(session: Session, location: Location, statement: str, limit: int) -> Answer:
    """The first `limit` rows of one SELECT; InvalidInput if it would write, or is not understood."""
    if location.is_sqlite:
        connection = session.connection().connection.dbapi_connection
        assert isinstance(connection, sqlite3.Connection)
        with _only_reading(connection):
            return _run(connection.cursor(), (sqlite3.Error, sqlite3.Warning), statement, limit)
    if (location.url.get_backend_name(), location.url.get_driver_name()) != ("postgresql", "psycopg"):
        values = {"database": str(location)}
        raise StoreError("own SQL is taken on SQLite and postgresql+psycopg", values, "Use `db query`.")
    session.connection().exec_driver_sql("SET TRANSACTION READ ONLY")
    server: Any = session.connection().connection.dbapi_connection
    # a named cursor takes one reading statement, and brings the rows that are asked for only
    with server.cursor(name="nsa_ask") as cursor:
        return _run(cursor, (session.get_bind().dialect.loaded_dbapi.Error,), statement, limit)  # type: ignore[attr-defined]


def _run(cursor: Any, failures: tuple[type[Exception], ...], statement: str, limit: int) -> Answer:
    try:
        cursor.execute(statement)
        found = cursor.fetchmany(limit + 1)
    except failures as error:
        if str(error) == "interrupted":  # nobody else stops a statement
            raise KeyboardInterrupt from error
        raise _explain(error, statement) from error
    columns = tuple(str(column[0]) for column in cursor.description or ())
    if not columns:
        raise InvalidInput("a statement must ask for something", {"statement": shorten(statement)}, READ_REMEDY)
    if len(set(columns)) < len(columns):
        raise InvalidInput("columns need names of their own", {"columns": list(columns)}, "Rename one: AS other_name.")
    rows = [dict(zip(columns, map(_plain, row), strict=True)) for row in found[:limit]]
    return Answer(columns, rows, cut=len(found) > limit)


def _explain(error: Exception, statement: str) -> InvalidInput:
    message = (str(error).splitlines() or [""])[0]
    values: dict[str, object] = {"statement": shorten(statement), "message": message}
    if any(fragment in message for fragment in ONE_STATEMENT):
        return InvalidInput("own SQL is one statement", values, READ_REMEDY)
    if WRITING.match(statement) or any(fragment in message for fragment in REFUSALS):
        return InvalidInput("own SQL may only read", values, READ_REMEDY)
    remedy = f"Tables: {', '.join(Base.metadata.tables)}; docs/querying.md says what they hold."
    return InvalidInput("the database does not understand the statement", values, remedy)


@contextmanager
def _only_reading(connection: sqlite3.Connection) -> Iterator[None]:
    """Within it the connection refuses everything but reading, whatever the file would allow."""

    def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
        names: Sequence[str | None] = (first, second)
        allowed = action in READING and not FORBIDDEN_FUNCTIONS & {str(name).lower() for name in names}
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.execute("PRAGMA query_only=ON")
    connection.set_authorizer(authorize)
    connection.set_progress_handler(_look_up, LOOK_STEPS)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)
        connection.execute("PRAGMA query_only=OFF")


def _look_up() -> int:
    """Goes on; a signal's handler runs when this is called, and what it raises ends the statement."""
    return 0


def _plain(value: object) -> Any:
    """A value as tables and JSON can show it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value
