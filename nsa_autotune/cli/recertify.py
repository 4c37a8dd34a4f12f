"""`nsa-autotune recertify`: winners of other versions or templates are carried over, or raced again."""

from __future__ import annotations

from typing import Annotated

import typer

from ..cores import usable_cores
from ..errors import InvalidInput
from . import options
from .recertify_run import Run, execute, forecast
from .tune import DEFAULT_TARGET, choose_targets

SEARCH_BUDGET = "quick"


def recertify(
    families: Annotated[
        list[str] | None, typer.Option("--families", help="Kernels to recertify; all of them if none.")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="Of a new search after a real loss: quick, normal, full; or such as 200,5m.")
    ] = SEARCH_BUDGET,
    search: Annotated[bool, typer.Option(help="Search anew where over 3 % is lost; else losses are reported.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile and tell what would carry over; measure and store nothing.")
    ] = False,
    target: Annotated[
        str | None, typer.Option("--target", help=f"With --dry-run: compile for it; without a GPU {DEFAULT_TARGET}.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="With --target: winners of GPUs with this in the name.")] = "",
    db: options.DbOption = None,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that compile; all cores if none.")
    ] = None,
) -> None:
    """Compile winners that other versions or templates made: the same machine code is not measured again."""
    from ..search.budget import parse_budget

    options.check_device(device)
    chosen = tuple(spec.family for spec in options.choose_specs(options.split(families, "--families")))
    goal = next(iter(choose_targets([] if target is None else [target])), None)
    if goal is not None and not dry_run:
        rule = "recertifying measures: without a CUDA device, or with --target, it needs --dry-run"
        remedy = f"Write `nsa-autotune recertify --dry-run --target {goal}` to see what would carry over."
        raise InvalidInput(rule, {"--target": target or f"none, and {device} is no CUDA device here"}, remedy)
    if gpu and goal is None:
        raise InvalidInput("--gpu goes with --target", {"--gpu": gpu}, "A GPU at hand is named by --device.")
    run = Run(chosen, parse_budget(budget) if search else None, db, device, goal, gpu, jobs or usable_cores())
    raise typer.Exit(forecast(run) if dry_run else execute(run))
