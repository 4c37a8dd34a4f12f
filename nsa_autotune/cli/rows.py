"""Rows as a table, JSON, CSV or a Parquet file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidInput
from ..plain import visible
from .console import asked_file, count_text, make_table, output, write_text

Row = dict[str, Any]
MAX_CELL_CHARS = 60  # of a reason or config in a table
OBJECTS = ("config", "nsa", "resources")  # columns whose cells are JSON
SAID_ONCE = ("gpu", "base", "other")  # above a table, where all rows have the same
MOST_ROWS = 2**31  # that may be asked for
DEFAULT_LIMIT = 50  # rows of a table; other formats give all


class RowFormat(StrEnum):
    """How rows are given."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


FormatOption = Annotated[RowFormat, typer.Option("--format", help="parquet needs --out.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="A file for JSON, CSV or Parquet; printed without.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, max=MOST_ROWS, help=f"Rows; {DEFAULT_LIMIT} for a table.")
]


def check_output(style: RowFormat, out: Path | None) -> None:
    """Raise InvalidInput before anything is asked if the answer could not be given."""
    if style is RowFormat.parquet and out is None:
        raise InvalidInput("Parquet is written to a file", {"--format": "parquet"}, "Name it: --out rows.parquet.")
    if style is RowFormat.table and out is not None:
        remedy = "Add --format csv, json or parquet."
        raise InvalidInput("a table is printed, not written", {"--out": str(out)}, remedy)
    if style is RowFormat.parquet:
        _pyarrow()


def limit_of(style: RowFormat, limit: int | None) -> int | None:
    """How many rows to ask for."""
    return limit or (DEFAULT_LIMIT if style is RowFormat.table else None)


def give_rows(
    rows: Sequence[Row],
    names: Sequence[str],
    style: RowFormat,
    out: Path | None,
    *,
    title: str,
    less_important: Sequence[str] = (),
) -> None:
    """Print the named columns, or write them to `out` as a whole or not at all."""
    if style is RowFormat.table:
        names, shared = say_once(rows, names) if less_important else (names, "")
        numbers = {name for row in rows for name in names if _is_number(row[name])}
        cells = [[_shorten(row[name]) for name in names] for row in rows]
        # a title would be wrapped to a narrow table
        output().print(f"{title}: {count_text(len(rows), 'row')}{shared}", markup=False, soft_wrap=True)
        output().print(make_table("", names, cells, numbers, less_important))
        return
    if style is RowFormat.parquet:
        assert out is not None, "check_output comes first"
        write_parquet(rows, names, out)
    else:
        text = _json_text(rows, names) if style is RowFormat.json else _csv_text(rows, names)
        if out is None:
            typer.echo(text, nl=False)
            return
        write_text(out, text)
    typer.echo(f"{out}: {count_text(len(rows), 'row')}")


def say_once(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], str]:
    """The names less those of SAID_ONCE that have one value in all rows, and a text that says these."""
    same = {name: str(rows[0][name]) for name in names if name in SAID_ONCE and len({row[name] for row in rows}) == 1}
    return [name for name in names if name not in same], "".join(f", {name} {value}" for name, value in same.items())


def write_parquet(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """A Parquet file with one column a name; InvalidInput if a column mixes texts and numbers."""
    pyarrow, parquet = _pyarrow()
    arrays = []
    for name in names:
        try:
            arrays.append(pyarrow.array([row[name] for row in rows]))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            remedy = "Leave it out, or CAST it to one type."
            raise InvalidInput("a column of a Parquet file has one type", {"column": name}, remedy) from error
    with asked_file(path) as file:
        parquet.write_table(pyarrow.table(arrays, names=list(names)), file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install 'nsa-autotune[parquet]', or take --format csv."
        raise InvalidInput("Parquet needs pyarrow, which is not installed", {}, remedy) from error
    return pyarrow, pyarrow.parquet


def _json_text(rows: Sequence[Row], names: Sequence[str]) -> str:
    return json.dumps([{name: _plain(name, row[name]) for name in names} for row in rows], indent=1) + "\n"


def _plain(name: str, value: Any) -> Any:
    """What a cell says in JSON: an object where other formats have its text."""
    if name not in OBJECTS or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # a column of `db sql` may have the name and hold anything
        return value


def _csv_text(rows: Sequence[Row], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: visible(v) if isinstance(v, str) else v for name, v in row.items()})
    return text.getvalue()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shorten(value: object) -> object:
    if isinstance(value, str) and len(value) > MAX_CELL_CHARS:
        return " ".join(value.split())[: MAX_CELL_CHARS - 3] + "..."
    return value
