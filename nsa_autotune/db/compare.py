"""Two measurements of each problem side by side: two GPUs, two versions or two configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ..errors import InvalidInput, UnknownName
from ..spec import canonical_json
from .best import best_winners
from .evidence import NOTHING, Evidence, of_trial, of_winner, ratio
from .history import Between, pairs, read_states
from .models import FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow
from .narrow import About, config_has, trials_about
from .rows import select_trials, trial_of

Values = Mapping[str, object]  # of a config's parameters


def compare_gpus(
    session: Session, about: About, gpus: Sequence[str], current_templates: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    """Winners of the first GPU beside those of each other one; parts of names, each of exactly one GPU."""
    chosen = _gpus(session, gpus)
    sides = [
        {e.group[1:]: e for e in map(of_winner, best_winners(session, _exactly(about, gpu), current_templates))}
        for gpu in chosen
    ]
    return [
        _row(base.gpu, base, side[key].gpu, side[key])
        for side in sides[1:]
        for key, base in sorted(sides[0].items(), key=lambda item: item[1].order)
        if key in side
    ]


def compare_versions(session: Session, about: About, between: Between) -> list[dict[str, Any]]:
    """The newest state of each problem with the old version beside the newest with the new one."""
    name, old, new = between
    return [
        {"gpu": older.gpu, **_row(f"{name} {old}", older, f"{name} {new}", newer)}
        for states in read_states(session, about)
        for older, newer in pairs(states, between)
    ]


def compare_configs(session: Session, about: About, first: Values, second: Values) -> list[dict[str, Any]]:
    """The fastest measurement of each problem whose config has the first values beside that with the second."""
    if not about.family:
        raise InvalidInput("configs are compared within one family", {"family": ""}, "Name it: --family slc_attn_fwd.")
    for values in (first, second):
        if bad := sorted(name for name in values if not name.isidentifier()):
            raise UnknownName("a parameter has no such name", {"names": bad}, "See `nsa-autotune render --params`.")
    base, other = (_fastest(session, about, values) for values in (first, second))
    names = [canonical_json(dict(values)) for values in (first, second)]
    return [
        {"gpu": base[key].gpu, **_row(names[0], base[key], names[1], other[key])}
        for key in sorted(base.keys() & other.keys(), key=lambda key: base[key].order)
    ]


def compare_columns(*, of_gpus: bool) -> list[str]:
    """The columns of a row, also where there is none."""
    return [*([] if of_gpus else ["gpu"]), *_row("", NOTHING, "", NOTHING)]


def known_gpus(session: Session) -> list[str]:
    """Names of the GPUs that have winners, those with most of them first."""
    count = func.count()
    found = select(FingerprintRow.gpu).select_from(WinnerRow).join(FingerprintRow).group_by(FingerprintRow.gpu)
    return list(session.scalars(found.order_by(count.desc(), FingerprintRow.gpu)))


def _gpus(session: Session, asked: Sequence[str]) -> list[str]:
    known = known_gpus(session)
    if len(known) < 2:
        remedy = "Import the winners of another one: nsa-autotune db import FILE."
        raise InvalidInput("two GPUs are compared, and fewer have winners here", {"GPUs": known}, remedy)
    chosen = list(dict.fromkeys(_one_gpu(name, known) for name in asked)) if asked else known
    if len(chosen) < 2:
        raise InvalidInput("two GPUs are compared", {"gpu": chosen}, f"Name another one of: {', '.join(known)}.")
    return chosen


def _one_gpu(name: str, known: Sequence[str]) -> str:
    exact = [gpu for gpu in known if gpu.lower() == name.lower()]
    found = exact or [gpu for gpu in known if name.lower() in gpu.lower()]
    if not found:
        raise UnknownName("no GPU of this name has winners", {"gpu": name}, f"GPUs: {', '.join(known)}.")
    if len(found) > 1:
        raise InvalidInput("several GPUs have such a name", {"gpu": name, "found": found}, "Write more of the name.")
    return found[0]


def _exactly(about: About, gpu: str) -> About:
    return replace(about, gpu=gpu, whole_name=True)


def _fastest(session: Session, about: About, values: Values) -> dict[tuple[str, str, str, str], Evidence]:
    wanted = select(VariantRow.id).where(VariantRow.family == about.family, *config_has(session, values))
    rows = session.execute(select_trials([TrialRow.id.in_(_fastest_ids(session, about, wanted))]))
    found = [of_trial(trial_of(*row)) for row in rows]
    return {evidence.group: evidence for evidence in found}


def _fastest_ids(session: Session, about: About, variants: Select[int]) -> Select[int]:
    place = func.row_number().over(
        partition_by=(FingerprintRow.gpu, ProblemRow.family, ProblemRow.problem_key, TrialRow.policy),
        order_by=(TrialRow.median_us, TrialRow.id.desc()),
    )
    rows = select(TrialRow.id, place.label("place")).join(ProblemRow).join(FingerprintRow)
    worked = (TrialRow.kind == "measured", TrialRow.status == "ok", TrialRow.median_us > 0)
    where = (*worked, TrialRow.variant_id.in_(variants), *trials_about(session, about))
    ranked = rows.where(*where).subquery()
    return select(ranked.c.id).where(ranked.c.place == 1)


def _row(base_name: str, base: Evidence, other_name: str, other: Evidence) -> dict[str, Any]:
    return {
        **base.subject(),
        "base": base_name,
        "other": other_name,
        **base.columns("base_"),
        **other.columns("other_"),
        **ratio(base, other).columns(),
    }
