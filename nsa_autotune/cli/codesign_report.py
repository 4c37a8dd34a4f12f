"""What a co-design study found: the front as a table, every design as JSON or CSV, and a picture."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InvalidInput
from ..spec import Problem, canonical_json
from .console import make_table, output
from .db import Format

if TYPE_CHECKING:
    from ..db.designs import DesignRecord
    from ..search.codesign import Study
    from .codesign_plan import Plan

COLUMNS = {  # of the table -> what they show
    "latency us": "latency_us",
    "mass kept": "mass_kept",
    "p10": "mass_kept_p10",
    "output error": "output_error",
    "locality": "locality",
    "l'": "select_block_size",
    "n": "num_selected",
    "w": "window_size",
    "l": "compress_block_size",
    "d": "compress_stride",
    "G": "group_size",
}
LESS_IMPORTANT = ("locality", "p10")


def report(study: Study, plan: Plan, records: Sequence[DesignRecord]) -> None:
    """Print the front, or with JSON and CSV every design, fastest first."""
    front = study.front(records)
    if plan.style is Format.table:
        print_front(study, plan, records, front)
        return
    rows = [
        row_of(plan, record, on_front=record in front)
        for record in sorted(records, key=lambda record: record.latency_us)
    ]
    typer.echo(
        json.dumps(rows, indent=1) if plan.style is Format.json else csv_text(rows), nl=plan.style is Format.json
    )


def print_front(study: Study, plan: Plan, records: Sequence[DesignRecord], front: Sequence[DesignRecord]) -> None:
    """The table, and for each point what puts it to use."""
    from ..search.pareto import hypervolume

    points = [study.point(record) for record in records]
    worst = (max(first for first, _ in points), max(second for _, second in points))
    share = hypervolume(points, worst) / (worst[0] * worst[1]) if 0.0 not in worst else 0.0
    rows = []
    for number, record in enumerate(front, start=1):
        row = row_of(plan, record, on_front=True)
        rows.append((number, *(row[name] for name in COLUMNS.values())))
    heading = f"front of {len(records)} designs, {basis(study)}"
    columns = ("point", *COLUMNS)
    output().print(make_table(heading, columns, rows, columns, LESS_IMPORTANT))
    output().print(f"hypervolume {share:.3f} of the box from zero to the worst of each", markup=False)
    for number, record in enumerate(front, start=1):
        problem = problem_of(plan.base, record)
        kv_heads = f", num_kv_heads={problem.num_kv_heads}" if problem.num_kv_heads != plan.base.num_kv_heads else ""
        lines = (f"config={problem.nsa}{kv_heads}", tune_command(problem, plan), bench_command(problem))
        output().print(f"{number}.", "\n   ".join(lines), markup=False, soft_wrap=True)


def basis(study: Study) -> str:
    """Whether times were measured, and where."""
    gpu = study.fingerprint["gpu"].removeprefix("target ")
    if study.kind == "measured":
        return f"medians on {gpu}"
    return f"predicted for {gpu} by a cost model, nothing measured"


def problem_of(base: Problem, record: DesignRecord) -> Problem:
    """What the kernels of a design are asked for."""
    return base.replace(nsa=record.config, num_kv_heads=base.num_q_heads // record.group_size)


def row_of(plan: Plan, record: DesignRecord, *, on_front: bool) -> dict[str, Any]:
    """A design as one flat row, with the commands that tune and re-measure it."""
    problem = problem_of(plan.base, record)
    numbers = ("latency_us", "mass_kept", "mass_kept_p10", "output_error", "locality")
    return {
        "on_front": on_front,
        **{name: getattr(record, name) for name in numbers},
        **record.nsa,
        "group_size": record.group_size,
        "kind": record.kind,
        "gpu": record.fingerprint["gpu"],
        "parts_us": record.parts,
        "config": str(problem.nsa),
        "tune": tune_command(problem, plan),
        "bench": bench_command(problem),
        "created": record.created,
        "tool_version": record.tool_version,
    }


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with a header; the parts as JSON in one cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "parts_us": canonical_json(row["parts_us"])} for row in rows)
    return text.getvalue()


def tune_command(problem: Problem, plan: Plan) -> str:
    """The command that tunes a point's kernels; where this database has their winners, it only confirms them."""
    words = ["nsa-autotune", "tune", *shape_words(problem), "--phi-hidden", str(problem.phi_hidden)]
    words += ["--policy", plan.policy, "--families", ",".join(spec.family for spec in plan.specs)]
    return shlex.join(words)


def bench_command(problem: Problem) -> str:
    """The command that measures a point again, each kernel and the whole forward."""
    return shlex.join(["nsa-autotune", "bench", *shape_words(problem)])


def shape_words(problem: Problem) -> list[str]:
    """The options of `tune` and `bench` that describe a problem."""
    named = {
        "--seq": problem.seq_k,
        "--batch": problem.batch,
        "--heads": problem.num_q_heads,
        "--kv-heads": problem.num_kv_heads,
        "--d-qk": problem.d_qk,
        "--d-v": problem.d_v,
        "--dtype": problem.dtype,
        "--locality": problem.locality,
        "--nsa": ",".join(f"{name}={value}" for name, value in problem.nsa.to_dict().items()),
    }
    return [str(word) for pair in named.items() for word in pair]


def draw(study: Study, records: Sequence[DesignRecord], path: Path) -> None:
    """All designs as points and the front as a line, into an image file."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axis.scatter(*zip(*map(study.point, records), strict=True), color="0.6", label="designs")
    front = [study.point(record) for record in study.front(records)]
    axis.plot(*zip(*front, strict=True), marker="o", label="front")
    for number, place in enumerate(front, start=1):
        axis.annotate(str(number), place, textcoords="offset points", xytext=(5, 5))
    axis.set_xlabel(f"latency (us), {study.kind}")
    axis.set_ylabel("relative error of the output" if study.objective == "output" else "share of mass lost")
    axis.set_title(basis(study), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidInput("the plot cannot be written", {"path": str(path), "reason": str(error)}) from error
    finally:
        pyplot.close(figure)
