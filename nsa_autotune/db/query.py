"""Questions to the database, answered with flat rows that a table, CSV or JSON can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from ..errors import UnknownName
from ..spec import canonical_json
from .checks import KINDS, STATUSES
from .models import TrialRow
from .narrow import About, trials_about, winners_about
from .records import TrialRecord, WinnerRecord
from .rows import select_trials, select_winners, trial_of, winner_of

TABLES = ("winners", "trials")
MACHINE_COLUMNS = ("gpu", "capability", "driver", "cuda", "torch", "triton", "assembler")
PROBLEM_COLUMNS = (
    "layout",
    "batch",
    "seq_q",
    "seq_k",
    "num_q_heads",
    "num_kv_heads",
    "d_qk",
    "d_v",
    "dtype",
    "locality",
)
RESOURCE_COLUMNS = ("registers", "shared_bytes", "spill_bytes", "num_warps", "occupancy")


def query_rows(
    session: Session,
    *,
    gpu: str | None,
    family: str | None,
    problem: Mapping[str, object] | None,
    status: str | None,
    kind: str,
    table: str,
    limit: int | None,
    current_templates: Mapping[str, str] | None,
) -> list[dict[str, Any]]:
    """See `TuningStore.query`."""
    _check_names(table=table, kind=kind, status=status)
    about = About(gpu or "", family or "", problem or {})
    if table == "winners":
        winners = session.execute(select_winners(winners_about(session, about), limit))
        return [winner_columns(winner_of(*row), current_templates) for row in winners]
    where = [TrialRow.kind == kind, *trials_about(session, about)]
    if status:
        where.append(TrialRow.status == status)
    found = session.execute(select_trials([TrialRow.id.in_(newest_trials(where, limit))]))
    return [trial_columns(trial_of(*row), current_templates) for row in found]


def newest_trials(where: Sequence[ColumnElement[bool]], limit: int | None) -> Select[int]:
    """Ids, which an index alone gives where it covers the conditions: wide rows are read for the answer only."""
    return select(TrialRow.id).where(*where).order_by(TrialRow.created.desc(), TrialRow.id.desc()).limit(limit)


def winner_columns(record: WinnerRecord, current_templates: Mapping[str, str] | None) -> dict[str, Any]:
    """A winner as one flat row; times in microseconds."""
    return {
        **_shared_columns(record),
        "median_us": record.median_us,
        "p20_us": record.p20_us,
        "p80_us": record.p80_us,
        "samples": len(record.samples_us),
        "default_median_us": record.default_median_us,
        "speedup": record.speedup,
        "library": record.library,
        "library_median_us": record.library_median_us,
        "config": canonical_json(record.config),
        "verdict": record.verdict,
        "tied": len(record.tied),
        "policy": record.policy,
        "source": record.source,
        "stale": _is_stale(record, current_templates),
        "template_digest": record.template_digest,
        "created": record.created,
        "tool_version": record.tool_version,
    }


def trial_columns(record: TrialRecord, current_templates: Mapping[str, str] | None) -> dict[str, Any]:
    """A trial as one flat row; times in microseconds."""
    return {
        **_shared_columns(record),
        "kind": record.kind,
        "status": record.status,
        "median_us": record.median_us,
        "p20_us": record.p20_us,
        "p80_us": record.p80_us,
        "predicted_us": record.predicted_us,
        "samples": len(record.samples_us),
        "max_error": record.max_error,
        "baseline_error": record.baseline_error,
        "provider": record.provider,
        "stage": record.stage,
        "policy": record.policy,
        "config": canonical_json(record.config),
        **{name: (record.resources or {}).get(name) for name in RESOURCE_COLUMNS},
        "resources": None if record.resources is None else canonical_json(record.resources),
        "reason": record.reason,
        "stale": _is_stale(record, current_templates),
        "template_digest": record.template_digest,
        "created": record.created,
        "tool_version": record.tool_version,
    }


def _shared_columns(record: TrialRecord | WinnerRecord) -> dict[str, Any]:
    return {
        **{name: record.fingerprint.get(name, "") for name in MACHINE_COLUMNS},
        "family": record.family,
        **{name: record.problem.get(name) for name in PROBLEM_COLUMNS},
        "nsa": canonical_json(record.problem.get("nsa", {})),
    }


def _is_stale(record: TrialRecord | WinnerRecord, current_templates: Mapping[str, str] | None) -> bool | None:
    """True if the template changed since; None where it is not known or a library was measured."""
    if current_templates is None or not record.template_digest:
        return None
    return current_templates.get(record.family) != record.template_digest


def _check_names(*, table: str, kind: str, status: str | None) -> None:
    if table not in TABLES:
        raise UnknownName(f"table must be one of {', '.join(TABLES)}", {"table": table})
    if kind not in KINDS:
        raise UnknownName(f"kind must be one of {', '.join(KINDS)}", {"kind": kind})
    if status is not None and status not in STATUSES:
        raise UnknownName(f"status must be one of {', '.join(STATUSES)}", {"status": status})
    if table == "winners" and (kind != "measured" or status is not None):
        raise UnknownName(
            "winners are measured and have no status", {"kind": kind, "status": status}, "Ask the table `trials`."
        )
