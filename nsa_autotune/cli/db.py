"""`nsa-autotune db`: ask the tuning database, and move records in and out of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidInput
from . import db_share, options
from .console import errors, problem_text, there_is
from .rows import FormatOption, LimitOption, OutOption, RowFormat, check_output, give_rows, limit_of
from .templates import current_templates

# `problem` is made here, of the problem's fields, so that a row fits a screen
WINNER_COLUMNS = [
    *("gpu", "family", "problem", "median_us", "p20_us", "p80_us"),
    *("speedup", "library", "library_median_us", "source", "stale"),
]
TRIAL_COLUMNS = [*("gpu", "family", "problem", "status", "median_us", "predicted_us", "stage", "config", "reason")]
PREDICTION_COLUMNS = [
    *("gpu", "family", "problem", "status", "predicted_us", "registers", "shared_bytes", "spill_bytes"),
    *("occupancy", "config", "reason"),
]
# left out where a terminal is narrow, the first one first; never the columns a user names
LESS_IMPORTANT = [
    *("p20_us", "p80_us", "library", "library_median_us", "source", "stage", "config"),
    *("occupancy", "shared_bytes", "spill_bytes", "registers", "predicted_us", "stale", "speedup", "reason", "gpu"),
]
LESS_IMPORTANT_OF_PREDICTIONS = [name for name in LESS_IMPORTANT if name != "predicted_us"]

app = typer.Typer(help="Query, share and tidy the tuning database.", no_args_is_help=True)
db_share.register(app)


class Table(StrEnum):
    """What a query lists."""

    winners = "winners"
    trials = "trials"


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"


class Records(StrEnum):
    """What an export holds."""

    winners = "winners"
    all = "all"


class FileFormat(StrEnum):
    """How an export is written."""

    jsonl = "jsonl"
    t4 = "t4"


@app.command("query")
def query(
    gpu: Annotated[str | None, typer.Option("--gpu", help="A part of the GPU's name.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="One kernel family.")] = None,
    problem: Annotated[
        list[str] | None, typer.Option("--problem", help="A field of the problem, such as seq_k=64k; repeatable.")
    ] = None,
    status: Annotated[str | None, typer.Option("--status", help="ok, or why a trial failed.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="measured or predicted.")] = None,
    table: Annotated[Table | None, typer.Option("--table", help="trials if --status or --kind is given.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="Columns to print, such as family,config.")
    ] = None,
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    limit: LimitOption = None,
    db: options.DbOption = None,
) -> None:
    """List winners or trials, newest first; times are in microseconds."""
    from ..db.database import TuningDatabase
    from ..kernels import get_spec

    if family is not None:
        get_spec(family)
    _check_choices(status, kind)
    check_output(style, out)
    chosen = table or (Table.trials if status or kind else Table.winners)
    fields = problem_filter(options.assignments(problem, "--problem"))
    about: dict[str, Any] = {"gpu": gpu or "", "family": family or "", "problem": fields}
    how: dict[str, Any] = {"status": status, "kind": kind or "measured", "table": chosen.value}
    with TuningDatabase(db, current_templates=current_templates()) as found:
        rows = found.query(**about, **how, limit=limit_of(style, limit))
        if not rows:
            errors().print(there_is(found.counts(**about)), markup=False, soft_wrap=True)
    asked, known = options.split(columns, "--columns"), all_columns(chosen)
    if style is RowFormat.table:
        rows = [{"problem": problem_text(row, row["family"]), **row} for row in rows]
        known = ["problem", *known]
    _check_columns(asked, known)
    wanted = asked or default_columns(chosen, style, kind) or known
    spare = LESS_IMPORTANT_OF_PREDICTIONS if kind == "predicted" else LESS_IMPORTANT
    give_rows(rows, wanted, style, out, title=chosen.value, less_important=() if asked else spare)


@app.command("export")
def export_records(
    path: Annotated[Path, typer.Argument(help="File of JSON lines to write; - is stdout.")],
    records: Annotated[
        Records, typer.Option("--records", help="Winners only, or trials, predictions and designs too.")
    ] = Records.winners,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A part of the GPU's name.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="One kernel family.")] = None,
    style: Annotated[
        FileFormat, typer.Option("--format", help="t4: measured trials for other tools, a file for each problem.")
    ] = FileFormat.jsonl,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    db: options.DbOption = None,
) -> None:
    """Write records as text that can be reviewed and imported elsewhere."""
    from ..db.store import TuningStore

    db_share.check_target(path, style.value, force)
    with TuningStore(db, must_exist=True) as store:
        db_share.check_family(store, family)
        if style is FileFormat.t4:
            db_share.write_t4(store, path, gpu, family, force)
        else:
            db_share.write_jsonl(store, path, records is Records.all, gpu, family)


@app.command("import")
def import_records(
    path: Annotated[Path, typer.Argument(help="File of JSON lines to read.")], db: options.DbOption = None
) -> None:
    """Add the records of a file, all or none; winners tuned here serve on.

    Nothing is added where a record contradicts itself, or where its kernel refuses a winner.
    """
    from ..db.store import TuningStore

    if not path.exists() or path.is_dir():
        raise InvalidInput(
            "the file cannot be read", {"path": str(path)}, "Name a file that `nsa-autotune db export` has written."
        )
    with TuningStore(db) as store:
        summary = store.import_jsonl(path, judge=db_share.judge_of(current_templates()))
    db_share.print_summary(str(path), summary)


@app.command("path")
def print_path(db: options.DbOption = None) -> None:
    """Print where the database lies."""
    from ..db.engine import parse_location
    from ..db.paths import chosen_url

    typer.echo(str(parse_location(chosen_url(db))))


def problem_filter(asked: dict[str, str]) -> dict[str, str]:
    """The fields asked for, with 64k and bf16 as the database writes them."""
    from ..search.presets import parse_seq_lens

    found = {}
    for name, text in asked.items():
        if name == "dtype":
            found[name] = options.DTYPE_ALIASES.get(text.lower(), text)
        elif re.fullmatch(r"\d+[kKmM]", text):
            found[name] = str(parse_seq_lens(text)[0])
        else:
            found[name] = text
    return found


def default_columns(table: Table, style: RowFormat, kind: str | None) -> list[str]:
    """The columns that fit a screen; none means all."""
    if style is not RowFormat.table:
        return []
    if table is Table.winners:
        return WINNER_COLUMNS
    return PREDICTION_COLUMNS if kind == "predicted" else TRIAL_COLUMNS


def all_columns(table: Table) -> list[str]:
    """The names of a row's columns, also where there is no row."""
    from ..db.query import trial_columns, winner_columns
    from ..db.records import TrialRecord, WinnerRecord

    shared: dict[str, Any] = {"fingerprint": {}, "problem": {}, "config": {}}
    shared |= {"family": "", "problem_key": "", "template_digest": ""}
    if table is Table.winners:
        return list(winner_columns(WinnerRecord(**shared, median_us=1.0, p20_us=1.0, p80_us=1.0, samples_us=()), None))
    return list(trial_columns(TrialRecord(**shared, status="ok"), None))


def _check_choices(status: str | None, kind: str | None) -> None:
    from ..db.checks import KINDS, STATUSES
    from ..search.presets import unknown_name

    if status is not None and status not in STATUSES:
        raise unknown_name("status", status, STATUSES)
    if kind is not None and kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)


def _check_columns(asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise InvalidInput("there are no such columns", {"columns": unknown}, f"Columns: {', '.join(known)}.")
