"""How the winner of a problem changed with versions, and where a newer one lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Select, func, literal, select
from sqlalchemy.orm import Session

from ..errors import UnknownName
from .evidence import NOTHING, VERSION_FIELDS, Evidence, differences, of_trial, of_winner, ratio
from .models import ProblemRow, TrialRow, VariantRow
from .narrow import About, trials_about, winners_about
from .rows import select_trials, select_winners, trial_of, winner_of

State = tuple[str, ...]  # all versions
Between = tuple[str, str, str]  # a version's name, its old and its new value


def read_states(session: Session, about: About) -> list[list[Evidence]]:
    """What was best under each set of versions, newest first, for each (GPU, family, problem key, policy).

    It is the winner, or the fastest of the final race where the winner of later versions took its place.
    """
    winners = [of_winner(winner_of(*row)) for row in session.execute(select_winners(winners_about(session, about)))]
    races = session.execute(select_trials([TrialRow.id.in_(_fastest_finals(session, about))]))
    found: dict[tuple[str, str, str, str], dict[State, Evidence]] = defaultdict(dict)
    for evidence in (*winners, *(of_trial(trial_of(*row)) for row in races)):  # winners first
        found[evidence.group].setdefault(tuple(evidence.versions.values()), evidence)
    newest_first = (sorted(states.values(), key=lambda state: state.created, reverse=True) for states in found.values())
    return sorted(newest_first, key=lambda states: states[0].order)


def history_rows(session: Session, about: About, limit: int | None) -> list[dict[str, Any]]:
    """See `TuningDatabase.history`."""
    rows = []
    for states in read_states(session, about):
        for newer, older in zip(states, [*states[1:], None], strict=True):
            rows.append(_row(older, newer))
    return rows[:limit]


def regression_rows(
    session: Session, about: About, loss: float, between: Between | None, limit: int | None
) -> list[dict[str, Any]]:
    """See `TuningDatabase.regressions`; the greatest loss first."""
    found = []
    for states in read_states(session, about):
        for older, newer in pairs(states, between):
            if newer.median_us > (1 + loss) * older.median_us:
                found.append(_row(older, newer))
    found.sort(key=lambda row: row["ratio"], reverse=True)
    return found[:limit]


def check_between(between: Between | None) -> None:
    """Raise UnknownName unless it names a version."""
    if between is not None and between[0] not in VERSION_FIELDS:
        known = f"Versions: {', '.join(VERSION_FIELDS)}."
        raise UnknownName("there is no such version", {"version": between[0]}, known)


def history_columns() -> list[str]:
    """The columns of a row, also where there is none."""
    return list(_row(None, NOTHING))


def pairs(states: Sequence[Evidence], between: Between | None) -> Iterable[tuple[Evidence, Evidence]]:
    """(older, newer): each state with the one before it, or the newest ones with two values of a version."""
    if between is None:
        return zip(states[1:], states, strict=False)
    name, *values = between
    old, new = (next((state for state in states if state.versions[name] == value), None) for value in values)
    return [] if old is None or new is None else [(old, new)]


def _fastest_finals(session: Session, about: About) -> Select[int]:
    """Ids of the fastest trial of each final race: one a machine, problem key, template, policy and tool version."""
    place = func.row_number().over(
        partition_by=(
            *(TrialRow.fingerprint_id, ProblemRow.family, ProblemRow.problem_key),
            *(VariantRow.template_digest, TrialRow.policy, TrialRow.tool_version),
        ),
        order_by=(TrialRow.median_us, TrialRow.id.desc()),
    )
    rows = select(TrialRow.id, place.label("place"))
    for other in (ProblemRow, VariantRow):
        rows = rows.join(other)
    final = TrialRow.stage == literal("final", literal_execute=True)  # bound, it would not match the partial index
    worked = (TrialRow.kind == "measured", TrialRow.status == "ok", TrialRow.median_us > 0)
    ranked = rows.where(final, *worked, *trials_about(session, about)).subquery()
    return select(ranked.c.id).where(ranked.c.place == 1)


def _row(older: Evidence | None, newer: Evidence) -> dict[str, Any]:
    """A state with its evidence, and what changed from the one before it."""
    row = {"gpu": newer.gpu, **newer.subject(), **newer.columns()}
    names = ("median_us", "p20_us", "p80_us", "samples", "verdict", "created")
    before = dict.fromkeys(names) if older is None else older.columns()
    row |= {f"before_{name}": before[name] for name in names}
    if older is None:
        return row | {"ratio": None, "ratio_low": None, "ratio_high": None, "clear": None, "changed": ""}
    versions = differences(older.versions, newer.versions)
    config = differences(older.config, newer.config)
    changed = "; ".join(part for part in (versions, config) if part)
    return row | ratio(older, newer).columns() | {"changed": changed}
