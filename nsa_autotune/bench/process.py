"""A child process that can be killed with all it started, and talks in JSON lines over pipes of its own.

Standard output is no channel: compilers print there. It goes to a file, whose end tells why a child died.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import WorkerError

TAIL_BYTES = 1500
KILL_WAIT_S = 30.0
LAST_WORDS_S = 5.0


class ChildGone(Exception):
    """The child ended, or closed its end of the pipe, before it answered; the text tells how."""


class ChildSilent(Exception):
    """The child said nothing for the time allowed."""


class ChildProcess:
    """`python -m <module>` in a session of its own: Ctrl-C reaches only the parent, which then ends the child."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        request_read, self._requests = os.pipe()
        self._answers, answer_write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._pending = b""
        command = [sys.executable, "-P", "-m", module, *arguments]
        command += ["--requests", str(request_read), "--answers", str(answer_write), "--parent", str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(request_read, answer_write),
                start_new_session=True,
                env=dict(env),
            )
        except OSError as error:
            self._close()
            raise WorkerError("a measuring process must start", {"command": command[0]}, str(error)) from error
        finally:
            os.close(request_read)
            os.close(answer_write)

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message; raises ChildGone."""
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._requests, data) :]
        except BrokenPipeError as error:
            raise ChildGone(self._epitaph()) from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message; raises ChildSilent or ChildGone."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildSilent(f"no answer within {timeout_s:g} s")
                data = os.read(self._answers, 1 << 16)
                if not data:
                    raise ChildGone(self._epitaph())
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ChildGone(f"the measuring process answered nonsense: {line[:200]!r}") from error
        if not isinstance(message, dict):
            raise ChildGone(f"the measuring process answered nonsense: {line[:200]!r}")
        return message

    def tail(self) -> str:
        """The end of what the child printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - TAIL_BYTES))
        return self._log.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """End the child and its process group now; safe to call twice."""
        if self._log.closed:
            return
        self._end()
        self._close()

    def _end(self) -> None:
        if self._process.returncode is None:  # not reaped yet, so the group id is still ours
            with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
                os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired as error:
            raise WorkerError(
                "a measuring process must end when it is killed",
                {"pid": self._process.pid},
                "Its driver call hangs; reset the GPU or restart the machine.",
            ) from error

    def _epitaph(self) -> str:
        deadline = time.monotonic() + LAST_WORDS_S
        seen = os.WEXITED | os.WNOHANG | os.WNOWAIT  # not reaped, so that what it started can still be killed by group
        while os.waitid(os.P_PID, self._process.pid, seen) is None and time.monotonic() < deadline:
            time.sleep(0.01)  # its pipe is closed: it is printing a traceback and ending
        self._end()
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        tail = self.tail()
        return f"the measuring process ended with {how}" + (f"; it printed: {tail}" if tail else "; it printed nothing")

    def _close(self) -> None:
        os.close(self._requests)
        os.close(self._answers)
        self._log.close()
