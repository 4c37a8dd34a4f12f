"""Winners as the dispatcher needs them: without samples, rivals and dates, which take most of the time to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Text, select, type_coerce
from sqlalchemy.orm import InstrumentedAttribute, Session

from .models import FingerprintRow, ProblemRow, VariantRow, WinnerRow


@dataclass(frozen=True)
class KnownWinner:
    """Which config won which problem on which machine; problem and fingerprint may be shared and stay unchanged."""

    fingerprint: dict[str, str]
    problem: dict[str, Any]
    problem_key: str
    config: dict[str, Any]
    template_digest: str
    policy: str
    median_us: float


def read_known(session: Session, family: str) -> list[KnownWinner]:
    """All winners of a family, newest first."""
    asked = (
        *(_text(column) for column in (FingerprintRow.facts, ProblemRow.problem, VariantRow.config)),
        *(ProblemRow.problem_key, VariantRow.template_digest, WinnerRow.policy, WinnerRow.median_us),
    )
    rows = select(*asked).select_from(WinnerRow)
    for other in (FingerprintRow, ProblemRow, VariantRow):
        rows = rows.join(other)
    rows = rows.where(ProblemRow.family == family).order_by(WinnerRow.created.desc(), WinnerRow.id.desc())
    parsed: dict[str, dict[str, Any]] = {}  # many winners share machine, problem and config
    found = []
    for facts, problem, config, key, *rest in session.execute(rows):
        for text in (facts, problem, config):
            if text not in parsed:
                parsed[text] = json.loads(text)
        found.append(KnownWinner(parsed[facts], parsed[problem], key, parsed[config], *rest))
    return found


def _text(column: InstrumentedAttribute[dict[str, Any]]) -> Any:
    """The column as it is stored, not parsed."""
    return type_coerce(column, Text)
