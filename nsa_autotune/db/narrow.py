"""What a question is about, as conditions that the database tests itself: GPU, family, problem, config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sqlalchemy import ColumnElement, String, cast, func, literal, or_, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import InstrumentedAttribute, Session

from ..config import NSAConfig
from ..errors import UnknownName
from ..spec import Problem, canonical_json
from .models import FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow

NSA_FIELDS = tuple(f.name for f in fields(NSAConfig))
PROBLEM_FIELDS = (*(f.name for f in fields(Problem) if f.name != "nsa"), *NSA_FIELDS)


@dataclass(frozen=True)
class About:
    """Which records a question concerns; empty means all.

    gpu: a part of the name in any case. problem: values of fields, constants of NSA among them, as numbers or text.
    """

    gpu: str = ""
    family: str = ""
    problem: Mapping[str, object] = field(default_factory=dict)
    policy: str = ""
    whole_name: bool = False  # gpu is the name itself


def trials_about(session: Session, about: About) -> list[ColumnElement[bool]]:
    """Conditions on nsa_trials alone, so that an index answers them before any other table is read."""
    return _about(session, about, TrialRow)


def winners_about(session: Session, about: About) -> list[ColumnElement[bool]]:
    """Conditions on nsa_winners alone."""
    return _about(session, about, WinnerRow)


def config_has(session: Session, values: Mapping[str, object]) -> list[ColumnElement[bool]]:
    """Conditions on nsa_variants: the config has these values, given as numbers, booleans or text."""
    return [_equals(session, VariantRow.config, (name,), value) for name, value in values.items()]


def problem_has(session: Session, name: str, value: object) -> ColumnElement[bool]:
    """A condition on nsa_problems: the field, which may be a constant of NSA, has this value."""
    path = ("nsa", name) if name in NSA_FIELDS else (name,)
    return _equals(session, ProblemRow.problem, path, value)


def check_problem_fields(names: Sequence[str] | Mapping[str, object]) -> None:
    """Raise UnknownName unless all are fields of a problem."""
    if unknown := sorted(set(names) - set(PROBLEM_FIELDS)):
        known = ", ".join(sorted(PROBLEM_FIELDS))
        raise UnknownName("a problem has no such field", {"fields": unknown}, f"Fields: {known}.")


def _about(session: Session, about: About, table: type[TrialRow] | type[WinnerRow]) -> list[ColumnElement[bool]]:
    check_problem_fields(about.problem)
    where: list[ColumnElement[bool]] = []
    if about.gpu:
        named = func.lower(FingerprintRow.gpu).contains(about.gpu.lower(), autoescape=True)
        if about.whole_name:
            named = FingerprintRow.gpu == about.gpu
        where.append(table.fingerprint_id.in_(select(FingerprintRow.id).where(named)))
    asked = [ProblemRow.family == about.family] if about.family else []
    asked += [problem_has(session, name, value) for name, value in about.problem.items()]
    if asked:
        where.append(table.problem_id.in_(select(ProblemRow.id).where(*asked)))
    if about.policy:
        where.append(table.policy == about.policy)
    return where


def _equals(
    session: Session, column: InstrumentedAttribute[dict[str, Any]], path: tuple[str, ...], value: object
) -> ColumnElement[bool]:
    """A value inside a JSON column equals one given; text from a command line may mean a number or a boolean."""
    meant: list[object] = [value]
    if isinstance(value, str):
        meant += [{"true": True, "false": False}[value.lower()]] if value.lower() in ("true", "false") else []
        meant += [number for number in [_number(value)] if number is not None]
    if session.get_bind().dialect.name == "postgresql":
        stored: ColumnElement[Any] = cast(cast(column, String), JSONB)
        for name in path:
            stored = stored[name]
        return or_(*(stored == cast(literal(canonical_json(each), String), JSONB) for each in meant))
    quoted = "$" + "".join(f'."{name}"' for name in path)
    return or_(*(_sqlite_equals(column, quoted, each) for each in meant))


def _sqlite_equals(column: InstrumentedAttribute[dict[str, Any]], path: str, value: object) -> ColumnElement[bool]:
    if isinstance(value, bool):  # json_extract would say 1, which the number 1 is too
        return func.json_type(column, path) == canonical_json(value)
    return func.json_extract(column, path) == literal(value)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
