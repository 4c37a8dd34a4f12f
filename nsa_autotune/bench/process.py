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

from ..codegen.lifetime import has_ended, odd_state
from ..errors import WorkerError

TAIL_BYTES = 1500
KILL_WAIT_S = 20.0  # a driver takes seconds to end a kernel that hangs
LAST_WORDS_S = 5.0
SEND_S = 10.0
MAX_MESSAGE_BYTES = 1 << 24


class ChildGone(Exception):
    """The child ended, closed its end of the pipe or answered nonsense; the text tells how."""


class ChildSilent(Exception):
    """The child said nothing for the time allowed; `state` tells if it was stopped or is stuck in a system call."""

    def __init__(self, timeout_s: float, state: str) -> None:
        self.state = state
        super().__init__(f"no answer within {timeout_s:.3g} s" + (f"; the process is {state}" if state else ""))


class ChildProcess:
    """`python -m <module>` in a session of its own: Ctrl-C reaches only the parent, which then ends the child."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        request_read, self._requests = os.pipe()
        self._answers, answer_write = os.pipe()
        os.set_blocking(self._requests, False)  # a stopped child reads nothing
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
        """Write one message; raises ChildGone or ChildSilent."""
        data = json.dumps(message).encode() + b"\n"
        deadline = time.monotonic() + SEND_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE)
            while data:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildSilent(SEND_S, odd_state(self.pid))
                try:
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
                    raise ChildSilent(timeout_s, odd_state(self.pid))
                data = os.read(self._answers, 1 << 16)
                if not data:
                    raise ChildGone(self._epitaph())
                self._pending += data
                if len(self._pending) > MAX_MESSAGE_BYTES:
                    raise nonsense(self._pending)
        line, self._pending = self._pending.split(b"\n", 1)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise nonsense(line) from error
        if not isinstance(message, dict):
            raise nonsense(line)
        return message

    def tail(self) -> str:
        """The end of what the child printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - TAIL_BYTES))
        return self._log.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """End the child and its process group now; safe to call twice. WorkerError if it does not end."""
        if self._log.closed:
            return
        try:
            self._end()
        finally:
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
                {"pid": self._process.pid, "state": odd_state(self._process.pid) or "unknown"},
                "Its driver call hangs; reset the GPU or restart the machine.",
            ) from error

    def _epitaph(self) -> str:
        has_ended(self._process.pid, LAST_WORDS_S)  # its pipe is closed: it is printing a traceback and ending
        self._end()
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        tail = self.tail()
        return f"the measuring process ended with {how}" + (f"; it printed: {tail}" if tail else "; it printed nothing")

    def _close(self) -> None:
        os.close(self._requests)
        os.close(self._answers)
        self._log.close()


def nonsense(said: object) -> ChildGone:
    """The error for an answer that no measuring process gives: something else wrote into its pipe."""
    return ChildGone(f"the measuring process answered nonsense: {str(said)[:200]}")
