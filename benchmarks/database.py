"""Claim: with a million trials the winners of a GPU are named in 50 ms, two filters answered in 500 ms.

Fills a SQLite file with invented trials (see database_fill.py), asks it what the command line and the dispatcher ask,
and writes `results/<date>-database.md` and `.json`. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from database_fill import GPUS, VERSIONS, Filled, fill, sizes
from forward import results_folder, without_places, write_page

from nsa_autotune.cli.bench_report import markdown_table
from nsa_autotune.cli.templates import current_templates
from nsa_autotune.codegen.render import template_digest  # noqa: F401  fresh processes use it
from nsa_autotune.db import TuningDatabase, TuningStore
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

RESULTS = Path(__file__).parent / "results"
FAMILY, GPU, TOKENS = "slc_attn_fwd", "H200", 65536
OPEN_MARK_MS, LOOKUP_MARK_MS, BEST_MARK_MS, QUERY_MARK_MS = 100.0, 20.0, 50.0, 500.0
ROWS = 50  # what the command line shows in a table
FRESH_PROCESSES = 6
COLUMNS = ("question", "rows", "ms", "p20..p80", "CPU ms", "first ms", "mark ms")
NUMBERS = COLUMNS[1:]
NOTES = (
    "ms: median of the samples after the first, with the 20th and 80th percentile; first ms: the first in the process.",
    "CPU ms: median of this process's own time on a core. On a machine with other work ms is longer than that.",
    "Samples of all questions but those of fresh processes are taken in turns. The file lies in the page cache.",
    "A fresh process opens the file and looks one problem up; imports and the template's digest stand by themselves.",
    "lookup: the winners of one family and the ladder's choice among them, as on a kernel's first call.",
    f"Without a number of rows in its name a question asks for {ROWS} rows, as the command line does for a table.",
    "The trials are invented, so only times and numbers of rows mean anything here.",
)
# runs in a process of its own: python -c FRESH url
FRESH = """
import json, sys, time
def now():
    return 1e3 * time.perf_counter(), 1e3 * time.process_time()
