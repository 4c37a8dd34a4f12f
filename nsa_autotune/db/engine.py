"""Opening a database: URL, read-only or not, SQLite's settings, and errors that say what to do."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ..errors import DatabaseAway, StoreError

BUSY_TIMEOUT_MS = 30_000
MAX_VALUE_BYTES = 64 * 2**20  # of a text in a file that is only read: it may be somebody else's
# of PostgreSQL's client library: a host that is gone is noticed within a minute, not after hours
LIVELINESS = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
ENDINGS = (".sqlite", ".sqlite3", ".db")  # that make a text a path
NAMES = "Write tuned.sqlite, sqlite:////folder/tuned.sqlite or postgresql+psycopg://USER@HOST/NAME."
OTHER_DATABASE = "Name another database with `--db URL` or NSA_AUTOTUNE_DB, for example sqlite:////tmp/tuning.sqlite."
# fragments of the drivers' messages -> rule, remedy
EXPLANATIONS = (
    (
        ("not a database", "malformed", "file is encrypted"),
        "the database is damaged or no SQLite database",
        "Move the file away, open again, and read a JSONL export back with `nsa-autotune db import`.",
    ),
    (
        ("locked", "busy"),
        "the database is busy: another process kept it locked",
        "Wait for that process and try again.",
    ),
    (("readonly", "read-only"), "the database is read-only", OTHER_DATABASE),
    (("unable to open", "disk i/o"), "the database cannot be opened", OTHER_DATABASE),
    (("disk is full",), "the disk of the database is full", "Free some space; nothing was half-written."),
)
# fragments of a server's messages that an equal attempt may not meet again
AWAY = (
    "connection refused",
    "connection reset",
    "connection is lost",
    "connection timeout",
    "temporary failure in name resolution",
    "server closed the connection",
    "terminating connection",
    "the database system is",  # starting up, shutting down, in recovery
    "no such file or directory",  # the socket of a server that is not running
    "deadlock detected",
)


@dataclass(frozen=True)
class Location:
    """A parsed URL; `path` is the file of a SQLite database, None for memory and for servers."""

    url: URL
    path: Path | None

    @property
    def is_sqlite(self) -> bool:
        """True for files and memory."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def is_memory(self) -> bool:
        """True for a SQLite database without a file."""
        return self.is_sqlite and self.path is None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else _hidden(self.url)


def parse_location(text: str) -> Location:
    """The location that a URL names, or the path of a SQLite file."""
    if "://" not in text and (text.endswith(ENDINGS) or Path(text).is_file()):
        path = Path(text).expanduser().absolute()
        return Location(URL.create("sqlite", database=str(path)), path)
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise StoreError("a database is named by a URL or a path", {"url": text}, NAMES) from error
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError("no such kind of database", {"url": _hidden(url)}, "It is a SQLite file or PostgreSQL.")
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return Location(url, None)
    database = str(url.database)
    if database.startswith("file:"):
        raise StoreError("SQLite's own file: URIs are not taken", {"url": text}, NAMES)
    _refuse_lost_slash(text, database)
    path = Path(database).expanduser().absolute()
    return Location(url.set(database=str(path)), path)


def _refuse_lost_slash(text: str, database: str) -> None:
    """Raise StoreError for sqlite:///tmp/x.sqlite where there is a /tmp and no tmp here: four slashes were meant."""
    first, _, rest = database.partition("/")
    if first and rest and Path("/", first).is_dir() and not Path(first).exists():
        remedy = f"Write sqlite:////{database}, with four slashes, or sqlite:///./{database} for a new folder here."
        raise StoreError("three slashes begin a path in the current folder", {"url": text}, remedy)


