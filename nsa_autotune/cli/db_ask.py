"""`nsa-autotune db best`, `compare` and `history`: what serves, beside what, and since when."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput
from . import options
from .console import errors, problem_text, there_is
from .db import Table, all_columns, problem_filter
from .rows import FormatOption, LimitOption, OutOption, Row, RowFormat, check_output, give_rows, limit_of
from .templates import current_templates

if TYPE_CHECKING:
    from ..db.database import TuningDatabase
    from ..db.history import Between

GpuOption = Annotated[str, typer.Option("--gpu", help="A part of the GPU's name.")]
FamilyOption = Annotated[str, typer.Option("--family", help="One kernel family.")]
ProblemOption = Annotated[
    list[str] | None, typer.Option("--problem", help="A field of the problem, such as seq_k=64k; repeatable.")
]
PolicyOption = Annotated[str, typer.Option("--policy", help="How times were taken, such as graph-cold.")]
BetweenOption = Annotated[
    str | None, typer.Option("--between", help="Two values of a version, such as triton=3.6.0..3.9.0.")
]
# of a table; the other formats give all columns
BEST_COLUMNS = [
    *("gpu", "family", "problem", "median_us", "p20_us", "p80_us", "samples", "verdict", "tied", "speedup"),
    *("stale", "created", "driver", "torch", "triton", "config"),
]
BY_LENGTH_COLUMNS = [
    *("gpu", "family", "problem", "median_us", "p20_us", "p80_us", "samples", "verdict", "growth", "config_change"),
    *("created", "triton"),
]
COMPARE_COLUMNS = [
    *("gpu", "family", "problem", "base", "other", "ratio", "ratio_low", "ratio_high", "clear"),
    *("base_median_us", "base_samples", "base_verdict", "base_created"),
    *("other_median_us", "other_samples", "other_verdict", "other_created"),
]
HISTORY_COLUMNS = [
    *("gpu", "family", "problem", "created", "median_us", "p20_us", "p80_us", "samples", "verdict"),
    *("ratio", "clear", "changed"),
]
LESS_IMPORTANT = [
    *("config", "driver", "torch", "p20_us", "p80_us", "ratio_low", "ratio_high", "base_verdict", "other_verdict"),
    *("base_samples", "other_samples", "base_created", "other_created", "tied", "triton", "samples"),
    *("stale", "verdict", "clear", "config_change", "changed", "base_median_us", "other_median_us", "speedup"),
    *("growth", "ratio", "gpu"),  # a row is about a GPU, a family and a problem
]
DATE_CHARS = 10
DEFAULT_LOSS = "3%"


class By(StrEnum):
    """What winners are ordered by."""

    seq = "seq"


def best(
    gpu: GpuOption = "",
    family: FamilyOption = "",
    problem: ProblemOption = None,
    policy: PolicyOption = "",
    by: Annotated[By | None, typer.Option("--by", help="seq: how winners change with sequence length.")] = None,
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    limit: LimitOption = None,
    db: options.DbOption = None,
) -> None:
    """The winner of each problem on each GPU, with the evidence behind it; times in microseconds."""
    from ..db.best import GROWTH

    about = about_of(gpu, family, problem, policy)
    most = limit_of(style, limit)
    rows = answer(db, style, out, about, lambda found: found.best(**about, by=by and by.value, limit=most))
    columns = BEST_COLUMNS if by is None else BY_LENGTH_COLUMNS
    known = [*all_columns(Table.winners), "rivals", *(() if by is None else GROWTH)]
    show(rows, columns, known, style, out, "best")


def compare(
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", help="A part of a GPU's name; two or more put them side by side.")
    ] = None,
    between: BetweenOption = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", help="Parameters, such as num_warps=4,swap=true; give it twice.")
    ] = None,
    family: FamilyOption = "",
    problem: ProblemOption = None,
    policy: PolicyOption = "",
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    limit: LimitOption = None,
    db: options.DbOption = None,
) -> None:
    """GPUs, versions or configs side by side, problem by problem; ratio: how many times as long `other` takes.

    Without --between and --config the winners of the GPUs named are compared, or of all GPUs. `clear` says that the
    spreads do not overlap.
    """
    from ..db.compare import compare_columns

    gpus = options.split(gpu, "--gpu")
    one_gpu = bool(between or config)
    if one_gpu and len(gpus) > 1:
        remedy = "Name one GPU, or leave --between and --config out."
        raise InvalidInput("one thing is compared at a time", {"--gpu": gpus}, remedy)
    about = about_of(gpus[0] if one_gpu and gpus else "", family, problem, policy)
    how: dict[str, Any] = {"gpus": () if one_gpu else gpus, "between": between_of(between)}
    how["configs"] = [options.assignments([text], "--config") for text in config or ()]
    rows = answer(db, style, out, about, lambda found: found.compare(**how, **about, limit=limit_of(style, limit)))
    columns = COMPARE_COLUMNS if one_gpu else [name for name in COMPARE_COLUMNS if name != "gpu"]
    show(rows, columns, compare_columns(of_gpus=not one_gpu), style, out, "compare")


def history(
    gpu: GpuOption = "",
    family: FamilyOption = "",
    problem: ProblemOption = None,
    policy: PolicyOption = "",
    regressions: Annotated[
        bool, typer.Option("--regressions", help="Only what takes longer than before, the greatest loss first.")
    ] = False,
    between: BetweenOption = None,
    loss: Annotated[str, typer.Option("--loss", help=f"What counts as a regression; {DEFAULT_LOSS}.")] = "",
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    limit: LimitOption = None,
    db: options.DbOption = None,
) -> None:
    """How winners changed with driver, torch, Triton, assembler, template and tool; newest first.

    ratio: the time over that of the one before. A winner that a later one replaced is known by its final race.
    """
    from ..db.history import history_columns

    if not regressions and (between or loss):
        remedy = "Add --regressions, or ask `db compare --between`."
        raise InvalidInput("--between and --loss are of regressions", {}, remedy)
    about, pair, share = about_of(gpu, family, problem, policy), between_of(between), share_of(loss or DEFAULT_LOSS)
    most = limit_of(style, limit)
    rows = answer(
        db,
        style,
        out,
        None if regressions else about,
        lambda found: (
            found.regressions(**about, loss=share, between=pair, limit=most)
            if regressions
            else found.history(**about, limit=most)
        ),
    )
    columns = HISTORY_COLUMNS
    if regressions:
        columns = ["before_median_us" if name == "verdict" else name for name in columns]
    show(rows, columns, history_columns(), style, out, "regressions" if regressions else "history")


def about_of(gpu: str, family: str, problem: Sequence[str] | None, policy: str) -> dict[str, Any]:
    """The filters of a question; UnknownName for a family or policy nobody has heard of."""
    from ..bench.policy import get_policy
    from ..kernels import get_spec

    if family:
        get_spec(family)
    if policy:
        get_policy(policy)
    asked = problem_filter(options.assignments(problem, "--problem"))
    return {"gpu": gpu, "family": family, "problem": asked, "policy": policy}


def between_of(text: str | None) -> Between | None:
    """`triton=3.6.0..3.9.0` as name, old and new value; `tool` and `template` are short for the columns' names."""
    if text is None:
        return None
    found = re.fullmatch(r"(\w+)=(.+?)\.\.(.+)", text)
    if found is None:
        remedy = "Write for example --between triton=3.6.0..3.9.0."
        raise InvalidInput("--between takes VERSION=OLD..NEW", {"--between": text}, remedy)
    name, old, new = found.groups()
    return {"tool": "tool_version", "template": "template_digest"}.get(name, name), old.strip(), new.strip()


