"""What `nsa-autotune cover` prints: covers and left-out problems as tables or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..spec import Config, canonical_json, digest
from .console import make_table, output, problem_text

if TYPE_CHECKING:
    from ..search.cells import Row, Table
    from ..search.cover import Cover
    from ..search.leave_out import LeftOut, Report


def percent(loss: float | None) -> str:
    """A loss as people read it; nothing where it is not known."""
    if loss is None:
        return ""
    return "fails" if math.isinf(loss) else f"{100 * loss:.1f}%"


def print_covers(covers: Sequence[Cover], style: str, *, details: bool) -> None:
    """A line a family; with `details` also the configs and each problem's loss."""
    if style == "json":
        typer.echo(json.dumps([cover_facts(found) for found in covers], indent=1))
        return
    columns = ("GPU", "versions", "family", "problems", "configs now", "cover", "worst loss", "mean loss", "unknown")
    heads = zip(covers, versions([found.table for found in covers]), strict=True)
    rows = [(*_head(found.table, text), *_sizes(found)) for found, text in heads]
    before, after = sum(found.before for found in covers), sum(len(found.configs) for found in covers)
    title = f"{before} configs become {after} that lose at most {percent(covers[0].bound)} on any tuned problem"
    output().print(make_table(title, columns, rows, columns[3:], ("versions", "mean loss", "GPU")))
    if any(not found.exact for found in covers):
        output().print("cover*: small, not proven to be the smallest", markup=False)
    if any(found.unknown for found in covers):
        text = "unknown: a winner's config was not measured on another problem; `cover --measure` races it there"
        output().print(text, markup=False, soft_wrap=True)
    for found in covers if details else ():
        _print_details(found)


def versions(tables: Sequence[Table]) -> list[str]:
    """For each table the software by which its fingerprint differs from others of the same GPU."""
    seen: dict[tuple[str, str], set[str]] = {}
    for table in tables:
        for name, value in table.fingerprint.items():
            seen.setdefault((table.fingerprint["gpu"], name), set()).add(value)
    found = []
    for table in tables:
        facts = table.fingerprint.items()
        differing = [(name, value) for name, value in facts if len(seen[table.fingerprint["gpu"], name]) > 1]
        found.append(", ".join(f"{name} {value}" for name, value in differing))
    return found


def _head(table: Table, text: str) -> tuple[str, str, str]:
    return table.fingerprint["gpu"], text, table.spec.family


def _sizes(found: Cover) -> tuple[object, ...]:
    size = f"{len(found.configs)}{'' if found.exact else '*'}"
    return len(found.served), found.before, size, percent(found.worst.loss), percent(found.mean), found.unknown


def _print_details(found: Cover) -> None:
    gpu, family = found.table.fingerprint["gpu"], found.table.spec.family
    numbers = {canonical_json(config): index + 1 for index, config in enumerate(found.configs)}
    counts = [sum(served.config == config for served in found.served) for config in found.configs]
    rows = [
        (index + 1, count, config_text(config))
        for index, (config, count) in enumerate(zip(found.configs, counts, strict=True))
    ]
    output().print(make_table(f"{family} on {gpu}: the cover", ("no", "problems", "config"), rows, ("no", "problems")))
    lines = [
        (
            _problem(served.row),
            served.row.winner.median_us,
            numbers[canonical_json(served.config)],
            percent(served.loss),
        )
        for served in found.served
    ]
    columns = ("problem", "winner us", "config no", "loss")
    output().print(make_table("each problem", columns, lines, columns[1:], ("winner us",)))


def config_text(config: Config) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def _problem(row: Row) -> str:
    return problem_text(row.winner.problem, row.winner.family)


def _table_facts(table: Table) -> dict[str, Any]:
    return {
        "family": table.spec.family,
        "fingerprint": table.fingerprint,
        "fingerprint_digest": digest(table.fingerprint),
        "policy": table.policy,
        "template_digest": table.template_digest,
    }


def _finite(loss: float | None) -> float | None:
    return None if loss is None or math.isinf(loss) else loss


def cover_facts(found: Cover) -> dict[str, Any]:
    """A cover ready for JSON; losses are shares of time."""
    return {
        **_table_facts(found.table),
        "bound": found.bound,
        "exact": found.exact,
        "unknown_cells": found.unknown,
        "configs_before": found.before,
        "configs_after": len(found.configs),
        "worst_loss": found.worst.loss,
        "mean_loss": found.mean,
        "configs": list(found.configs),
        "problems": [
            {
                "problem": served.row.winner.problem,
                "problem_key": served.row.winner.problem_key,
                "winner": served.row.winner.config,
                "config": served.config,
                "loss": served.loss,
            }
            for served in found.served
        ],
    }


def print_left_out(reports: Sequence[Report], style: str) -> None:
    """A line a family and kind of leaving out, with the problem that loses most."""
    if style == "json":
        typer.echo(json.dumps([left_out_facts(report) for report in reports], indent=1))
        return
    columns = (
        *("GPU", "versions", "family", "without its"),
        *("known", "unknown", "failing", "mean loss", "p95 loss", "worst loss", "worst problem"),
    )
    heads = zip(reports, versions([report.table for report in reports]), strict=True)
    rows = [(*_head(report.table, text), *_figures(report)) for report, text in heads]
    title = "what a problem loses without its own winner, or its GPU's: the ladder's choice against the winner"
    output().print(make_table(title, columns, rows, columns[4:10], ("versions", "worst problem", "GPU", "failing")))
    if any(left.loss is None for report in reports for left in report.found):
        text = "unknown: the choice was not measured on the problem; `cover --leave-one-out --measure` races it"
        output().print(text, markup=False, soft_wrap=True)


def _figures(report: Report) -> tuple[object, ...]:
    from ..search.leave_out import summarise

    found = summarise(report.found)
    worst = found.worst
    figures = (percent(found.mean), percent(found.p95), percent(worst.loss if worst else None))
    at = _problem(worst.row) if worst else ""
    return (report.without, found.known, found.unknown, found.failing, *figures, at)


def left_out_facts(report: Report) -> dict[str, Any]:
    """A report ready for JSON; losses are shares of time, null where unknown or where the config fails."""
    from ..search.leave_out import summarise

    found = summarise(report.found)
    return {
        **_table_facts(report.table),
        "without": report.without,
        "known": found.known,
        "unknown": found.unknown,
        "failing": found.failing,
        "mean_loss": found.mean,
        "p95_loss": found.p95,
        "worst_loss": found.worst.loss if found.worst else None,
        "worst_problem": found.worst.row.winner.problem if found.worst else None,
        "problems": [_left_facts(left) for left in report.found],
    }


def _left_facts(left: LeftOut) -> dict[str, Any]:
    known = "unknown" if left.loss is None else "fails" if math.isinf(left.loss) else "measured"
    return {
        "problem": left.row.winner.problem,
        "problem_key": left.row.winner.problem_key,
        "winner": left.row.winner.config,
        "choice": left.choice.config,
        "step": left.choice.step.value,
        "tuned_key": left.choice.tuned_key,
        "state": known,
        "loss": _finite(left.loss),
    }
