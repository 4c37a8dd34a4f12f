"""Records to rows and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from ..spec import digest
from .checks import RACED, SOURCES
from .models import FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow
from .records import TrialRecord, WinnerRecord

SHARED_FIELDS = ("fingerprint", "family", "problem", "problem_key", "config", "template_digest")
TRIAL_FIELDS = tuple(f.name for f in fields(TrialRecord) if f.name not in SHARED_FIELDS)
WINNER_FIELDS = tuple(f.name for f in fields(WinnerRecord) if f.name not in SHARED_FIELDS)
VERDICT_RANK = {RACED: 0, "provisional": 1, "carried": 1, "confirmed": 2}
RACE_STAGES = ("final", "confirm")

_SHARED_FILTERS: dict[str, InstrumentedAttribute[str]] = {
    "family": ProblemRow.family,
    "problem_key": ProblemRow.problem_key,
    "fingerprint_digest": FingerprintRow.digest,
    "gpu": FingerprintRow.gpu,
    "capability": FingerprintRow.capability,
    "template_digest": VariantRow.template_digest,
}
TRIAL_FILTERS = {
    **_SHARED_FILTERS,
    "status": TrialRow.status,
    "kind": TrialRow.kind,
    "stage": TrialRow.stage,
    "provider": TrialRow.provider,
    "policy": TrialRow.policy,
}
WINNER_FILTERS = {**_SHARED_FILTERS, "source": WinnerRow.source, "policy": WinnerRow.policy}


def insert_trial(session: Session, record: TrialRecord) -> int:
    """Add a trial and what it refers to; the id of the one that is there already if it is the same in every field."""
    return store_trial(session, record)[0]


def store_trial(session: Session, record: TrialRecord) -> tuple[int, bool]:
    """As `insert_trial`, with whether the trial is new."""
    own = {name: getattr(record, name) for name in TRIAL_FIELDS}
    own["samples_us"] = list(record.samples_us)
    return _find_or_add(session, TrialRow, record.check().digest, **_references(session, record), **own)


def upsert_winner(session: Session, record: WinnerRecord, origin: str = "", *, merging: bool = False) -> bool:
    """Store a winner under its natural key; False if the one that stands there serves on.

    A decision made here replaces every winner that is not of a higher source (local, imported, shipped). While merging
    `serving_rank` decides, so that the order of merges does not matter. No measurement is lost: the samples of the one
    that gives way stay as a trial; where two meet in a merge, so do those of both.
    """
    record.check()
    values = {name: getattr(record, name) for name in WINNER_FIELDS}
    values |= _references(session, record)
    values |= {"samples_us": list(record.samples_us), "rivals": list(record.rivals), "origin": origin}
    found = session.scalar(select(WinnerRow).where(WinnerRow.digest == record.digest).with_for_update())
    if found is None:
        try:
            with session.begin_nested():
                session.add(WinnerRow(digest=record.digest, trial_id=_evidence(session, values), **values))
            return True
        except IntegrityError:  # another process was first
            found = session.scalars(select(WinnerRow).where(WinnerRow.digest == record.digest).with_for_update()).one()
    here = _winner_of_row(session, found)
    if merging:
        serves = serving_rank(record) >= serving_rank(here)
        kept = [] if record.content_digest == here.content_digest else [here, record]
    else:
        serves = SOURCES.index(found.source) <= SOURCES.index(record.source)
        loser, row_origin = (here, found.origin) if serves else (record, origin)
        kept = [] if row_origin or _is_raced_here(session, loser) else [loser]
    for winner in kept:
        insert_trial(session, winner.as_trial())
    if serves:
        for name, value in {**values, "trial_id": _evidence(session, values)}.items():
            setattr(found, name, value)
    return serves


def serving_rank(record: WinnerRecord) -> tuple[int, int, datetime, str]:
    """Of two winners of one key the greater serves: source, then verdict, then the newer, then the greater digest."""
    source, verdict = SOURCES.index(record.source), VERDICT_RANK[record.verdict]
    return source, verdict, datetime.fromisoformat(record.created), record.content_digest


def stored_winner(session: Session, digest: str) -> WinnerRecord | None:
    """The winner of a natural key."""
    row = session.scalar(select(WinnerRow).where(WinnerRow.digest == digest))
    return None if row is None else _winner_of_row(session, row)


def read_trials(session: Session, where: Mapping[str, str | None], limit: int | None = None) -> list[TrialRecord]:
    """The trials whose columns equal the values that are not None, newest first."""
    return [trial_of(*row) for row in session.execute(select_trials(conditions(TRIAL_FILTERS, where), limit))]


def read_predictions(session: Session, where: Mapping[str, str | None], limit: int) -> list[TrialRecord]:
    """The `limit` fastest guesses of each problem; of a config only the newest counts."""
    age = func.row_number().over(
        partition_by=(TrialRow.problem_id, TrialRow.variant_id), order_by=(TrialRow.created.desc(), TrialRow.id.desc())
    )
    found = select(TrialRow.id, TrialRow.problem_id, TrialRow.predicted_us, age.label("age"))
    for other in (FingerprintRow, ProblemRow, VariantRow):
        found = found.join(other)
    guesses = found.where(*conditions(TRIAL_FILTERS, {**where, "kind": "predicted"})).subquery()
    place = func.row_number().over(partition_by=guesses.c.problem_id, order_by=(guesses.c.predicted_us, guesses.c.id))
    ranked = select(guesses.c.id, place.label("place")).where(guesses.c.age == 1, guesses.c.predicted_us.is_not(None))
    best = ranked.subquery()
    wanted = select(best.c.id).where(best.c.place <= limit)
    return [trial_of(*row) for row in session.execute(select_trials([TrialRow.id.in_(wanted)]))]


def read_winners(session: Session, where: Mapping[str, str | None], limit: int | None = None) -> list[WinnerRecord]:
    """The winners whose columns equal the values that are not None, newest first."""
    return [winner_of(*row) for row in session.execute(select_winners(conditions(WINNER_FILTERS, where), limit))]


def conditions(
    filters: Mapping[str, InstrumentedAttribute[str]], where: Mapping[str, str | None]
) -> list[ColumnElement[bool]]:
    """Equalities for the values that are not None."""
    return [filters[name] == value for name, value in where.items() if value is not None]


def select_trials(
    where: list[ColumnElement[bool]], limit: int | None = None
) -> Select[TrialRow, FingerprintRow, ProblemRow, VariantRow]:
    """Trials with what they refer to, newest first."""
    rows = select(TrialRow, FingerprintRow, ProblemRow, VariantRow)
    for other in (FingerprintRow, ProblemRow, VariantRow):
        rows = rows.join(other)
    return rows.where(*where).order_by(TrialRow.created.desc(), TrialRow.id.desc()).limit(limit)


def select_winners(
    where: list[ColumnElement[bool]], limit: int | None = None
) -> Select[WinnerRow, FingerprintRow, ProblemRow, VariantRow]:
    """Winners with what they refer to, newest first."""
    rows = select(WinnerRow, FingerprintRow, ProblemRow, VariantRow)
    for other in (FingerprintRow, ProblemRow, VariantRow):
        rows = rows.join(other)
    return rows.where(*where).order_by(WinnerRow.created.desc(), WinnerRow.id.desc()).limit(limit)


def trial_of(trial: TrialRow, fingerprint: FingerprintRow, problem: ProblemRow, variant: VariantRow) -> TrialRecord:
    """The record that a row was made from."""
    own = {name: getattr(trial, name) for name in TRIAL_FIELDS}
    own["samples_us"] = tuple(trial.samples_us)
    return TrialRecord(
        fingerprint=dict(fingerprint.facts),
        family=problem.family,
        problem=problem.problem,
        problem_key=problem.problem_key,
        config=variant.config,
        template_digest=variant.template_digest,
        **own,
    )


def winner_of(winner: WinnerRow, fingerprint: FingerprintRow, problem: ProblemRow, variant: VariantRow) -> WinnerRecord:
    """The record that a row was made from."""
    own = {name: getattr(winner, name) for name in WINNER_FIELDS}
    own |= {"samples_us": tuple(winner.samples_us), "rivals": tuple(winner.rivals)}
    return WinnerRecord(
        fingerprint=dict(fingerprint.facts),
        family=problem.family,
        problem=problem.problem,
        problem_key=problem.problem_key,
        config=variant.config,
        template_digest=variant.template_digest,
        **own,
    )


def intern_fingerprint(session: Session, machine: Mapping[str, str]) -> int:
    """The id of a fingerprint's row, inserted if it is absent."""
    facts = dict(machine)
    return _intern(
        session, FingerprintRow, digest(facts), gpu=facts["gpu"], capability=facts["capability"], facts=facts
    )


