"""`nsa-autotune cover`: few configs that serve all tuned problems, and what an untuned problem loses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInput, StoreError
from ..spec import DEFAULT_POLICY, KernelSpec, Problem
from . import options
from .console import errors, problem_text

if TYPE_CHECKING:
    from ..bench.result import TrialResult
    from ..db.store import TuningStore
    from ..search.cells import Missing, Table
    from ..search.cover import Cover
    from ..search.leave_out import Report

EXIT_INTERRUPTED = 130
USUAL_LOSS = "3%"


class Format(StrEnum):
    """How a report is printed."""

    table = "table"
    json = "json"


def cover(
    family: Annotated[list[str] | None, typer.Option("--family", help="One or more kernel families.")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="A part of the GPU's name.")] = "",
    loss: Annotated[str, typer.Option("--loss", help="What a problem may lose at most, such as 3%.")] = USUAL_LOSS,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Report what each tuned problem would lose without its winner.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Race what was never measured on this GPU first.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Store the configs of the cover as winners.")] = False,
    policy: Annotated[str, typer.Option("--policy", help="How times were taken.")] = DEFAULT_POLICY,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
    style: Annotated[Format, typer.Option("--format")] = Format.table,
    db: options.DbOption = None,
) -> None:
    """Choose few configs that serve every tuned problem within a bound, from what was measured."""
    from ..db.store import TuningStore
    from ..search.cover import choose_cover
    from ..search.cross import load_tables
    from . import cover_report as report

    bound = parse_loss(loss)
    check_modes(leave_one_out, measure, apply, policy)
    options.check_device(device)
    specs = options.choose_specs(options.split(family, "--family"))
    with TuningStore(db, must_exist=True) as store:
        if store.read_only and (measure or apply):
            remedy = "Name another database with --db."
            raise StoreError("the database is read-only", {"database": str(store.location)}, remedy)
        if measure and not measure_here(store, specs, gpu, device, leave_one_out):
            raise typer.Exit(EXIT_INTERRUPTED)
        tables = load_tables(store, specs, gpu=gpu, policy=policy)
        check_found(tables, gpu, policy)
        if leave_one_out:
            report.print_left_out(left_out_reports(store, tables), style.value)
            return
        covers = [choose_cover(table, bound) for table in tables]
        report.print_covers(covers, style.value, details=bool(family))
        if apply:
            apply_covers(store, covers)


def parse_loss(text: str) -> float:
    """A share of time, written `3%` or `0.03`; from 0 to below 100%."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else math.nan
    if not 0 <= value < 1:
        rule = "--loss is a percentage from 0% to below 100%, or a share below 1"
        raise InvalidInput(rule, {"--loss": text}, "Write for example --loss 3% or --loss 0.03.")
    return value


def check_modes(leave_one_out: bool, measure: bool, apply: bool, policy: str) -> None:
    """Raise InvalidInput for options that exclude each other."""
    if leave_one_out and apply:
        raise InvalidInput("--leave-one-out reports and has nothing to apply", {}, "Leave one of the two out.")
    if measure and policy != DEFAULT_POLICY:
        raise InvalidInput(
            "--measure takes times in one way only",
            {"--policy": policy},
            f"Leave --measure out, or measure with --policy {DEFAULT_POLICY}.",
        )


def check_found(tables: Sequence[Table], gpu: str, policy: str) -> None:
    """Raise InvalidInput where nothing is tuned."""
    if not tables:
        values = {"--gpu": gpu, "--policy": policy}
        raise InvalidInput("no problem is tuned with the templates as they are", values, "Run: nsa-autotune tune")


def measure_here(store: TuningStore, specs: Iterable[KernelSpec], gpu: str, device: str, leave_one_out: bool) -> bool:
    """Race what is not known on the GPU at hand; False after Ctrl-C, with everything measured kept."""
    from ..bench.worker import MeasureWorker
    from ..dispatch.fingerprint import current
    from ..search.cross import measure_missing, table_here

    try:
        fingerprint = current(device).to_dict()
    except InvalidInput as error:
        remedy = "Leave --measure out."
        raise InvalidInput("--measure races on a CUDA GPU, and there is none", {"--device": device}, remedy) from error
    if gpu.lower() not in fingerprint["gpu"].lower():
        remedy = "Leave --measure out, or name this GPU."
        raise InvalidInput("only the GPU at hand is measured", {"--gpu": gpu, device: fingerprint["gpu"]}, remedy)
    tables = [table_here(store, spec, fingerprint) for spec in specs]
    if not any(table.rows for table in tables):
        raise InvalidInput("no problem is tuned on this GPU", {device: fingerprint["gpu"]}, "Run: nsa-autotune tune")
    try:
        with MeasureWorker(device) as worker:
            for table in tables:
                missing = missing_choices(store, table) if leave_one_out else missing_cells_of(table)
                if missing:
                    say(f"{table.spec.family}: {len(missing)} times are not known yet")
                measure_missing(table, missing, racer=worker, store=store, tell=tell_race)
    except KeyboardInterrupt:
        say(f"stopped; everything measured is kept in {store.location}; the same command resumes")
        return False
    return True


def missing_cells_of(table: Table) -> list[Missing]:
    """Each winner's config on each other problem."""
    from ..search.cells import missing_cells

    return missing_cells(table)


def missing_choices(store: TuningStore, table: Table) -> list[Missing]:
    """The configs that would serve a problem without its winners."""
    from ..search.leave_out import unknown_choices

    return [cell for report in left_out_reports(store, [table]) for cell in unknown_choices(report.found)]


def left_out_reports(store: TuningStore, tables: Sequence[Table]) -> list[Report]:
    """For each table what is lost without each problem's winners, and without the GPU's."""
    from ..search.leave_out import reports

    winners = {table.spec.family: store.winners(family=table.spec.family) for table in tables}
    return [report for table in tables for report in reports(table, winners[table.spec.family])]


def apply_covers(store: TuningStore, covers: Iterable[Cover]) -> None:
    """Store the covers and say how many winners changed."""
    from ..search.cross import apply_cover

    counts = [apply_cover(store, found) for found in covers]
    changed, kept = sum(count[0] for count in counts), sum(count[1] for count in counts)
    say(f"{changed} winners gave way to a config of the cover; their times are kept as trials")
    if kept:
        say(f"{kept} kept their own, since the samples of the other are not stored: --measure takes them")


def tell_race(spec: KernelSpec, problem: Problem, results: Sequence[TrialResult]) -> None:
    """One line a race."""
    failed = sum(not result.ok for result in results)
    text = f"    {problem_text(problem.to_dict(), spec.family)}: {len(results)} configs raced"
    say(text + (f", {failed} failed" if failed else ""))


def say(text: str) -> None:
    """A line on stderr."""
    errors().print(text, markup=False, soft_wrap=True)
