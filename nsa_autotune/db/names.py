"""Names in a question that nothing in the database has, and what there is where an answer is empty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..errors import UnknownName
from .evidence import VERSION_FIELDS
from .models import FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow
from .narrow import NSA_FIELDS, About, config_has, problem_has, trials_about, winners_about

MAX_VALUES = 40  # that an error lists
MAX_READ = 1000  # problems or configs whose values and parameters an error knows


def gpus_named(session: Session, part: str) -> list[str]:
    """The GPU called exactly so in any case, else all whose name holds `part`; UnknownName if there is none."""
    known = list(session.scalars(select(FingerprintRow.gpu).distinct().order_by(FingerprintRow.gpu)))
    exact = [gpu for gpu in known if gpu.lower() == part.lower()]
    found = exact or [gpu for gpu in known if part.lower() in gpu.lower()]
    if not found:
        raise UnknownName("the database knows no GPU of this name", {"gpu": part}, _listed("GPUs", known))
    return found


def check_family(session: Session, family: str, more: Iterable[str] = ()) -> None:
    """Raise UnknownName for a family that neither the database nor `more` has."""
    known = {*session.scalars(select(ProblemRow.family).distinct()), *more}
    if family not in known:
        raise UnknownName("the database knows no family of this name", {"family": family}, _listed("Families", known))


def check_about(session: Session, about: About, families: Iterable[str] = ()) -> None:
    """Raise UnknownName for a GPU, family, or value of a field that no record has; `families` are known anyway."""
    if about.gpu:
        gpus_named(session, about.gpu)
    if about.family:
        check_family(session, about.family, families)
    for name, value in about.problem.items():
        if session.scalar(select(ProblemRow.id).where(problem_has(session, name, value)).limit(1)) is None:
            problems = session.scalars(select(ProblemRow.problem).limit(MAX_READ))
            values = {(p.get("nsa", {}) if name in NSA_FIELDS else p).get(name) for p in problems} - {None}
            raise UnknownName("no problem in the database has this value", {name: value}, _listed(name, values))


def check_versions(session: Session, name: str, values: Sequence[str]) -> None:
    """Raise UnknownName for a value of a version that nothing was measured with."""
    if name in VERSION_FIELDS[:5]:
        known = {str(facts.get(name, "")) for facts in session.scalars(select(FingerprintRow.facts))}
    elif name == "tool_version":
        known = {*_all(session, TrialRow.tool_version), *_all(session, WinnerRow.tool_version)}
    else:
        known = set(_all(session, VariantRow.template_digest))
    if unknown := [value for value in values if value not in known]:
        raise UnknownName(f"nothing was measured with this {name}", {name: unknown}, _listed(name, known - {""}))


def check_config(session: Session, family: str, values: Mapping[str, object]) -> None:
    """Raise UnknownName for a value of a parameter that no config of the family has."""
    own = VariantRow.family == family
    for name, value in values.items():
        if session.scalar(select(VariantRow.id).where(own, *config_has(session, {name: value})).limit(1)) is None:
            configs = list(session.scalars(select(VariantRow.config).where(own).limit(MAX_READ)))
            known = {config[name] for config in configs if name in config}
            remedy = _listed(name, known) if known else _listed("Parameters", {n for c in configs for n in c})
            raise UnknownName("no config of the family has this value", {"family": family, name: value}, remedy)


def count_about(session: Session, about: About) -> dict[str, int]:
    """How many winners, measured trials and predictions a question's GPU, family and problem have."""
    winners = select(func.count(WinnerRow.id)).where(*winners_about(session, about))
    trials = select(TrialRow.kind, func.count(TrialRow.id)).where(*trials_about(session, about))
    kinds = {kind: count for kind, count in session.execute(trials.group_by(TrialRow.kind))}  # noqa: C416
    return {"winners": session.scalar(winners) or 0, **{k: kinds.get(k, 0) for k in ("measured", "predicted")}}


def _all(session: Session, column: Any) -> Iterable[str]:
    return session.scalars(select(column).distinct())


def _listed(what: str, known: Iterable[object]) -> str:
    names = sorted(known, key=lambda value: (0, value) if isinstance(value, int | float) else (1, str(value)))
    if not names:
        return "The database is empty."
    more = ", ..." if len(names) > MAX_VALUES else ""
    return f"{what}: {', '.join(map(str, names[:MAX_VALUES]))}{more}."
