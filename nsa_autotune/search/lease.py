"""A lease on units of work: taken in the shared database, renewed by a thread, given back at the end."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ..db.claims import ClaimState, Stage, Unit
from ..db.shared import SharedStore
from ..errors import StoreError
from ..spec import digest
from .task import Task

LEASE_S = 60.0  # after which the work of a silent process is taken over
RENEWALS = 4  # in the time of a lease

logger = logging.getLogger(__name__)


def unit_of(task: Task, stage: Stage = "search") -> Unit:
    """The unit of work that a task is: its fingerprint belongs to it, so different GPUs never wait for each other."""
    return Unit(task.spec.family, task.key, task.template_digest, digest(task.fingerprint), task.policy, stage)


class Lease:
    """What one process works on. `since_s`: work that others finished later counts as done (UTC by the store's clock).

    A context: inside, a thread renews what is held; at its end all that is not finished is given back.
    """

    def __init__(self, store: SharedStore, *, since_s: float, seconds: float = LEASE_S) -> None:
        self.owner = uuid.uuid4().hex
        self.seconds, self.since_s = seconds, since_s
        self._store = store
        self._held: set[Unit] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self, unit: Unit) -> ClaimState:
        """Ask for a unit; it is held if the answer is `mine`."""
        state = self._store.claim(unit, self.owner, self.seconds, self.since_s)
        if state == "mine":
            with self._lock:
                self._held.add(unit)
        return state

    def finish(self, unit: Unit) -> None:
        """Tell the others that a unit is done."""
        self._drop(unit)
        self._store.finish(unit, self.owner)

    @contextmanager
    def working(self, unit: Unit) -> Iterator[None]:
        """Inside, what is written is written only while the unit is held (else ClaimLost); at its end it is done.

        After an exception it is given back, for whoever is next.
        """
        try:
            with self._store.fenced(unit, self.owner, self.seconds):
                yield
        except BaseException:
            self._drop(unit)
            self._give_back([unit])
            raise
        self.finish(unit)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            held, self._held = sorted(self._held, key=lambda unit: unit.digest), set()
        if held:
            self._give_back(held)

    def _drop(self, unit: Unit) -> None:
        with self._lock:
            self._held.discard(unit)

    def _give_back(self, units: list[Unit]) -> None:
        try:
            self._store.release(units, self.owner)
        except StoreError as error:  # the lease runs out by itself, and the error that ends the run must be seen
            logger.warning("claims stay for %.0f s: %s", self.seconds, error)

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / RENEWALS):
            with self._lock:
                held = list(self._held)
            if not held:
                continue
            try:
                self._store.renew(held, self.owner, self.seconds)
            except StoreError as error:  # the next renewal may work; if not, every write asks for the claim again
                logger.debug("a lease was not renewed: %s", error)
