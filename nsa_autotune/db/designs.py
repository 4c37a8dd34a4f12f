"""DesignRecord: one point of a co-design study, with its rules, and its way to a row and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ..config import NSAConfig
from ..errors import InvalidConfig, StoreError
from ..spec import digest
from .checks import DESIGN_RULES, check_fields
from .models import DesignRow, FingerprintRow
from .records import tool_version, utc_now
from .rows import intern_fingerprint

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
            raise StoreError("nsa must be valid constants", {"nsa": self.nsa}, str(error)) from error
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
