"""`nsa-autotune db stats` and `sql`: how much there is, what went stale, what a parameter is worth; own SQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, UnknownName
from . import options
from .console import errors, output
from .db_ask import DATE_CHARS, FamilyOption, GpuOption, PolicyOption, ProblemOption, about_of
from .rows import DEFAULT_LIMIT, FormatOption, LimitOption, OutOption, Row, RowFormat, check_output, give_rows
from .templates import current_templates

if TYPE_CHECKING:
    from ..db.database import TuningDatabase
    from ..db.records import TrialRecord
    from ..search.worth import Worth

COUNT_COLUMNS = [
    *("gpu", "family", "problems", "tuned", "coverage", "trials", "ok"),
    *("same_code", "constraint", "render", "compile", "resource", "accuracy", "runtime", "timeout", "crash"),
    *("predicted", "winners", "confirmed", "newest_trial", "newest_winner"),
]
ALWAYS_SHOWN = COUNT_COLUMNS[:7]
STALE_COLUMNS = ["gpu", "family", "changed", "then", "now", "winners", "newest"]
WORTH_COLUMNS = ["param", "importance", "best_value", "loss_without", "values"]
LESS_IMPORTANT = ["newest_winner", "newest_trial", "confirmed", "predicted", *COUNT_COLUMNS[7:16], "coverage", "ok"]
VERSIONS = ("driver", "cuda", "torch", "triton", "assembler")


@dataclass(frozen=True)
class Statistics:
    """Rows with their columns, those that a table shows, and a sentence below it."""

    rows: list[Row]
    columns: Sequence[str]
    shown: Sequence[str]
    note: str = ""


class Show(StrEnum):
    """What statistics are of."""

    counts = "counts"
    stale = "stale"
    worth = "worth"


def stats(
    what: Annotated[
        Show, typer.Option("--show", help="counts; stale: what changed since; worth: of a family's parameters.")
    ] = Show.counts,
    gpu: GpuOption = "",
    family: FamilyOption = "",
    problem: ProblemOption = None,
    policy: PolicyOption = "",
    now: Annotated[
        list[str] | None,
        typer.Option("--now", help="With stale: versions to hold against, such as triton=3.9.0; else this GPU's."),
    ] = None,
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    db: options.DbOption = None,
) -> None:
    """Trials by status, coverage and predictions; what went stale; or the importance of a family's parameters."""
    from ..db.database import TuningDatabase

    about, versions = about_of(gpu, family, problem, policy), versions_of(now)
    if now and what is not Show.stale:
        raise InvalidInput("--now holds winners against versions", {"--show": what.value}, "Add --show stale.")
    check_output(style, out)
    with TuningDatabase(db, current_templates=current_templates()) as found:
        if what is Show.counts:
            answer = counts_of(found, about)
        elif what is Show.stale:
            answer = stale_of(found, about, versions or this_gpu(gpu))
        else:
            answer = worth_of(found, about)
    if style is not RowFormat.table:
        give_rows(answer.rows, answer.columns, style, out, title=what.value)
        return
    short = [
        {**row, **{name: day(value) for name, value in row.items() if name.startswith("newest")}} for row in answer.rows
    ]
    give_rows(short, answer.shown, style, out, title=what.value, less_important=LESS_IMPORTANT)
    if answer.note:
        output().print(answer.note, markup=False, soft_wrap=True)


def sql(
    statement: Annotated[str, typer.Argument(help="One SELECT; anything that would write is refused.")],
    style: FormatOption = RowFormat.table,
    out: OutOption = None,
    limit: LimitOption = None,
    db: options.DbOption = None,
) -> None:
    """Answer one SELECT on the tables nsa_trials, nsa_winners, nsa_problems, nsa_variants and nsa_fingerprints."""
    from ..db.database import SQL_LIMIT, TuningDatabase

    check_output(style, out)
    most = limit or (DEFAULT_LIMIT if style is RowFormat.table else SQL_LIMIT)
    with TuningDatabase(db) as found:
        result = found.sql(statement, limit=most)
    give_rows(result.rows, result.columns, style, out, title="sql")
    if result.cut:
        errors().print(f"there are more rows than {most}: --limit N gives more", markup=False)


def versions_of(now: Sequence[str] | None) -> dict[str, str]:
    """The versions of --now."""
    found = options.assignments(now, "--now")
    if unknown := sorted(found.keys() - set(VERSIONS)):
        raise UnknownName("there is no such version", {"--now": unknown}, f"Versions: {', '.join(VERSIONS)}.")
    return found


def this_gpu(gpu: str) -> dict[str, str]:
    """Versions on the machine at hand, if it has a GPU and that is the one asked for; else none."""
    from .doctor import gpu_name

    name = gpu_name()
    if name is None or gpu.lower() not in name.lower():
        return {}
    from ..dispatch.fingerprint import current

    return {field: value for field, value in current("cuda:0").to_dict().items() if field in VERSIONS}


