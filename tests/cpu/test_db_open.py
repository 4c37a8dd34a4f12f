"""Opening the database: where it lies, migrations, damage, permissions, many processes, shipped winners."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from cpu.store_fakes import times_of

from nsa_autotune.db import TrialRecord, TuningDatabase, TuningStore, WinnerRecord, migrate, open_for_lookup, paths
from nsa_autotune.db import store as store_module
from nsa_autotune.db.engine import open_engine, parse_location
from nsa_autotune.db.exchange import format_line
from nsa_autotune.db.models import Base
from nsa_autotune.errors import StoreError
from nsa_autotune.spec import Problem

ROOT = Path(paths.__file__).parents[2]
MACHINE = {"gpu": "NVIDIA H100", "capability": "9.0"}

# runs in a process of its own: python -c WRITER url name count
WRITER = """
import sys
from nsa_autotune.db import TrialRecord, TuningStore
url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with TuningStore(url, import_shipped=False) as store:
    for i in range(count):
        config = {"writer": name, "i": i}
        store.add_trial(TrialRecord({"gpu": "g", "capability": "9.0"}, "f", {"i": i}, "{}", config, "t", "ok"))
        print(i, flush=True)
"""
# becomes another program, which permissions bind even if root started it: python -c UNPRIVILEGED program arguments
UNPRIVILEGED = """
import ctypes, os, sys
if os.geteuid() == 0:  # drop the capabilities to override permissions (1) and to ignore them when reading (2)
    results = [ctypes.CDLL(None).prctl(24, capability) for capability in (1, 2)]
    assert results == [0, 0], results
os.execv(sys.argv[1], sys.argv[1:])
"""
# python -c READER url
READER = """
import sys
from nsa_autotune.db import TrialRecord, TuningStore
from nsa_autotune.errors import StoreError
try:
    with TuningStore(sys.argv[1], import_shipped=False) as store:
        print("read_only" if store.read_only else "writable", len(store.winners()), len(store.trials()))
        store.add_trial(TrialRecord({"gpu": "g", "capability": "9.0"}, "f", {}, "{}", {}, "t", "ok"))
except StoreError as error:
    print("StoreError", error)