def share_of(text: str) -> float:
    """`3%` or `0.03` as a number."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if found is None:
        raise InvalidInput("--loss is a share", {"--loss": text}, "Write for example --loss 3%.")
    return float(found[1]) / (100 if found[2] else 1)


def answer(
    db: str | None,
    style: RowFormat,
    out: Any,
    about: Mapping[str, Any] | None,
    question: Callable[[TuningDatabase], list[Row]],
) -> list[Row]:
    """Ask the database, once it is sure that the answer can be given; say what there is if it is empty.

    Without `about` an empty answer says enough.
    """
    from ..db.database import TuningDatabase

    check_output(style, out)
    with TuningDatabase(db, current_templates=current_templates()) as found:
        rows = question(found)
        if not rows and about is not None:
            errors().print(there_is(found.counts(**about)), markup=False, soft_wrap=True)
        return rows


def show(
    rows: Sequence[Row], columns: Sequence[str], known: Sequence[str], style: RowFormat, out: Any, title: str
) -> None:
    """All `known` columns, or in a table `columns`, with the problem on one line and dates without the time of day."""
    if style is not RowFormat.table:
        give_rows(rows, known, style, out, title=title)
        return
    short = [{**row, "problem": problem_text(row, row["family"]), **_dates(row), **_sides(row)} for row in rows]
    give_rows(short, columns, style, out, title=title, less_important=LESS_IMPORTANT)


def _dates(row: Mapping[str, Any]) -> Row:
    return {name: str(value)[:DATE_CHARS] for name, value in row.items() if value and name.endswith("created")}


def _sides(row: Mapping[str, Any]) -> Row:
    """The names of what is compared, with spaces where a long config may be broken."""
    return {name: str(row[name]).replace(",", ", ") for name in ("base", "other") if name in row}
