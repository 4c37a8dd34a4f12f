"""`nsa-autotune report` and `db studies`: what a browser and optuna-dashboard show of the database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidInput
from . import options
from .console import count_text


def report(
    out: Annotated[Path, typer.Option("--out", help="Folder to write index.html into; it is made if need be.")],
    bench: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="A benchmark's JSON file, for speed-ups over dense; repeatable."),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="A part of the GPU's name; all GPUs if not given.")] = "",
    db: options.DbOption = None,
) -> None:
    """Write one HTML page about the database that needs no network: plots, tables, filters."""
    from ..db.store import TuningStore
    from ..report.build import build_report
    from ..report.page import render_page, write_page

    if out.exists() and not out.is_dir():
        raise InvalidInput("--out is a folder", {"--out": str(out)}, "Name a folder; index.html is written into it.")
    with TuningStore(db, must_exist=True) as store:
        found = build_report(store, gpu=gpu, benches=tuple(bench or ()))
    page = write_page(out, render_page(found))
    counts = ", ".join(
        (
            count_text(len(found.winners), "winner"),
            count_text(len(found.searches), "search", "searches"),
            count_text(len(found.speedups), "speed-up"),
        )
    )
    typer.echo(f"{page}: {counts}, {page.stat().st_size / 1024:.0f} KiB")


def studies(
    path: Annotated[Path, typer.Argument(help="SQLite file to write; it must not exist.")],
    gpu: Annotated[str | None, typer.Option("--gpu", help="A part of the GPU's name.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="One kernel family.")] = None,
    db: options.DbOption = None,
) -> None:
    """Copy stored trials as Optuna studies, one a problem, into a file that optuna-dashboard opens."""
    from ..db.export import measured_trials
    from ..db.store import TuningStore
    from ..kernels import get_spec
    from ..search.mirror import group_trials, write_studies

    if family is not None:
        get_spec(family)
    with TuningStore(db, must_exist=True) as store, store.reading() as session:
        groups = group_trials(measured_trials(session, gpu, family))
    written = write_studies(path, groups)
    trials = count_text(sum(study.num_trials for study in written), "trial")
    typer.echo(f"{path}: {count_text(len(written), 'study', 'studies')}, {trials}")
    typer.echo(f"look at them: optuna-dashboard sqlite:///{path}")