"""


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def make_winner(**changes: object) -> WinnerRecord:
    values = {
        "fingerprint": MACHINE,
        "family": "slc_attn_fwd",
        "problem": Problem().to_dict(),
        "problem_key": '{"seq_q":8192}',
        "config": {"BLOCK_M": 64},
        "template_digest": "t1",
        "median_us": 11.0,
        "p20_us": 10.0,
        "p80_us": 12.0,
        "samples_us": (10.0, 11.0, 12.0),
        "created": "2025-03-01T10:00:00+00:00",
    }
    return WinnerRecord(**{**values, **changes, **times_of(changes)})  # type: ignore[arg-type]


def make_trial(number: int = 0) -> TrialRecord:
    return TrialRecord(MACHINE, "slc_attn_fwd", {}, "{}", {"i": number}, "t1", "ok")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_unprivileged(url: str) -> str:
    output, _ = start(UNPRIVILEGED, sys.executable, "-c", READER, url).communicate(timeout=60)
    return output


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    monkeypatch.setattr(store_module, "shipped_files", lambda: files)
    return files


# settings and migrations


def test_file_uses_write_ahead_log_and_foreign_keys(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.set_winner(make_winner())
        with store._transaction() as session:
            pragmas = ("journal_mode", "foreign_keys", "busy_timeout")
            assert [session.execute(sa.text(f"PRAGMA {name}")).scalar() for name in pragmas] == ["wal", 1, 30000]
        with pytest.raises(StoreError, match="FOREIGN KEY"), store._transaction(write=True) as session:
            session.execute(sa.text("DELETE FROM nsa_fingerprints"))
        assert store.winners() == [make_winner()]
    with sqlite3.connect(path) as plain:  # the mode is a property of the file
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_without_write_ahead_log_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.db.engine._switch_to_wal", lambda connection: "delete")
    with pytest.raises(StoreError, match=r"write-ahead log.*journal_mode='delete'"):
        TuningStore(url_of(tmp_path / "t.sqlite"), import_shipped=False)


def test_opening_waits_for_a_writer_without_log(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("CREATE TABLE nsa_other (x)")
    writer.execute("BEGIN IMMEDIATE")  # SQLite refuses the switch at once, whatever its busy timeout
    release = threading.Timer(0.2, writer.execute, ["COMMIT"])
    release.start()
    with TuningStore(url_of(path), import_shipped=False) as store:
        assert not writer.in_transaction
        assert store.trials() == []
    writer.close()


@pytest.mark.parametrize("folder", ["plain", "50% of it", "with space/and deep"])
def test_migrations_give_the_models(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / folder / "migrations"
    shutil.copytree(migrate.MIGRATIONS, installed)
    monkeypatch.setattr(migrate, "MIGRATIONS", installed)
    location = parse_location(url_of(tmp_path / folder / "t.sqlite"))
    engine = open_engine(location)
    migrate.ensure_schema(engine, location, read_only=False)
    with engine.begin() as connection:
        assert migrate.current_revision(connection) == migrate.head_revision()
        context = MigrationContext.configure(
            connection, opts={"version_table": migrate.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_reopening_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.set_winner(make_winner())
    before = path.read_bytes()
    for _ in range(2):
        with TuningStore(url_of(path), import_shipped=False) as store:
            assert store.winners() == [make_winner()]
    assert path.read_bytes() == before


def test_failed_migration_leaves_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.sqlite"

    def upgrade_half(connection: sa.Connection) -> None:
        real(connection)
        raise sa.exc.OperationalError("CREATE TABLE", {}, Exception("disk is full"))

    real = migrate.upgrade
    monkeypatch.setattr(migrate, "upgrade", upgrade_half)
    with pytest.raises(StoreError, match="disk of the database is full"):
        TuningStore(url_of(path), import_shipped=False)
    with sqlite3.connect(path) as plain:
        assert plain.execute("SELECT name FROM sqlite_master").fetchall() == []
    monkeypatch.undo()
    TuningStore(url_of(path), import_shipped=False).close()


DATABASES = Path(__file__).parent / "databases"  # <revision>.sql and .jsonl, as the program of that time wrote them


# revision -> what it knew of its winner: verdict, policy, number of rivals; and of its trials' environment
EARLIER = {
    "0001": ("raced", "eager-cold", 0, None),
    "0002": ("confirmed", "graph-warm", 1, {"sm_mhz": 1980}),
    "0003": ("confirmed", "graph-warm", 1, {"sm_mhz": 1980}),
    "0004": ("confirmed", "graph-warm", 1, {"sm_mhz": 1980}),
}


def restore(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.executescript((DATABASES / f"{revision}.sql").read_text())


@pytest.mark.parametrize("revision", EARLIER)
def test_a_database_of_an_earlier_schema_migrates_after_a_copy(
    tmp_path: Path, revision: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.sqlite"
    restore(path, revision)
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        (winner,), trials, designs = store.winners(), store.trials(), store.designs()
        verdict, policy, rivals, environment = EARLIER[revision]
        assert (winner.median_us, winner.verdict, winner.policy, len(winner.rivals)) == (11.0, verdict, policy, rivals)
        assert {(t.status, t.samples_us, str(t.environment)) for t in trials} == {
            ("ok", (10.0, 11.0, 12.0), str(environment)),
            ("crash", (), "None"),
        }
        assert [d.latency_us for d in designs] == ([30.0] if revision >= "0003" else [])
        # the names of records outlive the schema: what was stored and exported then is the same record now
        store.import_jsonl(DATABASES / f"{revision}.jsonl")
        assert len(store.trials()) == 2 and store.winners() == [winner]
    copy = tmp_path / f"old.sqlite.{revision}.bak"
    if revision != migrate.head_revision():
        with closing(sqlite3.connect(copy)) as kept:
            assert kept.execute("SELECT version_num FROM nsa_alembic_version").fetchall() == [(revision,)]
            assert kept.execute("SELECT count(*) FROM nsa_trials").fetchone() == (2,)
    assert [p.name for p in tmp_path.glob("*.bak*")] == [copy.name] * (revision != migrate.head_revision())
    told = [r.getMessage() for r in caplog.records if "brought from schema" in r.getMessage()]
    assert len(told) == (revision != migrate.head_revision()) and all(copy.name in text for text in told)


def test_every_schema_so_far_has_a_database_here() -> None:
    known = {script.revision for script in ScriptDirectory(str(migrate.MIGRATIONS)).walk_revisions()}
    assert "0001" in known and known - {migrate.head_revision()} <= EARLIER.keys() == {
        path.stem for path in DATABASES.glob("*.sql")
    }


def test_tables_of_other_programs_stay(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    TuningStore(url_of(path), import_shipped=False).close()
    with sqlite3.connect(path) as plain:
        plain.execute("CREATE TABLE trials (number INTEGER)")
        plain.execute("CREATE TABLE alembic_version (version_num TEXT)")
        plain.execute("INSERT INTO alembic_version VALUES ('v9.9')")
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.add_trial(make_trial())
    with sqlite3.connect(path) as plain:
        assert plain.execute("SELECT * FROM alembic_version").fetchall() == [("v9.9",)]
        assert plain.execute("SELECT count(*) FROM trials").fetchone() == (0,)


@pytest.mark.parametrize("read_only", [False, True])
def test_another_programs_database_is_refused_and_stays(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "t.sqlite"
    with closing(sqlite3.connect(path)) as plain:
        plain.execute("CREATE TABLE customers (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"another program's database.*customers.*--db"):
        TuningStore(url_of(path), read_only=read_only)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_must_exist_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "folder" / "t.sqlite"
    with pytest.raises(StoreError, match=r"no such database.*t\.sqlite"):
        TuningStore(url_of(missing), must_exist=True)
    with pytest.raises(StoreError, match="no such database"):
        TuningDatabase(url_of(missing))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("NSA_AUTOTUNE_DB", url_of(missing))  # the user's own, which the first use makes
    TuningStore(must_exist=True, import_shipped=False).close()
    assert missing.exists()


def test_opening_leaves_logging_alone(tmp_path: Path) -> None:
    script = """
