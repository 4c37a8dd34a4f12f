"""From a database and files of benchmarks to the facts of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from .. import __version__
from ..codegen.render import template_digest
from ..db.records import TrialRecord, WinnerRecord, utc_now
from ..db.store import TuningStore
from ..errors import NSAError
from ..kernels import all_specs
from ..search.mirror import group_trials
from ..search.presets import unknown_name
from ..spec import Problem
from .benchmarks import read_speedups
from .data import MAX_SEARCHES, Report, known_gpus, library_speedups, searches, winner_rows

MAX_TRIALS = 50_000  # the newest of the database, that searches are drawn from

Record = TypeVar("Record", TrialRecord, WinnerRecord)


def build_report(store: TuningStore, *, gpu: str = "", benches: Sequence[Path] = ()) -> Report:
    """All that the database holds of the GPUs whose names contain `gpu`, and the benchmarks' speed-ups of them.

    UnknownName if no GPU is meant, InvalidInput for a file that is not a benchmark's.
    """
    speedups = [item for path in benches for item in read_speedups(path)]
    winners, trials = store.winners(), store.trials(limit=MAX_TRIALS)
    notes = [f"Only the newest {MAX_TRIALS} trials were read."] if len(trials) == MAX_TRIALS else []
    names = {record.fingerprint["gpu"] for record in (*winners, *trials)} | {item.keys.gpu for item in speedups}
    chosen = {name for name in names if gpu.lower() in name.lower()}
    if gpu and not chosen:
        raise unknown_name("GPU", gpu, sorted(names))
    usable = _usable([record for record in winners if record.fingerprint["gpu"] in chosen], notes)
    tried = _usable([record for record in trials if record.fingerprint["gpu"] in chosen], notes)
    specs = all_specs()
    templates = {family: template_digest(spec) for family, spec in specs.items()}
    groups = group_trials(tried)
    if len(groups) > MAX_SEARCHES:
        notes.append(f"The newest {MAX_SEARCHES} of {len(groups)} searches are drawn.")
    rows = winner_rows(usable, specs, templates)
    return Report(
        database=_database_name(store),
        created=utc_now(),
        tool_version=__version__,
        winners=rows,
        searches=searches(groups, specs, templates),
        speedups=(*(item for item in speedups if item.keys.gpu in chosen), *library_speedups(rows)),
        gpus=known_gpus(usable),
        notes=tuple(notes),
    )


def _database_name(store: TuningStore) -> str:
    """Without folders, hosts and users, for pages are passed on."""
    location = store.location
    if location.path is not None:
        return location.path.name
    return f"{location.url.get_backend_name()} {location.url.database or 'in memory'}"


def _usable(records: Iterable[Record], notes: list[str]) -> list[Record]:
    """The records whose problem this version understands; a note tells how many were left out."""
    found, refused = [], 0
    for record in records:
        try:
            Problem.from_dict(record.problem)
        except (NSAError, TypeError, ValueError):
            refused += 1
        else:
            found.append(record)
    if refused:
        notes.append(f"{refused} records were left out: their problem is not one that this version knows.")
    return found
