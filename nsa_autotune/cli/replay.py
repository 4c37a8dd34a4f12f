"""`nsa-autotune replay`: compare samplers, seeds and budgets on recorded spaces, and judge the cost model by them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput
from . import options
from .console import errors, make_table, output, problem_text
from .db import Format

if TYPE_CHECKING:
    from ..db.records import TrialRecord
    from ..search.judge import Judgement
    from ..search.recorded import RecordedSpace
    from ..search.replay import Replayed

RECORD = "Record one on a GPU: nsa-autotune tune --budget full, then nsa-autotune db export --records all FILE.jsonl."
LESS_IMPORTANT = ("failed", "minutes", "runs", "configs", "gpu", "model", "best us")

Row = dict[str, Any]


def replay(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Exports with trials (or .gz); the database if none.")
    ] = None,
    families: Annotated[list[str] | None, typer.Option("--families", help="Kernels to replay; all if none.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A part of the GPU's name.")] = None,
    budgets: Annotated[
        list[str] | None, typer.Option("--budgets", help="As of `tune`, or shares of the recorded configs: quick,25%.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", help="tune, tune+model, random; all of them if none.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Searches of a kind, each with its seed.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="The first seed.")] = 0,
    style: Annotated[Format, typer.Option("--format", help="table or json.")] = Format.table,
    db: options.DbOption = None,
) -> None:
    """Search recorded spaces again, without a GPU: what each way of searching loses to the best recorded config."""
    from ..search.judge import judge_all
    from ..search.replay import METHODS, replay_all

    if style is Format.csv:
        raise InvalidInput("replay prints a table or JSON", {"--format": style.value}, "Take --format json.")
    chosen = options.split(methods, "--methods") or list(METHODS)
    limits = options.split(budgets, "--budgets") or ["quick", "25%"]
    _check(chosen, limits)
    spaces = load_spaces(files or [], db, options.split(families, "--families"), gpu)
    runs: list[tuple[RecordedSpace, Replayed]] = []
    with errors().status("replaying") as status:
        judged = judge_all(spaces)
        for space, run in replay_all(spaces, chosen, limits, range(seed, seed + repeats)):
            runs.append((space, run))
            status.update(f"{run.family} {run.method} {run.budget}: {len(runs)} searches")
    report = make_report(spaces, judged, runs)
    if style is Format.json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(report)


def load_spaces(files: Sequence[Path], db: str | None, families: Sequence[str], gpu: str | None) -> list[RecordedSpace]:
    """The spaces that can be replayed; InvalidInput if there are none. What cannot be is told on stderr."""
    from ..kernels import all_specs
    from ..search.recorded import spaces_of

    specs = {spec.family: spec for spec in options.choose_specs(families)} if families else all_specs()
    records = [r for r in _records(files, db) if gpu is None or gpu.lower() in r.fingerprint["gpu"].lower()]
    spaces, refused = spaces_of(records, specs)
    for sentence in refused:
        errors().print(f"left out: {sentence}", style="yellow", markup=False, soft_wrap=True)
    if not spaces:
        raise InvalidInput("there is no recorded space to replay", {"trials": len(records)}, RECORD)
    return spaces


def _records(files: Sequence[Path], db: str | None) -> Iterable[TrialRecord]:
    from ..db.exchange import parse_lines
    from ..db.records import TrialRecord
    from ..db.store import TuningStore

    if not files:
        with TuningStore(db, must_exist=True) as store:
            return store.trials(provider="template")
    if db is not None:
        raise InvalidInput("records come from files or from a database", {"--db": db}, "Leave one of the two out.")
    found: list[TrialRecord] = []
    for path in files:
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error) as error:  # gzip's own errors are OSErrors
            values = {"path": str(path), "reason": getattr(error, "strerror", None) or str(error)}
            raise InvalidInput("the file cannot be read", values) from error
        found += [record for record in parse_lines(content, str(path)) if isinstance(record, TrialRecord)]
    return found


def _check(methods: Sequence[str], budgets: Sequence[str]) -> None:
    from ..search.presets import unknown_name
    from ..search.replay import METHODS, parse_replay_budget

    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    for budget in budgets:
        parse_replay_budget(budget, 1)


def make_report(
    spaces: Sequence[RecordedSpace],
    judged: Sequence[Judgement | None],
    runs: Sequence[tuple[RecordedSpace, Replayed]],
) -> dict[str, list[Row]]:
    """Everything as plain values: the searches of each space, the model of each, and both over all spaces."""
    from ..search.judge import geometric_loss

    searches: list[Row] = []
    for space in spaces:
        own = [run for searched, run in runs if searched is space]
        searches += [{**_name(space), **row} for row in _by_kind(own)]
    known = [judgement for judgement in judged if judgement is not None]
    overall = {
        "spaces": len(known),
        "near_best_in_first_16": sum(judgement.best_in_first_16 for judgement in known),
        "geomean_loss_of_first": geometric_loss(known) if known else None,
    }
    return {
        "searches": searches,
        "over_all_spaces": _by_kind([run for _, run in runs]),
        "model": [{**_name(s), **asdict(j)} for s, j in zip(spaces, judged, strict=True) if j is not None],
        "model_over_all_spaces": [overall],
    }


def _by_kind(runs: Sequence[Replayed]) -> list[Row]:
    from ..search.replay import summarize_runs

    kinds = dict.fromkeys((run.method, run.budget) for run in runs)
    rows = []
    for kind in kinds:
        found = summarize_runs([run for run in runs if (run.method, run.budget) == kind])
        rows.append({"method": kind[0], "budget": kind[1], **asdict(found)})
    return rows


def _name(space: RecordedSpace) -> Row:
    problem = problem_text(space.problem.to_dict(), space.family.family)
    return {
        "family": space.family.family,
        "gpu": space.fingerprint["gpu"],
        "problem": problem,
        "configs": len(space.configs),
        "best_us": space.best_us,
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _print(report: dict[str, list[Row]]) -> None:
    numbers = ("median regret", "worst", "trials", "minutes", "runs", "failed")
    columns = ("family", "gpu", "problem", "method", "budget", *numbers)
    rows = [
        (*(row.get(name, "") for name in columns[:5]), *_figures(row))
        for row in (*report["searches"], *({"family": "all", **row} for row in report["over_all_spaces"]))
    ]
    title = "replayed searches: what their winners lose to the best recorded config"
    output().print(make_table(title, columns, rows, numbers, LESS_IMPORTANT))
    if not report["model"]:
        errors().print("no trial tells its resources, so the cost model is not judged", soft_wrap=True)
        return
    heads = ("family", "gpu", "problem", "configs", "best us", "5% in first 16", "first loses", "model")
    output().print(make_table("the cost model", heads, map(_model_row, report["model"]), heads[3:7], LESS_IMPORTANT))
    (overall,) = report["model_over_all_spaces"]
    text = (
        f"a config within 5% of the best is among the model's first 16 in {overall['near_best_in_first_16']} of "
        f"{overall['spaces']} spaces; its first choice loses {_percent(overall['geomean_loss_of_first'])} "
        "(geometric mean)"
    )
    output().print(text, markup=False, soft_wrap=True)


def _figures(row: Row) -> tuple[object, ...]:
    regrets = (_percent(row["median_regret"]), _percent(row["worst_regret"]))
    return (*regrets, row["num_measured"], row["minutes"], row["num_runs"], row["num_failed"])


def _model_row(row: Row) -> tuple[object, ...]:
    head = tuple(row[name] for name in ("family", "gpu", "problem", "configs", "best_us"))
    return (*head, "yes" if row["best_in_first_16"] else "no", _percent(row["loss_of_first"]), row["note"])