import logging, sys
from nsa_autotune.db import TuningStore
def state():
    loggers = [logging.root, *map(logging.getLogger, ("alembic", "sqlalchemy", "nsa_autotune"))]
    return [(logger.level, logger.disabled, list(logger.handlers)) for logger in loggers]
before = state()
TuningStore(sys.argv[1]).close()
assert state() == before
"""
    process = start(script, url_of(tmp_path / "t.sqlite"))
    assert (process.communicate(timeout=60)[0], process.returncode) == ("", 0)


# databases that cannot be used


def damage_header(path: Path) -> None:
    path.write_bytes(b"this is a text file, long enough to be no database" * 100)


def damage_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


@pytest.mark.parametrize("damage", [damage_header, damage_pages, truncate])
def test_damaged_file(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.set_winner(make_winner())
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"damaged.*t\.sqlite.*Move the file away"):
        TuningStore(url_of(path), import_shipped=False).winners()
    assert path.read_bytes() == before


def test_newer_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.sqlite"
    TuningStore(url_of(path), import_shipped=False).close()
    with sqlite3.connect(path) as plain:
        plain.execute("UPDATE nsa_alembic_version SET version_num = '9999'")
    for read_only in (False, True):
        monkeypatch.setattr(store_module, "is_read_only", lambda location, answer=read_only: answer)
        with pytest.raises(StoreError, match=r"newer than this program.*revision='9999'.*Upgrade"):
            TuningStore(url_of(path))


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"folder of the database cannot be made.*file/deeper.*--db"):
        TuningStore(url_of(tmp_path / "file" / "deeper" / "t.sqlite"))


def test_path_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        TuningStore(url_of(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tuning", "named by a URL or a path.*tuned.sqlite"),
        ("sqlite:///file:t.sqlite?uri=true", "file: URIs"),
        ("oracle9://host/name", "no such kind"),
    ],
)
def test_unusable_url(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        TuningStore(url)


def test_password_is_not_shown() -> None:
    assert "hidden" not in str(parse_location("postgresql://user:hidden@host/name"))


def test_busy_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.db.engine.BUSY_TIMEOUT_MS", 50)
    path = tmp_path / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="busy"):
            store.add_trial(make_trial())
        assert store.trials() == []  # readers go on
        other.execute("ROLLBACK")
        other.close()
        store.add_trial(make_trial())
        assert len(store.trials()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose permissions are mended after the test, so that it can be removed."""
    (tmp_path / "folder").mkdir()
    yield tmp_path / "folder"
    (tmp_path / "folder").chmod(0o755)


