"""SharedStore: a store that several tuners work on, with claims, and patience with a server that restarts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session

from ..errors import ClaimLost, DatabaseAway
from . import claims
from .claims import Claim, ClaimState, Unit
from .store import TuningStore

PATIENCE_S = 120.0  # that a server may be away
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def patiently(act: Callable[Concatenate[SharedStore, P], R]) -> Callable[Concatenate[SharedStore, P], R]:
    """The method, repeated while the server is away, for at most PATIENCE_S; safe where repeating adds nothing."""

    @wraps(act)
    def repeat(store: SharedStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return with_patience(lambda: act(store, *args, **kwargs))

    return repeat


def with_patience(act: Callable[[], R], patience_s: float | None = None) -> R:
    """What `act` returns, tried again with growing pauses while it raises DatabaseAway; that error in the end."""
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return act()
        except DatabaseAway as error:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            if wait_s == FIRST_WAIT_S:
                logger.warning("%s Trying again for %.0f s.", error, left_s)
            time.sleep(min(wait_s, left_s))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


class SharedStore(TuningStore):
    """A TuningStore whose work is divided by claims; a server may be away for two minutes before methods raise.

    Inside `fenced` nothing is written unless the claim is still held, in the same transaction: what a process measured
    for a unit that was taken over is dropped, so that no trial is stored by both.
    """

    def __init__(self, url: str | None = None, *, import_shipped: bool = True) -> None:
        self._fence: tuple[Unit, str, float] | None = None
        with_patience(lambda: super(SharedStore, self).__init__(url, import_shipped=import_shipped))

    add_trials = patiently(TuningStore.add_trials)
    trials = patiently(TuningStore.trials)
    predictions = patiently(TuningStore.predictions)
    set_winner = patiently(TuningStore.set_winner)
    winners = patiently(TuningStore.winners)

    @patiently
    def claim(self, unit: Unit, owner: str, seconds: float, since_s: float) -> ClaimState:
        """Take a unit for so many seconds: mine, busy (another has it) or done (by another, after `since_s`)."""
        with self._unfenced() as session:
            return claims.claim(session, unit, owner, seconds, since_s)

    def renew(self, units: Sequence[Unit], owner: str, seconds: float) -> int:
        """Hold claims for so many seconds more; how many are still the owner's. One attempt."""
        with self._unfenced() as session:
            return claims.renew(session, units, owner, seconds)

    @patiently
    def finish(self, unit: Unit, owner: str) -> bool:
        """Tell that a unit is done; False if it was taken over."""
        with self._unfenced() as session:
            return claims.finish(session, unit, owner)

    def release(self, units: Sequence[Unit], owner: str) -> int:
        """Give back what is not done; how many of them the owner still had. One attempt."""
        with self._unfenced() as session:
            return claims.release(session, units, owner)

    @patiently
    def claims(self) -> list[Claim]:
        """All claims, those that ran out or are done as well."""
        with super()._transaction() as session:
            return claims.read_claims(session)

    @patiently
    def now_s(self) -> float:
        """Seconds of UTC, by the clock that claims go by."""
        with super()._transaction() as session:
            return claims.now_s(session)

    @contextmanager
    def fenced(self, unit: Unit, owner: str, seconds: float) -> Iterator[None]:
        """Inside, every write renews the claim, and raises ClaimLost instead if another process has the unit now."""
        self._fence = (unit, owner, seconds)
        try:
            yield
        finally:
            self._fence = None

    @contextmanager
    def _unfenced(self) -> Iterator[Session]:
        with super()._transaction(write=True) as session:
            yield session

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Session]:
        with super()._transaction(write=write) as session:
            if write and self._fence is not None:
                unit, owner, seconds = self._fence
                if claims.renew(session, [unit], owner, seconds) != 1:
                    values = {"family": unit.family, "stage": unit.stage}
                    raise ClaimLost("the work was taken over by another process", values, "Its trials are kept.")
            yield session
