"""The journal of a measuring device: a line on disk before every launch, so that a dead host can name the killer.

One append-only file for each host and device, in JSON lines. The tuner writes what it asks for and that it was
answered; the measuring process writes the stage it enters, before it enters it. What was asked and not answered is
what the host, or the tuner, died of.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ..codegen.paths import state_dir
from ..errors import WorkerError
from ..spec import Config
from .result import TrialResult

logger = logging.getLogger(__name__)

WRITTEN_STAGES = ("compile", "launch", "accuracy", "timing", "library")  # those in which a kernel may run
RACE = "race"  # told of every variant that goes on the clock, before the first is timed
SUSPICION = "Suspected by the journal"  # how the reasons of such trials begin
LOCK_WAIT_S = 1.0  # for a tuner that is just ending


@dataclass(frozen=True)
class Suspect:
    """A variant (or a library, `provider`) that was under way when host or tuner died; `when` in UTC.

    `context` is what the tuner that died said of itself.
    """

    family: str
    problem: Mapping[str, Any]
    config: Config
    stage: str
    when: str
    journal: str
    others: int = 0  # variants that were on the clock with it
    provider: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)

    def result(self) -> TrialResult:
        """The crash as a result of a trial."""
        shared = f", as were {self.others} others on the clock" if self.others else ""
        reason = f"{SUSPICION} {self.journal}: in stage '{self.stage}' when host or tuner died at {self.when}{shared}."
        return TrialResult("crash", reason)


def is_suspicion(reason: str) -> bool:
    """True for the reason of a trial that a journal, and no measuring process, reported."""
    return reason.startswith(SUSPICION)


def journal_name(device: str, environ: Mapping[str, str], host: str) -> str:
    """File name of a device's journal; CUDA_VISIBLE_DEVICES renumbers devices, and one device has one journal."""
    kind, _, number = device.partition(":")
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    index = int(number or 0)
    if kind == "cuda" and index < len(visible):
        number = visible[index]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"journal-{host}-{kind}-{number or 0}") + ".jsonl"


class Journal:
    """The tuner's side: locks the file, tells what an earlier run left unfinished, writes what is asked and answered.

    `context` is written at the top, for whoever reads what is unfinished. A second tuner on the device gets
    WorkerError: their times would disturb each other. A journal that cannot be written while measuring is told once,
    and the measurement goes on.
    """

    def __init__(self, device: str, folder: Path | None = None, context: Mapping[str, Any] | None = None) -> None:
        folder = folder or state_dir()
        self.path = folder / journal_name(device, os.environ, socket.gethostname())
        self._head = {"open": os.getpid(), "context": dict(context or {})}
        self._is_writable, self._asked = True, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            values = {"file": str(self.path), "message": str(error)}
            remedy = "Set NSA_AUTOTUNE_STATE_DIR to a folder you may write."
            raise WorkerError("tuning needs a journal that can be written", values, remedy) from error
        try:
            self._lock(device)
        except BaseException:
            os.close(self._file)
            raise
        self._suspects = list(suspects(read_lines(self.path), str(self.path)))
        self._write({**self._head, "when": now()})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def unfinished(self) -> list[Suspect]:
        """What an earlier run was at when it died; the likeliest killer first."""
        return list(self._suspects)

    def settle(self) -> None:
        """Forget what is unfinished: it is stored elsewhere by now."""
        self._suspects = []
        os.ftruncate(self._file, 0)
        self._write({**self._head, "when": now()})

    def ask(self, family: str, problem: Mapping[str, Any], configs: Sequence[Config], provider: str = "") -> None:
        """Write what the measuring process is about to be asked for."""
        asked = {"family": family, "problem": problem, "configs": list(configs), "provider": provider}
        self._asked = True
        self._write({"ask": asked, "when": now()})

    def answered(self) -> None:
        """Write that what was asked has an answer, good or bad."""
        self._asked = False
        self._write({"answered": True})

    def warn(self, reason: str) -> None:
        """Tell, once, that lines are missing."""
        if self._is_writable:
            self._is_writable = False
            logger.warning("%s cannot be written (%s): if this host dies now, it cannot name why", self.path, reason)

    def close(self) -> None:
        """Empty the journal, unless something is unfinished, and let the next tuner have it."""
        if self._file < 0:
            return
        if not (self._asked or self._suspects):
            os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = -1

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            append(self._file, line)
        except OSError as error:
            self.warn(str(error))

    def _lock(self, device: str) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    holders = [line["open"] for line in read_lines(self.path) if "open" in line]
                    raise WorkerError(
                        "one tuner at a time measures on a device: two disturb each other's times",
                        {"device": device, "other_process": holders[-1] if holders else "unknown"},
                        "Wait for it, or name another GPU with --device.",
                    ) from error
                time.sleep(0.02)


class StageLines:
    """The measuring process's side: a line for each stage of each variant, on disk before it begins; none a sample."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._timed: set[int] = set()
        self._racing: list[int] = []

    def begin(self) -> None:
        """A new request."""
        self._timed, self._racing = set(), []

    def tell(self, index: int, stage: str) -> None:
        """Write that a variant enters a stage; raises OSError if that fails."""
        if stage == RACE:
            self._racing.append(index)
            return
        if stage == "timing" and self._racing:
            append(self._file, {"clock": self._racing, "when": now()})
            self._timed, self._racing = set(), []
        if stage in WRITTEN_STAGES and index not in self._timed:
            append(self._file, {"at": index, "stage": stage, "when": now()})
        if stage == "timing":  # told before every sample
            self._timed.add(index)


def append(file: int, line: Mapping[str, Any]) -> None:
    """Add a line, and wait until it is on disk; the break before it ends what a full disk left half-written."""
    data = b"\n" + json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def now() -> str:
    """The time now, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what a dying host wrote by half is left out."""
    found = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def suspects(lines: Iterable[Mapping[str, Any]], journal: str) -> Iterator[Suspect]:
    """Variants of every request that has no answer, by the last lines written about it."""
    asked: Mapping[str, Any] | None = None
    about: list[Mapping[str, Any]] = []
    context: Mapping[str, Any] = {}
    for line in [*lines, {"ask": None}]:
        if not line.keys().isdisjoint(("ask", "answered", "open")):
            if asked is not None and about and "answered" not in line:  # without a stage no kernel had run
                try:
                    yield from list(_suspects_of(asked, about, journal, context))
                except (KeyError, IndexError, TypeError, ValueError):  # not as we write them
                    logger.warning("%s has lines that this version does not understand: %r", journal, asked)
            asked, about = line.get("ask"), []
            context = line.get("context", context)
        elif "at" in line or "clock" in line:
            about.append(line)


def _suspects_of(
    asked: Mapping[str, Any], about: list[Mapping[str, Any]], journal: str, context: Mapping[str, Any]
) -> Iterator[Suspect]:
    """The variant that was entered last; if all on the clock were, each of them, since samples are not written."""
    entered = [line for line in about if "at" in line]
    if not entered:
        return
    last = entered[-1]
    accused = [last]
    race = next((number for number in reversed(range(len(about))) if "clock" in about[number]), None)
    if race is not None and last["stage"] == "timing":
        timed = [line for line in about[race:] if "at" in line]
        if len(timed) == len(about[race]["clock"]):
            accused = timed[::-1]
    for line in accused:
        yield Suspect(
            family=asked["family"],
            problem=asked["problem"],
            config=dict(asked["configs"][line["at"]]),
            stage=line["stage"],
            when=line["when"],
            journal=journal,
            others=len(accused) - 1,
            provider=asked["provider"],
            context=context,
        )