def test_read_only_database_is_served(folder: Path) -> None:
    path = folder / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.set_winner(make_winner())
        store.add_trial(make_trial())
        path.chmod(0o444)  # a reader beside a writer whose log is not merged yet
        assert read_unprivileged(url_of(path)).startswith("read_only 1 1\nStoreError the database is open for reading")
    folder.chmod(0o555)
    assert read_unprivileged(url_of(path)).startswith("read_only 1 1\nStoreError the database is open for reading")
    path.chmod(0o644)  # the folder alone takes no log
    assert read_unprivileged(url_of(path)).startswith("read_only 1 1\n")
    assert [entry.name for entry in folder.iterdir()] == ["t.sqlite"]


def test_read_only_folder(folder: Path) -> None:
    folder.chmod(0o555)
    for path in (folder / "t.sqlite", folder / "new" / "t.sqlite"):
        output = read_unprivileged(url_of(path))
        assert output.startswith("StoreError the folder of the database"), output
        assert f"folder='{path.parent}'" in output and "--db URL" in output
    assert list(folder.iterdir()) == []


def test_a_read_only_database_is_verified_and_merged(folder: Path, tmp_path: Path) -> None:
    path = folder / "t.sqlite"
    with TuningStore(url_of(path), import_shipped=False) as store:
        store.add_trial(make_trial())
    path.chmod(0o444)
    folder.chmod(0o555)
    script = """
import sys
from nsa_autotune.db import TuningStore, verify
from nsa_autotune.db.foreign import open_foreign
verify.shipped_files = dict
with TuningStore(sys.argv[1], import_shipped=False, read_only=True) as store:
    print(list(verify.verify(store)))
with open_foreign(sys.argv[1]) as theirs:
    print(len(theirs.trials()))
"""
    process = start(UNPRIVILEGED, sys.executable, "-c", script, url_of(path))
    assert process.communicate(timeout=60)[0] == "[]\n1\n"


def test_a_plain_path_is_a_sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_bytes(b"")
    for text in ("t.sqlite", "./t.db", str(tmp_path / "t.sqlite3"), "new/t.sqlite", "old"):
        location = parse_location(text)
        assert location.is_sqlite and location.path == tmp_path / text and location.url.database == str(tmp_path / text)
    with TuningStore("new/50%?.sqlite", import_shipped=False):
        assert (tmp_path / "new" / "50%?.sqlite").is_file()


def test_a_lost_slash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"three slashes.*sqlite:////tmp/t\.sqlite, with four slashes"):
        parse_location("sqlite:///tmp/t.sqlite")
    assert parse_location("sqlite:///./tmp/t.sqlite").path == tmp_path / "tmp" / "t.sqlite"
    (tmp_path / "tmp").mkdir()
    assert parse_location("sqlite:///tmp/t.sqlite").path == tmp_path / "tmp" / "t.sqlite"


