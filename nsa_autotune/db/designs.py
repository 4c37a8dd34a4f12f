"""DesignRecord: one point of a co-design study, with its rules, and its way to a row and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ..config import NSAConfig
from ..errors import InvalidConfig, StoreError
from ..spec import digest
from .checks import DESIGN_RULES, KINDS, check_fields, shorten
from .models import DesignRow, FingerprintRow
from .records import tool_version, utc_now
from .rows import intern_fingerprint

MEASURED = KINDS[0]
NUMBERS = ("latency_us", "mass_kept", "mass_kept_p10", "output_error", "locality")


@dataclass(frozen=True)
class DesignRecord:
    """What constants of NSA cost and keep: latency in us, the sum of `parts`; shares of dense attention in [0, 1].

    `study` says of what: problem, kernels, activations and the definition of quality. Equal studies on equal machines
    hold a design once.
    """

    fingerprint: dict[str, str]
    study: dict[str, Any]
    nsa: dict[str, int]  # constants by name
    group_size: int  # G, query heads of a kv head
    latency_us: float
    parts: dict[str, float]  # family -> us of all its launches
    mass_kept: float
    mass_kept_p10: float
    output_error: float
    locality: float | None = None  # of the selection on the activations
    kind: str = "measured"  # or predicted
    created: str = field(default_factory=utc_now)
    tool_version: str = field(default_factory=tool_version)

    def __post_init__(self) -> None:
        for name in NUMBERS:  # 5 and 5.0 must hash alike
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))

    def check(self) -> Self:
        """Raise StoreError if a field could not be stored and read back unchanged."""
        check_fields({f.name: getattr(self, f.name) for f in fields(self)}, DESIGN_RULES)
        try:
            NSAConfig(**self.nsa)
        except (InvalidConfig, TypeError) as error:
            raise StoreError("nsa must be valid constants", {"nsa": shorten(self.nsa)}, str(error)) from error
        return self

    @property
    def config(self) -> NSAConfig:
        """The constants."""
        return NSAConfig(**self.nsa)

    @property
    def study_digest(self) -> str:
        """Natural key of the study."""
        return digest(self.study)

    @property
    def digest(self) -> str:
        """Natural key: fingerprint, study, constants and group size."""
        return digest([self.fingerprint, self.study, self.nsa, self.group_size])

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; every field must be there, of the right type, and no other."""
        check_fields(data, DESIGN_RULES)
        return cls(**data).check()


OWN_FIELDS = tuple(f.name for f in fields(DesignRecord) if f.name != "fingerprint")


def insert_design(session: Session, record: DesignRecord) -> bool:
    """Add a design; False if the study holds it already, which then stays as it is."""
    record.check()
    known = select(DesignRow.id).where(DesignRow.digest == record.digest)
    if session.scalar(known) is not None:
        return False
    row = DesignRow(
        digest=record.digest,
        study_digest=record.study_digest,
        fingerprint_id=intern_fingerprint(session, record.fingerprint),
        **{name: getattr(record, name) for name in OWN_FIELDS},
    )
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:  # another process was first
        return False
    return True


def merge_design(session: Session, record: DesignRecord) -> bool:
    """Add a design that was evaluated elsewhere; False if this very evaluation is here already.

    Of two evaluations of one point the measured one stands, then the newer one, then the one of the greater digest.
    The other is kept too, under a study of its own that names it in `set_aside`.
    """
    row = session.scalar(select(DesignRow).where(DesignRow.digest == record.check().digest).with_for_update())
    if row is None:
        return insert_design(session, record)
    machine = session.get_one(FingerprintRow, row.fingerprint_id)
    here = _record_of(row, machine)
    if here == record:
        return False
    stands, other = sorted((here, record), key=_rank, reverse=True)
    is_added = insert_design(session, _set_aside(other))
    if stands is here:
        return is_added
    for name in OWN_FIELDS:
        setattr(row, name, getattr(record, name))
    return True


def _rank(record: DesignRecord) -> tuple[bool, datetime, str]:
    return record.kind == MEASURED, datetime.fromisoformat(record.created), digest(record.to_dict())


def _set_aside(record: DesignRecord) -> DesignRecord:
    return replace(record, study={**record.study, "set_aside": digest(record.to_dict())})


def read_designs(session: Session, where: Mapping[str, str | None]) -> list[DesignRecord]:
    """The designs whose study_digest, fingerprint_digest or kind equal the values that are not None, oldest first."""
    columns = {
        "study_digest": DesignRow.study_digest,
        "fingerprint_digest": FingerprintRow.digest,
        "kind": DesignRow.kind,
    }
    asked = [columns[name] == value for name, value in where.items() if value is not None]
    found = select(DesignRow, FingerprintRow).join(FingerprintRow).where(*asked).order_by(DesignRow.id)
    return [_record_of(row, machine) for row, machine in session.execute(found)]


def _record_of(row: DesignRow, machine: FingerprintRow) -> DesignRecord:
    return DesignRecord(fingerprint=dict(machine.facts), **{name: getattr(row, name) for name in OWN_FIELDS})
