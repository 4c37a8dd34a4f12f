"""`nsa-autotune db merge`, `prune` and `verify`: what others measured, what nobody needs, what may be trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInput, NSAError
from . import options
from .console import count_text, make_table, output, problem_text
from .templates import current_templates

if TYPE_CHECKING:
    from ..db.merge import ImportSummary
    from ..db.prune import Pruned
    from ..db.records import WinnerRecord
    from ..db.store import TuningStore

EXIT_FINDINGS = 1
MAX_PRINTED = 20  # conflicts or findings
UNITS_H = {"h": 1, "d": 24, "w": 168}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("merge")(merge)
    app.command("prune")(prune)
    app.command("verify")(verify)


def merge(
    other: Annotated[str, typer.Argument(help="A SQLite file, a database URL, or a file of JSON lines.")],
    own: Annotated[
        bool, typer.Option("--own", help="It is yours: its local winners count as local, not as imported.")
    ] = False,
    db: options.DbOption = None,
) -> None:
    """Add what another database measured, all or nothing; the order of merges does not matter.

    Of two winners for one problem, GPU and template the local one serves, then the confirmed one, then the newer one;
    the samples of both stay as trials. The other database is only read.
    """
    from ..db.foreign import open_foreign
    from ..db.store import TuningStore

    source, judge = None if own else "imported", judge_of(current_templates())
    with TuningStore(db) as store:
        if "://" not in other and other.endswith((".jsonl", ".json")):
            summary = store.merge(_existing(other), source=source, judge=judge)
        else:
            url = other if "://" in other else f"sqlite:///{_existing(other).absolute()}"
            with open_foreign(url) as theirs:
                summary = store.merge(theirs, source=source, judge=judge)
    print_summary(other, summary)


def prune(
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="An age such as 90d, 12h or 8w, or a date such as 2026-01-31.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Measured with another template than the present one.")
    ] = False,
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Failures; crashes and hangs of present templates stay: they keep configs out."),
    ] = False,
    predicted: Annotated[
        bool, typer.Option("--predicted", help="Predictions in the place of measurements; needs a condition beside it.")
    ] = False,
    family: Annotated[str | None, typer.Option("--family", help="One kernel family.")] = None,
    template: Annotated[str | None, typer.Option("--template", help="The digest of a template.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A part of the GPU's name.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", help="The digest of a GPU with its software.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only.")] = False,
    db: options.DbOption = None,
) -> None:
    """Delete trials for which every condition holds; winners and what they rest on always stay."""
    from ..db import prune as pruning
    from ..db.store import TuningStore

    before = None if older_than is None else parse_age(older_than, datetime.now(UTC))
    asked = pruning.Pruning(before, stale, failed, predicted, family, template, gpu, fingerprint)
    with TuningStore(db, must_exist=True) as store:
        found = pruning.prune(store, asked, current_templates(), dry_run=dry_run)
    _print_pruned(found, dry_run)


def verify(db: options.DbOption = None) -> None:
    """Check pages, references, digests and every field; exit code 1 if anything is not as it should be."""
    from ..db.store import TuningStore
    from ..db.verify import verify as findings_of

    with TuningStore(db, import_shipped=False, read_only=True, must_exist=True) as store:
        findings = list(findings_of(store, judge_of(current_templates())))
        place = str(store.location)
    if not findings:
        typer.echo(f"{place}: every row, reference and shipped file is as it should be")
        return
    rows = [(finding.where, finding.fault) for finding in findings[:MAX_PRINTED]]
    output().print(make_table(f"{place}: {count_text(len(findings), 'finding')}", ["where", "what"], rows))
    raise typer.Exit(EXIT_FINDINGS)


def print_summary(name: str, summary: ImportSummary) -> None:
    """What an import or merge brought, and for each conflict which winner serves."""
    output().print(f"{name}: {summary_text(summary)}", markup=False, soft_wrap=True)
    if not summary.conflicts:
        return
    rows = [
        (
            c.gpu,
            c.family,
            problem_text(c.problem, c.family),
            f"{c.here_us:.4g}",
            f"{c.came_us:.4g}",
            "came" if c.came_serves else "here",
        )
        for c in summary.conflicts[:MAX_PRINTED]
    ]
    columns = ["gpu", "family", "problem", "here us", "came us", "serves"]
    title = f"two winners for one problem: {len(summary.conflicts)}; both measurements are kept"
    output().print(make_table(title, columns, rows, ["here us", "came us"], ["gpu"]))


def summary_text(summary: ImportSummary) -> str:
    """What was read, and what of it is new here, in words."""
    if summary.is_empty:
        return "holds no record; nothing was added"
    known = summary.winners - summary.new - summary.replaced - summary.kept
    read = {
        "trial": (summary.trials, summary.new_trials),
        "design": (summary.designs, summary.new_designs),
        "winner": (summary.winners, summary.new),
    }
    parts = [f"{count_text(count, what)} read, {new} new" for what, (count, new) in read.items()]
    parts += [f"{summary.replaced} of them replace the one that served here"] if summary.replaced else []
    parts += [f"{summary.kept} of them do not serve, for the one here goes first"] if summary.kept else []
    parts += [f"{known} of them were here already"] if known else []
    shipped = count_text(summary.shipped, "shipped winner")
    parts += [f"{shipped} left out, for each copy of the program brings its own"] if summary.shipped else []
    return "; ".join(parts)


def check_target(path: Path, style: str, force: bool) -> None:
    """Raise InvalidInput before anything is read if an export cannot be written to `path`."""
    if str(path) == "-":
        if style != "jsonl":
            raise InvalidInput("T4 is written to files", {"path": "-"}, "Name one: t4.json.")
        return
    if not path.parent.is_dir():
        raise InvalidInput("the folder of the file is missing", {"folder": str(path.parent)}, "Make it first.")
    if path.is_dir():
        raise InvalidInput("an export is a file", {"path": str(path)}, "Name a file in this folder.")
    if path.exists() and not path.is_file():
        raise InvalidInput("an export is a regular file", {"path": str(path)}, "Name one, or - for standard output.")
    if path.exists() and not force:
        remedy = "Add --force to overwrite it, or name another file."
        raise InvalidInput("the file is there already", {"path": str(path)}, remedy)


def check_family(store: TuningStore, family: str | None) -> None:
    """Raise UnknownName for a family that neither the database nor this program has."""
    from ..db import names
    from ..kernels import all_specs

    if family is not None:
        with store.reading() as session:
            names.check_family(session, family, all_specs())


def write_jsonl(store: TuningStore, path: Path, everything: bool, gpu: str | None, family: str | None) -> None:
    """Write winners, or everything, as JSON lines to a file, or to stdout for `-`."""
    from ..db.exchange import RECORD_TYPES, format_lines
    from ..db.export import select_records

    kinds = tuple(RECORD_TYPES) if everything else ("winner",)
    if str(path) != "-":
        count = store.export_jsonl(path, records=kinds, gpu=gpu, family=family)
        typer.echo(f"{path}: {count_text(count, 'record')}")
        return
    with store.reading() as session:
        found = select_records(session, kinds, gpu, family)
    typer.echo(format_lines(found), nl=False)


def write_t4(store: TuningStore, path: Path, gpu: str | None, family: str | None, force: bool) -> None:
    """Write measured trials in the T4 format and name the files."""
    from ..db.export import measured_trials
    from ..db.t4 import export_t4

    with store.reading() as session:
        trials = measured_trials(session, gpu, family, "template")
    for written in export_t4(trials, path, overwrite=force):
        typer.echo(str(written))


def parse_age(text: str, now: datetime) -> str:
    """The time, ISO 8601 in UTC, that lies an age such as 90d before `now`, or the beginning of a date."""
    match = re.fullmatch(r"(\d{1,4})([hdw])", text)
    if match is not None:
        moment = now - timedelta(hours=int(match[1]) * UNITS_H[match[2]])
        return moment.isoformat(timespec="microseconds")
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).isoformat(timespec="microseconds")
    except ValueError as error:
        raise InvalidInput(
            "an age is a number of h, d or w, or a date", {"--older-than": text}, "Write 90d."
        ) from error


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InvalidInput(
            "there is no such file",
            {"path": name},
            "Name a SQLite file, an export, or a URL such as sqlite:///x.sqlite.",
        )
    return path


def judge_of(current: Mapping[str, str]) -> Callable[[WinnerRecord], str]:
    """What tells why a kernel of this program would not take a winner."""
    from ..kernels import all_specs
    from ..spec import Problem

    specs = all_specs()

    def judge(winner: WinnerRecord) -> str:
        """What the spec says against a winner of the present template; older ones are stale and not served."""
        if current.get(winner.family) != winner.template_digest:
            return ""
        spec, problem = specs[winner.family], Problem.from_dict(winner.problem)
        try:
            spec.check_problem(problem)
            spec.check_config(problem, winner.config)
        except NSAError as error:
            return str(error)
        right = spec.problem_key(problem) == winner.problem_key
        return "" if right else f"the problem's key is {spec.problem_key(problem)}"

    return judge


def _print_pruned(found: Pruned, dry_run: bool) -> None:
    rows = [(family, status, count) for (family, status), count in found.trials.items()]
    gone = "is gone" if found.total == 1 else "are gone"
    verb = "would go" if dry_run else gone
    if rows:
        output().print(make_table(f"trials that {verb}", ["family", "status", "trials"], rows, ["trials"]))
    text = f"{count_text(found.total, 'trial')} {verb}"
    if found.kept:
        text += (
            f"; {found.kept} more meet the conditions and stay: trials of winners' configs, their races and baselines"
        )
    typer.echo(text)