def _references(session: Session, record: TrialRecord | WinnerRecord) -> dict[str, int]:
    family = record.family
    return {
        "fingerprint_id": intern_fingerprint(session, record.fingerprint),
        "problem_id": _intern(
            session,
            ProblemRow,
            record.problem_digest,
            family=family,
            problem_key=record.problem_key,
            problem=record.problem,
        ),
        "variant_id": _intern(
            session,
            VariantRow,
            record.variant_digest,
            family=family,
            template_digest=record.template_digest,
            config=record.config,
        ),
    }


def _intern(
    session: Session, table: type[FingerprintRow] | type[ProblemRow] | type[VariantRow], digest: str, **values: object
) -> int:
    """The id of the row with this natural key, inserted if it is absent."""
    return _find_or_add(session, table, digest, **values)[0]


def _find_or_add(
    session: Session,
    table: type[FingerprintRow] | type[ProblemRow] | type[VariantRow] | type[TrialRow],
    digest: str,
    **values: object,
) -> tuple[int, bool]:
    """The id of the row with this natural key, and whether it was absent and is inserted."""
    found = session.scalar(select(table.id).where(table.digest == digest))
    if found is not None:
        return found, False
    row = table(digest=digest, **values)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:  # another process was first
        return session.scalars(select(table.id).where(table.digest == digest)).one(), False
    return row.id, True


def _winner_of_row(session: Session, row: WinnerRow) -> WinnerRecord:
    machine, problem = session.get_one(FingerprintRow, row.fingerprint_id), session.get_one(ProblemRow, row.problem_id)
    return winner_of(row, machine, problem, session.get_one(VariantRow, row.variant_id))


def _is_raced_here(session: Session, winner: WinnerRecord) -> bool:
    """True if a race of the winner's config is stored; a carried winner's stands under the versions it came from."""
    if winner.verdict == "carried":
        return True
    references = [getattr(TrialRow, name) == value for name, value in _references(session, winner).items()]
    good = (TrialRow.status == "ok", TrialRow.stage.in_(RACE_STAGES), TrialRow.policy == winner.policy)
    return session.scalar(select(TrialRow.id).where(*references, *good).limit(1)) is not None


def _evidence(session: Session, values: Mapping[str, object]) -> int | None:
    """The newest good measurement of the winner's variant, a final one preferred; None if it was measured elsewhere."""
    shared = ("fingerprint_id", "problem_id", "variant_id", "policy")
    references = [getattr(TrialRow, name) == values[name] for name in shared]
    good = select(TrialRow.id).where(*references, TrialRow.kind == "measured", TrialRow.status == "ok")
    return session.scalar(good.order_by((TrialRow.stage == "final").desc(), TrialRow.id.desc()).limit(1))