marks = [now()]
import database
marks.append(now())
store = database.TuningStore(sys.argv[1])
marks.append(now())
database.template_digest(database.get_spec(database.FAMILY))
marks.append(now())
count = database.look_up(store)
marks.append(now())
print(json.dumps([[[b[i] - a[i] for i in (0, 1)] for a, b in zip(marks, marks[1:])], count]))
"""
FRESH_STEPS = ("imports, torch among them", "open", "digest of a template", "first lookup")
FRESH_MARKS_MS = (None, OPEN_MARK_MS, None, LOOKUP_MARK_MS)


@dataclass(frozen=True)
class Line:
    """A question, and the most it may take in ms."""

    question: str
    ask: Callable[[], int]  # returns how many rows came
    mark_ms: float | None = None


@dataclass(frozen=True)
class Found:
    """The times of a line in ms, in the order they were taken."""

    question: str
    rows: int
    samples_ms: list[float]
    cpu_ms: list[float]
    mark_ms: float | None


def main(arguments: Sequence[str]) -> int:
    """Fill, measure, print and write."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with database(options.file, options.trials) as (path, filled):
        load_before = os.getloadavg()[0]
        url = f"sqlite:///{path}"
        found = [*fresh(url, FRESH_PROCESSES)]
        with TuningDatabase(url, current_templates=current_templates()) as asked:
            found += measure(lines(url, asked), options.samples)
    command = shlex.join(["python", "benchmarks/database.py", *without_places(arguments)])
    cores = f"{os.cpu_count()} cores, load average {load_before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    versions = f"{sqlite3.sqlite_version}, {sqlalchemy.__version__}, {platform.python_version()}"
    facts = {
        "CPU": cores,
        "SQLite, SQLAlchemy, Python": versions,
        **dict(sizes(filled)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "samples": f"{options.samples} a question, {FRESH_PROCESSES} fresh processes",
    }
    page = make_page(facts, found)
    print(page)
    data = json.dumps({"facts": facts, "rows": [asdict(line) for line in found]}, indent=1) + "\n"
    write_page(options.folder / f"{facts['date'][:10]}-database", page, data)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--folder", type=results_folder, default=RESULTS, help="where the page is written")
    parser.add_argument("--file", type=Path, help="a file to fill and keep, or to ask again; else a temporary one")
    return parser.parse_args(arguments)


@contextmanager
def database(file: Path | None, num_trials: int) -> Iterator[tuple[Path, Filled]]:
    """The filled file and what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = file or Path(folder) / "tuning.sqlite"
        if not path.exists():
            fill(path, num_trials)
        with TuningStore(f"sqlite:///{path}"):  # imports the shipped winners, as every first opening does
            pass
        yield path, counted(path)


def counted(path: Path) -> Filled:
    """What a file holds."""
    with sqlite3.connect(path) as db:
        counts = [db.execute(f"SELECT count(*) FROM nsa_{t}").fetchone()[0] for t in ("trials", "winners", "problems")]
    return Filled(*counts, path.stat().st_size)


def fresh(url: str, processes: int) -> Iterator[Found]:
    """Imports, opening and the first lookup, each in a process of its own."""
    steps: list[list[list[float]]] = []
    count = 0
    for _ in range(processes):
        command = [sys.executable, "-c", FRESH, url]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        times, count = json.loads(done.stdout)
        steps.append(times)
    for name, mark_ms, each in zip(FRESH_STEPS, FRESH_MARKS_MS, zip(*steps, strict=True), strict=True):
        wall, cpu = (list(column) for column in zip(*each, strict=True))
        yield Found(f"fresh process: {name}", count if "lookup" in name else 0, wall, cpu, mark_ms)


def look_up(store: TuningStore) -> int:
    """What the dispatcher does on the first call of a kernel; returns how many winners it chose among."""
    driver, torch, triton, assembler, _ = VERSIONS[-1]
    name = next(name for name in GPUS if GPU in name)
    here = Fingerprint(name, GPUS[name], driver, "12.8", torch, triton, assembler)
    served = Dispatcher(store, fingerprint=here)
    served._choose(get_spec(FAMILY), Problem(seq_q=TOKENS, seq_k=TOKENS), here)
    return len(served._winners[FAMILY])


def lines(url: str, asked: TuningDatabase) -> list[Line]:
    """The questions."""

    def opening() -> int:
        TuningStore(url).close()
        return 0

    def trials(limit: int | None = ROWS, **filters: Any) -> int:
        return len(asked.query(table="trials", limit=limit, **filters))

    long = {"seq_k": TOKENS}
    shape = {**long, "d_qk": 128, "num_q_heads": 64, "locality": 0.8}
    counting = "SELECT status, count(*) AS trials FROM nsa_trials WHERE kind = 'measured' GROUP BY status"
    return [
        Line("open again", opening, OPEN_MARK_MS),
        Line("first lookup of a family", lambda: look_up(asked.store), LOOKUP_MARK_MS),
        Line("best: GPU, family", lambda: len(asked.best(gpu=GPU, family=FAMILY, limit=ROWS)), BEST_MARK_MS),
        Line("best: GPU", lambda: len(asked.best(gpu=GPU, limit=ROWS)), BEST_MARK_MS),
        Line("best: length, on every GPU", lambda: len(asked.best(problem=long, limit=ROWS)), BEST_MARK_MS),
        Line("best: one problem", lambda: len(asked.best(gpu=GPU, family=FAMILY, problem=shape)), BEST_MARK_MS),
        Line("best: everything", lambda: len(asked.best(limit=ROWS)), BEST_MARK_MS),
        Line("query: family, status ok", lambda: trials(family=FAMILY, status="ok"), QUERY_MARK_MS),
        Line("query: GPU, status compile", lambda: trials(gpu=GPU, status="compile"), QUERY_MARK_MS),
        Line("query: GPU, a status that never was", lambda: trials(gpu=GPU, status="render"), QUERY_MARK_MS),
        Line("query: GPU, length", lambda: trials(gpu=GPU, problem=long), QUERY_MARK_MS),
        Line("query: family, length, all rows", lambda: trials(None, family=FAMILY, problem=shape), None),
        Line("history: one problem", lambda: len(asked.history(gpu=GPU, family=FAMILY, problem=shape))),
        Line("compare: two GPUs, one family", lambda: len(asked.compare(gpus=["H100", GPU], family=FAMILY))),
        Line("regressions: one family, all rows", lambda: len(asked.regressions(family=FAMILY))),
        Line("stats: everything", lambda: len(asked.stats())),
        Line("sql: trials by status", lambda: len(asked.sql(counting).rows)),
    ]


def measure(questions: Sequence[Line], samples: int) -> list[Found]:
    """Ask all in turns; the first answer of each counts by itself."""
    wall: list[list[float]] = [[] for _ in questions]
    cpu: list[list[float]] = [[] for _ in questions]
    rows = [0] * len(questions)
    for _ in range(samples + 1):
        for index, line in enumerate(questions):
            start, start_cpu = time.perf_counter_ns(), time.process_time_ns()
            rows[index] = line.ask()
            cpu[index].append((time.process_time_ns() - start_cpu) / 1e6)
            wall[index].append((time.perf_counter_ns() - start) / 1e6)
    return [Found(line.question, *rest, line.mark_ms) for line, *rest in zip(questions, rows, wall, cpu, strict=True)]


def make_page(facts: dict[str, str], found: Sequence[Found]) -> str:
    """The dated page."""
    text = [f"# Questions to a database of {facts['trials']} trials, {facts['date'][:10]}", ""]
    text += [*markdown_table(("what", "found"), list(facts.items()), ()), ""]
    text += [*markdown_table(COLUMNS, [row_of(line) for line in found], NUMBERS), "", *(f"- {note}" for note in NOTES)]
    return "\n".join(text) + "\n"


def row_of(found: Found) -> tuple[object, ...]:
    """The cells of a line; every sample of a fresh process is a first one."""
    skipped = 0 if found.question.startswith("fresh process") else 1
    samples, cpu, first = found.samples_ms[skipped:], found.cpu_ms[skipped:], found.samples_ms[0]
    low, *_, high = statistics.quantiles(samples, n=5)
    middle = statistics.median(samples)
    mark = "" if found.mark_ms is None else f"{found.mark_ms:g} ({'met' if middle <= found.mark_ms else 'missed'})"
    spread, own = f"{low:.1f}..{high:.1f}", f"{statistics.median(cpu):.1f}"
    return (found.question, found.rows or "", f"{middle:.1f}", spread, own, f"{first:.1f}", mark)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
