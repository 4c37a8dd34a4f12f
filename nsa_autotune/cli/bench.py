"""`nsa-autotune bench`: every kernel and the whole forward, beside dense attention by cuDNN and FlashAttention-2."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInput
from ..spec import Problem
from . import options
from .console import errors, output, write_text

if TYPE_CHECKING:
    from .bench_entries import Work
    from .bench_report import Report

PRESET = "gqa16-d128"
LOCALITIES = ("0", "0.8")
ROUNDS = 20
EXIT_FAILED = 1


def bench(
    ctx: typer.Context,
    preset: options.PresetOption = None,
    seq: options.SeqOption = "",
    dtype: options.DtypeOption = None,
    locality: options.LocalityOption = None,
    batch: options.BatchOption = None,
    heads: options.HeadsOption = None,
    kv_heads: options.KvHeadsOption = None,
    d_qk: options.DqkOption = None,
    d_v: options.DvOption = None,
    nsa: options.NsaOption = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="Default configs only, whatever is tuned.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Most samples of a line.")] = ROUNDS,
    out: Annotated[Path | None, typer.Option("--out", help="Write everything, samples too, as JSON.")] = None,
    db: options.DbOption = None,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
) -> None:
    """Measure every kernel and the whole forward beside dense attention: ms, TFLOP/s, GB/s, share of the roofline."""
    choice = options.ProblemChoice(
        preset=preset,
        seq=seq,
        dtypes=tuple(options.split(dtype)),
        localities=tuple(options.split(locality)) or LOCALITIES,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        d_qk=d_qk,
        d_v=d_v,
        nsa=options.assignments(nsa, "--nsa"),
    )
    check_folder(out)
    plan = plan_work(choice.problems(PRESET))

    from .bench_run import run

    report = run(
        plan,
        device=device,
        db=db,
        untuned=untuned,
        rounds=rounds,
        command=command_text(ctx),
        say=say,
    )
    show(report)
    if out is not None:
        write_text(out, json_text(report))
    if any(row.failed for row in report.rows):
        raise typer.Exit(EXIT_FAILED)


def say(text: str) -> None:
    """A line of progress."""
    errors().print(text, style="dim", markup=False, soft_wrap=True)


def show(report: Report) -> None:
    """Print the tables and how to read them; what was not measured goes to stderr."""
    from .bench_report import NOTES, reasons, tables

    for table in tables(report):
        output().print(table)
    for note in NOTES:
        output().print(note, markup=False, soft_wrap=True)
    for reason in reasons(report):
        errors().print(f"not measured: {reason}", style="yellow", markup=False, soft_wrap=True)


def json_text(report: Report) -> str:
    """The report as it is written to files."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"


def plan_work(problems: Iterable[Problem]) -> list[Work]:
    """Problems that differ in locality only are one piece of work."""
    from .bench_entries import Work

    localities: dict[Problem, list[float]] = {}
    for problem in problems:
        localities.setdefault(problem.replace(locality=0.0), []).append(problem.locality)
    return [Work(problem, tuple(dict.fromkeys(found))) for problem, found in localities.items()]


def check_folder(path: Path | None) -> None:
    """A minute of measuring must not end at a folder that is not there."""
    if path is not None and not path.parent.is_dir():
        raise InvalidInput("the file cannot be written", {"path": str(path)}, "Name a file in an existing folder.")


def command_text(ctx: typer.Context) -> str:
    """The command line as it was given, without what was left to its default."""
    words = ctx.command_path.split()
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name) if param.name else None
        if source is None or source.name != "COMMANDLINE":
            continue
        value = ctx.params[str(param.name)]
        if isinstance(value, bool):
            words.append(param.opts[0])
            continue
        for part in value if isinstance(value, list | tuple) else [value]:
            words += [param.opts[0], str(part)]
    return shlex.join(words)
