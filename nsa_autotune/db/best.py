"""The winner of each problem on each GPU, chosen by the database, and how winners change with sequence length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ..spec import canonical_json
from .evidence import differences
from .models import FingerprintRow, ProblemRow, VariantRow, WinnerRow
from .narrow import About, winners_about
from .query import winner_columns
from .records import WinnerRecord
from .rows import select_winners, winner_of

LENGTHS = ("seq_q", "seq_k")
GROWTH = ("growth", "config_change")  # columns of an answer by length


def best_winners(
    session: Session, about: About, current_templates: Mapping[str, str] | None, limit: int | None = None
) -> list[WinnerRecord]:
    """One winner for each (GPU, family, problem key, policy): the newest of the present templates, else the newest.

    Newest first.
    """
    ids = _best_ids(session, about, current_templates)
    return [winner_of(*row) for row in session.execute(select_winners([WinnerRow.id.in_(ids)], limit))]


def best_rows(
    session: Session, about: About, current_templates: Mapping[str, str] | None, *, by: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """See `TuningDatabase.best`."""
    winners = best_winners(session, about, current_templates, None if by else limit)
    if by is None:
        return [_columns(winner, current_templates) for winner in winners]
    return [
        {**_columns(winner, current_templates), **_growth(before, winner)} for before, winner in by_length(winners)
    ][:limit]


def by_length(winners: Iterable[WinnerRecord]) -> list[tuple[WinnerRecord | None, WinnerRecord]]:
    """Winners in the order of their lengths, each behind the next shorter one of the same problem otherwise."""
    groups: dict[str, list[WinnerRecord]] = {}
    for winner in winners:
        same = {name: value for name, value in winner.problem.items() if name not in LENGTHS}
        diagonal = winner.problem["seq_q"] == winner.problem["seq_k"]
        queries = "all" if diagonal else winner.problem["seq_q"]  # decoding is a row of its own
        key = canonical_json([winner.fingerprint["gpu"], winner.family, winner.policy, same, queries])
        groups.setdefault(key, []).append(winner)
    found: list[tuple[WinnerRecord | None, WinnerRecord]] = []
    for _, members in sorted(groups.items()):
        members.sort(key=lambda winner: winner.problem["seq_k"])
        found += zip([None, *members[:-1]], members, strict=True)
    return found


def _best_ids(session: Session, about: About, current_templates: Mapping[str, str] | None) -> Select[int]:
    digests = sorted((current_templates or {}).values())
    place = func.row_number().over(
        partition_by=(FingerprintRow.gpu, ProblemRow.family, ProblemRow.problem_key, WinnerRow.policy),
        order_by=(VariantRow.template_digest.in_(digests).desc(), WinnerRow.created.desc(), WinnerRow.id.desc()),
    )
    rows = select(WinnerRow.id, place.label("place"))
    for other in (FingerprintRow, ProblemRow, VariantRow):
        rows = rows.join(other)
    ranked = rows.where(*winners_about(session, about)).subquery()
    return select(ranked.c.id).where(ranked.c.place == 1)


def _columns(winner: WinnerRecord, current_templates: Mapping[str, str] | None) -> dict[str, Any]:
    return {**winner_columns(winner, current_templates), "rivals": len(winner.rivals)}


def _growth(before: WinnerRecord | None, winner: WinnerRecord) -> dict[str, Any]:
    """How the time and the config moved from the next shorter length."""
    if before is None:
        return dict(zip(GROWTH, (None, ""), strict=True))
    moved = differences(before.config, winner.config) or "none"
    return dict(zip(GROWTH, (winner.median_us / before.median_us, moved), strict=True))
