"""`nsa-autotune`: the commands together, and what a mistake looks like to the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import NSAError
from . import bench, codesign, cover, db, db_ask, db_stats, doctor, recertify, render, replay, report, ship, tune
from .console import errors

EXIT_MISTAKE = 2


class PlainGroup(TyperGroup):
    """Commands whose mistakes are told without the words of the library that checks values."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=PlainGroup,
    name="nsa-autotune",
    help="Native Sparse Attention kernels: tune them on the GPU at hand, look at them, query what was measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("tune")(tune.tune)
app.command("recertify")(recertify.recertify)
app.command("render")(render.render)
app.command("bench")(bench.bench)
app.command("codesign")(codesign.codesign)
app.command("cover")(cover.cover)
app.command("doctor")(doctor.doctor)
app.command("replay")(replay.replay)
app.command("report")(report.report)
app.command("ship")(ship.ship)
db.app.command("best")(db_ask.best)
db.app.command("compare")(db_ask.compare)
db.app.command("history")(db_ask.history)
db.app.command("stats")(db_stats.stats)
db.app.command("sql")(db_stats.sql)
db.app.command("studies")(report.studies)
app.add_typer(db.app, name="db")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nsa-autotune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; 0 is success, 2 a mistake of the user's, 130 an interruption."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="nsa-autotune")
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_MISTAKE
    except OSError as error:  # of the output, for instance: files that a user names have sentences of their own
        place = f" ({error.filename})" if error.filename else ""
        errors().print(f"error: the system refused: {error.strerror or error}{place}", style="red", markup=False)
        return EXIT_MISTAKE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
