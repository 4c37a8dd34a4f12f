"""Bring a database to the newest schema, in one transaction, without alembic.ini; an older file is copied first."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, func, select

from ..errors import StoreError
from .engine import Location, for_writing

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "nsa_alembic_version"
ADVISORY_LOCK = 0x6E73615F  # any fixed number: PostgreSQL's lock against two programs migrating at once


def head_revision() -> str:
    """The revision that this program works with."""
    return str(ScriptDirectory(str(MIGRATIONS)).get_current_head())


def current_revision(connection: Connection) -> str | None:
    """The revision of a database, None if it has no table of ours."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def ensure_schema(engine: Engine, location: Location, *, read_only: bool) -> None:
    """Migrate to the head revision; raise StoreError if the database is newer, or old and read-only."""
    with engine.begin() as connection:
        revision = current_revision(connection)
    if revision == head_revision():
        return
    _check_known(revision, location)
    if read_only:
        raise StoreError(
            "a read-only database must already have this program's schema",
            {"database": str(location), "revision": revision, "needed": head_revision()},
            "Open it once where it can be written.",
        )
    with for_writing(engine).begin() as connection:
        lock_setup(connection)
        revision = current_revision(connection)
        _check_known(revision, location)  # another process may have migrated while we waited
        older = revision if revision != head_revision() else None
        copy = back_up(location.path, older) if older is not None and location.path is not None else None
        upgrade(connection)
    if older is not None:
        kept = f"; {copy.name} beside it is how it was" if copy is not None else ""
        logger.warning("%s: brought from schema %s to %s%s", location, older, head_revision(), kept)


def back_up(path: Path, revision: str) -> Path:
    """Copy a SQLite database as it is committed now to `<name>.<revision>.bak` beside it; .bak2 if that is taken."""
    names = (f"{path.name}.{revision}.bak{number if number > 1 else ''}" for number in count(1))
    copy = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    partial = path.with_name(f"{copy.name}.partial")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as target:
        source.backup(target)
    partial.replace(copy)
    return copy


def lock_setup(connection: Connection) -> None:
    """Let one program at a time set a database up, until the transaction ends; SQLite's write lock does so anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK)))


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to `revision` inside the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))  # % is ConfigParser's own sign
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    command.upgrade(config, revision)


def _check_known(revision: str | None, location: Location) -> None:
    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    if revision is not None and revision not in known:
        raise StoreError(
            "the database is newer than this program",
            {"database": str(location), "revision": revision, "newest known": head_revision()},
            "Upgrade nsa-autotune, or name another database with `--db URL`.",
        )