def counts_of(found: TuningDatabase, about: Mapping[str, Any]) -> Statistics:
    """How many trials and winners of what kind; a table leaves out statuses that never were."""
    from ..db.counts import COLUMNS

    rows = found.stats(**about)
    shown = [name for name in COUNT_COLUMNS if name in ALWAYS_SHOWN or any(row[name] for row in rows)]
    return Statistics(rows, COLUMNS, shown)


def stale_of(found: TuningDatabase, about: Mapping[str, Any], here: Mapping[str, str]) -> Statistics:
    """What went stale, and what it was held against."""
    told = ", ".join(f"{name} {value}" for name, value in here.items())
    note = f"held against {told or 'templates only: no such GPU is here, and --now names no version'}"
    return Statistics(stale_rows(found, about, here), STALE_COLUMNS, STALE_COLUMNS, note)


def stale_rows(found: TuningDatabase, about: Mapping[str, Any], here: Mapping[str, str]) -> list[Row]:
    """Problems without a winner under the present versions and templates, by what changed; one may count twice."""
    from ..kernels import all_specs
    from ..search.drift import TEMPLATE, stale_winners

    templates = current_templates()
    stale = stale_winners(found.winners(**about), here, all_specs(), templates)
    counted: Counter[tuple[str, str, str, str, str]] = Counter()
    newest: dict[tuple[str, str, str, str, str], str] = {}
    for item in stale:
        winner = item.winner
        for name in item.changed:
            then, now = winner.fingerprint.get(name, ""), here.get(name, "")
            if name == TEMPLATE:
                then, now = winner.template_digest, templates[winner.family]
            key = (winner.fingerprint["gpu"], winner.family, name, then, now)
            counted[key] += 1
            newest[key] = max(newest.get(key, ""), winner.created)
    return [dict(zip(STALE_COLUMNS, (*key, count, newest[key]), strict=True)) for key, count in sorted(counted.items())]


def worth_of(found: TuningDatabase, about: Mapping[str, Any]) -> Statistics:
    """The worth of the parameters for the one problem that is meant, on the newest of its origins."""
    from ..kernels import get_spec
    from ..search.worth import parameter_worth

    if not about["family"]:
        remedy = "Name it: --family slc_attn_fwd."
        raise InvalidInput("parameters belong to a family", {"--family": ""}, remedy)
    worth = parameter_worth(get_spec(about["family"]), one_origin(found.trials(**about)))
    rows = worth_rows(worth)
    return Statistics(rows, list(rows[0]), WORTH_COLUMNS, evidence_of(worth))


def one_origin(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Of one problem's trials, newest first, those of the newest one's machine, template and policy."""
    if not trials:
        remedy = "See `nsa-autotune db stats` for what there is."
        raise InvalidInput("no measured trial is of this problem", {}, remedy)
    meant = {(trial.fingerprint["gpu"], trial.problem_key) for trial in trials}
    if len(meant) > 1:
        gpus, keys = (sorted({pair[place] for pair in meant}) for place in (0, 1))
        values = {"gpus": gpus, "problems": len(keys), "first": keys[0]}
        remedy = "Name one: --gpu H100 --problem seq_k=64k --problem num_q_heads=64, and so on."
        raise InvalidInput("importance is of one problem on one GPU", values, remedy)
    first = trials[0]

    def origin(trial: TrialRecord) -> tuple[object, ...]:
        return trial.fingerprint, trial.template_digest, trial.policy

    return [trial for trial in trials if origin(trial) == origin(first)]


def worth_rows(worth: Worth) -> list[Row]:
    """One row a parameter, each with the evidence."""
    shared = {
        "family": worth.family,
        "problem_key": worth.problem_key,
        **worth.fingerprint,
        "template_digest": worth.template_digest,
        "policy": worth.policy,
        "evaluator": worth.evaluator,
        "configs": worth.configs,
        "best_us": worth.best_us,
        "newest": worth.newest,
    }
    return [{name: getattr(param, name) for name in WORTH_COLUMNS} | shared for param in worth.params]


def evidence_of(worth: Worth) -> str:
    """What the importance rests on, in a sentence."""
    machine = ", ".join(f"{name} {value}" for name, value in worth.fingerprint.items() if name in VERSIONS and value)
    return (
        f"{worth.evaluator} of Optuna on {worth.configs} configs of {worth.family} that worked on "
        f"{worth.fingerprint['gpu']} ({machine}), policy {worth.policy}, newest {day(worth.newest)}; "
        f"the fastest takes {worth.best_us:.4g} us. loss_without: what the fastest config with another value loses."
    )


def day(created: str | None) -> str:
    """The date of a time."""
    return (created or "")[:DATE_CHARS]
