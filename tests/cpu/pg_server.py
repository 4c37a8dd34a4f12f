"""A real PostgreSQL server in a folder of its own, which tests may stop and start."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # where Debian keeps what is not in PATH
UNPRIVILEGED = ("postgres", "nobody")  # the server refuses to run as root
READY_S = 30.0


def program(name: str) -> str | None:
    """The path of one of PostgreSQL's programs."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, FOLDERS)))


def why_not() -> str:
    """Why no server can be started here; "" if one can."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver: pip install nsa-autotune[postgresql]"
    missing = [name for name in ("initdb", "postgres") if program(name) is None]
    return f"no PostgreSQL server: {', '.join(missing)} not found (Debian's package postgresql)" if missing else ""


class Server:
    """A server that listens on a free port of this host; a context that ends it and removes its folder."""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="nsa-pg-"))
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            user = next(names[name] for name in UNPRIVILEGED if name in names)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._data = self._folder / "data"
        command = [str(program("initdb")), "-D", str(self._data), "-U", "tuner", "-A", "trust", "-E", "UTF8", "-N"]
        try:
            subprocess.run(command, check=True, capture_output=True, cwd=self._folder, **self._identity)
            self.start()
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-p", str(self._port), "-k", str(self._folder), "-c", "listen_addresses=127.0.0.1", "-F"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(program("postgres")), "-D", str(self._data), *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **self._identity,
            )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once: connections break, what was committed stays."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(READY_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(READY_S)

    def make_database(self, name: str) -> str:
        """A new database; its URL."""
        import psycopg

        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
        return f"postgresql+psycopg://tuner@127.0.0.1:{self._port}/{name}"

    def _address(self, database: str) -> str:
        return f"host=127.0.0.1 port={self._port} user=tuner dbname={database} connect_timeout=2"

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._address("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True
