"""Claims: a unit of work belongs to one process until its lease runs out; each function is part of a transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sqlalchemy import ColumnElement, CursorResult, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ..errors import StoreError
from ..spec import digest
from .models import ClaimRow

Stage = Literal["search", "confirm", "retry", "confirm again"]
ClaimState = Literal["mine", "busy", "done"]

INSERTS: dict[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: a stage of tuning one problem; the first five fields are a winner's key."""

    family: str
    problem_key: str  # bucketed: problems of one bucket share their winner
    template_digest: str
    fingerprint_digest: str
    policy: str
    stage: Stage = "search"

    @property
    def digest(self) -> str:
        """Natural key."""
        return digest(list(asdict(self).values()))


@dataclass(frozen=True)
class Claim:
    """A unit that a process has, or is through with."""

    unit: Unit
    owner: str
    expires_s: float  # seconds of UTC
    done_s: float | None


def now_s(session: Session) -> float:
    """Seconds of UTC by one clock for all: the server's, or this host's for a SQLite file."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)
    return time.time()


def claim(session: Session, unit: Unit, owner: str, seconds: float, since_s: float) -> ClaimState:
    """Take a unit for so many seconds, unless another owner has it (busy) or was done with it after `since_s` (done).

    A lease that ran out is taken over. Of several that ask at once one gets it.
    """
    now = now_s(session)
    is_free = (ClaimRow.expires_s <= now) & or_(ClaimRow.done_s.is_(None), ClaimRow.done_s < since_s)
    values = {"owner": owner, "expires_s": now + seconds, "done_s": None}
    insert = _insert(session)(ClaimRow).values(digest=unit.digest, **asdict(unit), **values)
    taken = insert.on_conflict_do_update(
        index_elements=[ClaimRow.digest], set_=values, where=or_(is_free, ClaimRow.owner == owner)
    ).returning(ClaimRow.digest)
    if session.scalar(taken) is not None:
        return "mine"
    row = session.get_one(ClaimRow, unit.digest)
    return "busy" if row.done_s is None else "done"


def renew(session: Session, units: Sequence[Unit], owner: str, seconds: float) -> int:
    """Give the owner so many seconds more from now; how many of the units it still has."""
    later = update(ClaimRow).where(*_held(units, owner)).values(expires_s=now_s(session) + seconds)
    return _count(session, later)


def finish(session: Session, unit: Unit, owner: str) -> bool:
    """Keep for the others that the owner is through with a unit; False if it was taken over."""
    now = now_s(session)
    return _count(session, update(ClaimRow).where(*_held([unit], owner)).values(expires_s=now, done_s=now)) == 1


def release(session: Session, units: Sequence[Unit], owner: str) -> int:
    """Give units back that were not finished; how many the owner still had."""
    return _count(session, delete(ClaimRow).where(*_held(units, owner)))


def read_claims(session: Session) -> list[Claim]:
    """All claims, also those that ran out or are done; the unit that was claimed last comes first."""
    rows = session.scalars(select(ClaimRow).order_by(ClaimRow.expires_s.desc(), ClaimRow.digest))
    names = [field.name for field in fields(Unit)]
    return [
        Claim(Unit(**{name: getattr(row, name) for name in names}), row.owner, row.expires_s, row.done_s)
        for row in rows
    ]


def _held(units: Sequence[Unit], owner: str) -> list[ColumnElement[bool]]:
    digests = [unit.digest for unit in units]
    return [ClaimRow.digest.in_(digests), ClaimRow.owner == owner, ClaimRow.done_s.is_(None)]


def _count(session: Session, statement: object) -> int:
    result = session.execute(statement)  # type: ignore[call-overload]  # an update or a delete
    assert isinstance(result, CursorResult)
    return result.rowcount


def _insert(session: Session) -> Callable[..., Any]:
    name = session.get_bind().dialect.name
    if name not in INSERTS:
        raise StoreError("claims need SQLite or PostgreSQL", {"database": name}, "Use sqlite or postgresql.")
    return INSERTS[name]