def _hidden(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def is_read_only(location: Location) -> bool:
    """True for an existing SQLite file that this user may not write, or whose folder takes no write-ahead log."""
    path = location.path
    if path is None or not os.access(path, os.F_OK):
        return False
    return not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


def open_engine(location: Location) -> Engine:
    """An engine for reading and writing; makes the folder of a SQLite file, nothing else, until it is used."""
    if location.is_memory:
        engine = create_engine(location.url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    elif location.path is not None:
        _make_folder(location.path.parent)
        engine = create_engine(location.url)
    else:
        engine = _server_engine(location)
    if location.is_sqlite:
        event.listen(engine, "connect", _configure if location.is_memory else _configure_file)
        event.listen(engine, "begin", _begin)
    return engine


def open_read_only_engine(location: Location) -> Engine:
    """An engine that cannot write to an existing SQLite file."""
    mode = read_only_mode(location)
    engine = create_engine("sqlite://", poolclass=QueuePool, creator=lambda: connect_read_only(location, mode))
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def read_only_mode(location: Location) -> str:
    """How `connect_read_only` opens an existing SQLite file, also in a folder where nothing can be written."""
    try:
        with closing(connect_read_only(location, "ro")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        if _has_log(location):
            raise  # what the log holds would be missed
        # In a read-only folder SQLite opens a WAL database only on our word that nobody changes it meanwhile.
        return "ro&immutable=1"
    return "ro"


def for_writing(engine: Engine) -> Engine:
    """The engine, with transactions that take SQLite's write lock at once: a read lock cannot always be raised."""
    return engine.execution_options(nsa_begin="BEGIN IMMEDIATE")


@contextmanager
def store_errors(location: Location) -> Iterator[None]:
    """Turn the errors of SQLAlchemy and its drivers into StoreError."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _explain(error, location) from error


def _explain(error: Exception, location: Location) -> StoreError:
    messages = [str(getattr(step, "orig", None) or step) for step in _chain(error)]
    values: dict[str, object] = {"database": str(location), "message": (messages[0].splitlines() or [""])[0]}
    if not location.is_sqlite and _is_away(error, messages):
        return DatabaseAway("the database server does not answer", values, "Start it, or wait for it; then try again.")
    if location.path is not None:
        values["folder"] = str(location.path.parent)
    for message in messages:
        for fragments, rule, remedy in EXPLANATIONS:
            if any(fragment in message.lower() for fragment in fragments):
                return StoreError(rule, {**values, "message": message.splitlines()[0]}, remedy)
    return StoreError("the database refused the operation", values, "Nothing of it was written.")


def _is_away(error: Exception, messages: Sequence[str]) -> bool:
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or any(fragment in message.lower() for message in messages for fragment in AWAY)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it arose from: a full disk ends the transaction, and then its rollback fails as well."""
    step: BaseException | None = error
    seen: list[BaseException] = []
    while step is not None and step not in seen:
        seen.append(step)
        yield step
        step = step.__cause__ or step.__context__


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            "the folder of the database cannot be made", {"folder": str(folder), "message": str(error)}, OTHER_DATABASE
        ) from error
    if not os.access(folder, os.W_OK):
        raise StoreError("the folder of the database is read-only", {"folder": str(folder)}, OTHER_DATABASE)


def _server_engine(location: Location) -> Engine:
    asked = LIVELINESS if location.url.drivername in ("postgresql+psycopg", "postgresql+psycopg2") else {}
    arguments = {name: value for name, value in asked.items() if name not in location.url.query}
    try:
        return create_engine(location.url, pool_pre_ping=True, connect_args=arguments)
    except NoSuchModuleError as error:
        raise StoreError("no such driver of PostgreSQL", {"url": str(location)}, "Use postgresql+psycopg.") from error
    except ImportError as error:
        raise StoreError(
            "the driver of the database is not installed",
            {"url": str(location), "missing": error.name},
            "pip install 'nsa-autotune[postgresql]', and write postgresql+psycopg://...",
        ) from error


def _has_log(location: Location) -> bool:
    log = Path(f"{location.path}-wal")
    return log.exists() and log.stat().st_size > 0


def connect_read_only(location: Location, mode: str) -> sqlite3.Connection:
    """A plain connection to a SQLite file that cannot write; `mode` as in SQLite's URIs."""
    uri = f"file:{quote(str(location.path))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=BUSY_TIMEOUT_MS / 1000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


def _configure(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # we begin transactions ourselves, see _begin
    connection.execute("PRAGMA foreign_keys=ON")


def _configure_file(connection: Any, entry: ConnectionPoolEntry) -> None:
    _configure(connection, entry)
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    mode = _switch_to_wal(connection)
    if mode != "wal":
        raise StoreError(
            "SQLite must keep a write-ahead log, and this file system or file does not let it",
            {"journal_mode": mode},
            "Put the database on a local disk. " + OTHER_DATABASE,
        )


def _switch_to_wal(connection: Any) -> str:
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return str(connection.execute("PRAGMA journal_mode").fetchone()[0])
        except sqlite3.OperationalError as error:
            # busy_timeout does not cover this switch where another process writes without a log
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("nsa_begin", "BEGIN"))