@pytest.mark.parametrize("url", ["mysql://x", "mysql+pymysql://me:secret@host/x"])
def test_another_kind_of_server_needs_no_driver_of_ours(url: str) -> None:
    with pytest.raises(StoreError, match="no such kind of database") as raised:
        TuningStore(url)
    assert "pip install" not in str(raised.value) and "secret" not in str(raised.value)


def test_unreadable_folder(folder: Path) -> None:
    TuningStore(url_of(folder / "t.sqlite"), import_shipped=False).close()
    folder.chmod(0o000)
    assert read_unprivileged(url_of(folder / "t.sqlite")).startswith("StoreError the folder of the database")


def test_old_schema_cannot_be_served_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.sqlite"
    restore(path, "0001")
    monkeypatch.setattr(store_module, "is_read_only", lambda location: True)
    with pytest.raises(StoreError, match="must already have this program's schema"):
        TuningStore(url_of(path))


# many writers


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    url = url_of(tmp_path / "t.sqlite")
    writers = [start(WRITER, url, name, 50) for name in "ab"]  # both make the file
    for writer in writers:
        output, _ = writer.communicate(timeout=60)
        assert (writer.returncode, output.split()) == (0, [str(i) for i in range(50)]), output
    with TuningStore(url, import_shipped=False) as store:
        found = [(trial.config["writer"], trial.config["i"]) for trial in store.trials()]
    assert sorted(found) == [(name, i) for name in "ab" for i in range(50)]


def test_killed_writer_loses_nothing_it_had_told(tmp_path: Path) -> None:
    url = url_of(tmp_path / "t.sqlite")
    writer = start(WRITER, url, "a", 10_000)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.wait(timeout=60) == -signal.SIGKILL
    with TuningStore(url, import_shipped=False) as store:
        stored = sorted(trial.config["i"] for trial in store.trials())
        assert stored in (told, [*told, len(told)])  # the last one may have been written and not told
        store.add_trial(make_trial())
        assert len(store.trials()) == len(stored) + 1


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "file"])
def test_threads_share_a_store(tmp_path: Path, memory: bool) -> None:
    errors: list[BaseException] = []
    with TuningStore("sqlite://" if memory else url_of(tmp_path / "t.sqlite"), import_shipped=False) as store:

        def write(offset: int) -> None:
            try:
                for i in range(10):
                    store.add_trial(make_trial(offset + i))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(10 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert sorted(trial.config["i"] for trial in store.trials()) == list(range(40))


# where the default lies


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "repo" / "tuning_db").mkdir(parents=True)
    (tmp_path / "repo" / "nsa_autotune").mkdir()
    (tmp_path / "repo" / "pyproject.toml").write_text('[project]\nname = "nsa-autotune"\n')
    return tmp_path / "repo"


def test_order_of_urls(checkout: Path) -> None:
    package, environ = checkout / "nsa_autotune", {"NSA_AUTOTUNE_DB": "sqlite:///env.sqlite"}
    assert paths.chosen_url("sqlite://", environ, package) == "sqlite://"
    assert paths.chosen_url(None, environ, package) == "sqlite:///env.sqlite"
    assert paths.chosen_url(None, {}, package) == f"sqlite:///{checkout}/tuning_db/tuning.sqlite"


def test_installed_package_uses_the_data_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, home = checkout / "nsa_autotune", checkout / "home"
    monkeypatch.setenv("HOME", str(home))
    (checkout / "pyproject.toml").write_text('[project]\nname = "another"\n')
    in_home = home / ".local" / "share" / "nsa_autotune" / "tuning.sqlite"
    assert paths.default_path({}, package) == in_home
    assert paths.default_path({"XDG_DATA_HOME": "relative"}, package) == in_home
    assert paths.default_path({"XDG_DATA_HOME": "/data"}, package) == Path("/data/nsa_autotune/tuning.sqlite")
    (checkout / "pyproject.toml").unlink()
    assert paths.default_path({}, package) == in_home


