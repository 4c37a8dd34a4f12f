"""Which records an export holds."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from ..errors import UnknownName
from .designs import read_designs
from .exchange import RECORD_TYPES, Record
from .names import gpus_named
from .records import TrialRecord
from .rows import read_trials, read_winners


def select_records(session: Session, kinds: Sequence[str], gpu: str | None, family: str | None) -> list[Record]:
    """Records of these kinds, of GPUs by a part of their name; UnknownName for a kind or GPU that there is not."""
    if unknown := sorted(set(kinds) - RECORD_TYPES.keys()):
        raise UnknownName(f"records must be of {', '.join(RECORD_TYPES)}", {"records": unknown})
    gpus: Sequence[str | None] = gpus_named(session, gpu) if gpu else (None,)
    found: list[Record] = []
    for name in gpus:
        if "winner" in kinds:
            found += read_winners(session, {"gpu": name, "family": family})
        if "trial" in kinds:
            found += read_trials(session, {"gpu": name, "family": family})
    if "design" in kinds and family is None:
        found += [d for d in read_designs(session, {}) if None in gpus or d.fingerprint["gpu"] in gpus]
    return found


def measured_trials(
    session: Session, gpu: str | None, family: str | None, provider: str | None = None
) -> list[TrialRecord]:
    """Measured trials of GPUs by a part of their name; UnknownName if there is none."""
    gpus: Sequence[str | None] = gpus_named(session, gpu) if gpu else (None,)
    where = {"family": family, "provider": provider, "kind": "measured"}
    return [trial for name in gpus for trial in read_trials(session, {**where, "gpu": name})]
