"""The measuring processes of one device: one that works, and one that waits with everything imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..codegen.lifetime import has_ended
from ..errors import WorkerError
from .process import ChildGone, ChildProcess, ChildSilent

logger = logging.getLogger(__name__)

STARTUP_S = 300.0  # importing torch from a cold network disk
HEALTH_S = 30.0  # making a context and asking the device what is known
HEALTH_TRIES = 2


class Children:
    """Starts, checks, replaces and ends measuring processes.

    A replacement costs no import where a standby is kept: it has made no context, so it takes no device memory.
    """

    def __init__(self, device: str, toolchain: str, journal: str, env: Mapping[str, str], *, standby: bool) -> None:
        self._device, self._env, self._keeps_standby = device, env, standby
        self._arguments = ["--device", device, "--toolchain", toolchain, "--journal", journal]
        self._child: ChildProcess | None = None
        self._standby: ChildProcess | None = None
        self.lost: WorkerError | None = None  # once a process could not be ended, or the device fails its check

    @property
    def pid(self) -> int | None:
        """Process id of the child that works."""
        return None if self._child is None else self._child.pid

    @property
    def standby_pid(self) -> int | None:
        """Process id of the child that waits."""
        return None if self._standby is None else self._standby.pid

    def working(self) -> ChildProcess:
        """The child that works, replaced if there is none; WorkerError if the device is lost."""
        if self.lost is not None:
            raise self.lost
        if self._child is None:
            said = [self._replace() for _ in range(HEALTH_TRIES) if self._child is None]
            if self._child is None:
                remedy = "Look for errors in `nvidia-smi` and `dmesg`; reset the GPU or restart the machine."
                values = {"device": self._device, "said": said[-1]}
                self.lost = WorkerError("the device is lost: it failed its check in two new processes", values, remedy)
                raise self.lost
            if self._keeps_standby and self._standby is None:
                self._standby = self._start()
        return self._child

    def discard(self) -> None:
        """End the child that works; one that cannot be ended makes the device count as lost."""
        child, self._child = self._child, None
        self._kill(child)

    def close(self) -> None:
        """End all children."""
        self.discard()
        child, self._standby = self._standby, None
        self._kill(child)

    def _kill(self, child: ChildProcess | None) -> None:
        if child is None:
            return
        try:
            child.kill()
        except WorkerError as error:
            logger.error("%s", error)
            self.lost = error

    def _replace(self) -> str:
        """Make a new child work, or tell what it said instead."""
        standby, self._standby = self._standby, None
        if standby is not None and has_ended(standby.pid, 0.0):  # not the device's fault: memory ran out, say
            self._kill(standby)
            standby = None
        self._child = standby or self._start()
        try:
            try:
                self._child.receive(STARTUP_S)
            except (ChildGone, ChildSilent) as error:
                rule = "a measuring process must start"
                raise WorkerError(rule, {"device": self._device}, f"It said: {error}") from error
            self._child.send({"open": True})
            answer = self._child.receive(HEALTH_S)
        except (ChildGone, ChildSilent) as error:
            answer = {"reason": str(error)}
        except BaseException:
            self.discard()
            raise
        if answer.get("healthy") is not True:
            self.discard()
        return str(answer.get("reason", answer))

    def _start(self) -> ChildProcess:
        return ChildProcess("nsa_autotune.bench.worker_main", self._arguments, self._env)