def test_checkout_that_cannot_be_written(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.db.paths.os.access", lambda path, mode: False)
    found = paths.default_path({"XDG_DATA_HOME": "/data"}, checkout / "nsa_autotune")
    assert found == Path("/data/nsa_autotune/tuning.sqlite")


# shipped winners


def test_shipped_winners_are_imported_once(
    tmp_path: Path, shipped: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(tmp_path / "t.sqlite")
    first, second = make_winner(), make_winner(template_digest="t2")
    shipped["sm90.jsonl"] = f"{format_line(first)}\n{format_line(second)}\n".encode()
    with TuningStore(url) as store:
        assert {(w.template_digest, w.source) for w in store.winners()} == {("t1", "shipped"), ("t2", "shipped")}
        assert store.winners(source="local") == []

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "parse_lines", fail)
        TuningStore(url).close()
        TuningStore(url, import_shipped=False).close()
    shipped["sm90.jsonl"] = format_line(make_winner(median_us=9.0)).encode()  # t2 was withdrawn, t1 measured anew
    with TuningStore(url) as store:
        assert [(w.template_digest, w.median_us) for w in store.winners()] == [("t1", 9.0)]


def test_local_winners_are_never_overwritten(tmp_path: Path, shipped: dict[str, bytes]) -> None:
    url = url_of(tmp_path / "t.sqlite")
    with TuningStore(url) as store:
        store.set_winner(make_winner())
    shipped["sm90.jsonl"] = format_line(make_winner(median_us=1.0)).encode()
    with TuningStore(url) as store:
        assert store.winners() == [make_winner()]
    shipped["sm90.jsonl"] = format_line(make_winner(median_us=2.0)).encode()
    with TuningStore(url) as store:
        assert store.winners() == [make_winner()]


def test_bad_shipped_file_is_named_and_leaves_nothing(tmp_path: Path, shipped: dict[str, bytes]) -> None:
    url = url_of(tmp_path / "t.sqlite")
    shipped["a.jsonl"] = format_line(make_winner()).encode()
    shipped["b.jsonl"] = b"\n{}"
    with pytest.raises(StoreError, match=r"line 2 of b\.jsonl"):
        TuningStore(url)
    with TuningStore(url, import_shipped=False) as store:
        assert store.winners() == []


def test_shipped_files_of_this_checkout_are_good() -> None:
    files = paths.shipped_files()
    assert set(files) == {path.name for path in (ROOT / "tuning_db").glob("*.jsonl")}
    with TuningStore("sqlite://") as store:
        rows = sum(
            json.loads(line)["record"] == "winner" for content in files.values() for line in content.splitlines()
        )
        assert len(store.winners(source="shipped")) == rows


def test_lookup_serves_shipped_winners_where_nothing_can_be_written(
    tmp_path: Path, shipped: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped["sm90.jsonl"] = format_line(make_winner()).encode()
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("NSA_AUTOTUNE_DB", raising=False)
    monkeypatch.setattr(paths, "default_path", lambda *_: tmp_path / "file" / "tuning.sqlite")
    with open_for_lookup() as store:
        assert [w.source for w in store.winners(gpu="NVIDIA H100")] == ["shipped"]
    assert "Only the shipped winners are served" in caplog.text
    with pytest.raises(StoreError):  # a database that was asked for is never replaced
        open_for_lookup(url_of(tmp_path / "file" / "tuning.sqlite"))


def test_a_copy_of_before_never_stands_for_another_one(tmp_path: Path) -> None:
    """What lies where the copy would go is another file's, or not one at all."""
    path = tmp_path / "old.sqlite"
    restore(path, "0003")
    (tmp_path / "old.sqlite.0003.bak").write_text("precious")
    (tmp_path / "old.sqlite.0003.bak2").mkdir()
    TuningStore(f"sqlite:///{path}").close()
    assert (tmp_path / "old.sqlite.0003.bak").read_text() == "precious"
    with closing(sqlite3.connect(tmp_path / "old.sqlite.0003.bak3")) as kept:
        assert kept.execute("SELECT version_num FROM nsa_alembic_version").fetchall() == [("0003",)]
