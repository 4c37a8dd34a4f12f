"""Tables out of the database, races for what they lack, and covers back into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..bench.result import TrialResult
from ..codegen.render import template_digest
from ..db.checks import RACED
from ..db.records import WinnerRecord
from ..db.store import TuningStore
from ..spec import DEFAULT_POLICY, Config, KernelSpec, Problem, canonical_json
from .cells import RACES, Cell, Missing, Row, Table, build_table
from .cover import Cover
from .space import config_key
from .task import Task

RACE_FIELD = 8  # configs of one race, the winner among them
RACE_STAGE = "final"

DigestOf = Callable[[KernelSpec], str]
Wanted = Callable[[WinnerRecord], bool]
Tell = Callable[[KernelSpec, Problem, Sequence[TrialResult]], None]


class Racer(Protocol):
    """Times several configs interleaved, without ever raising for one that fails."""

    def race(self, family: str, problem: Problem, configs: Sequence[Config]) -> list[TrialResult]: ...


def everything(winner: WinnerRecord) -> bool:
    """No winner is left out."""
    return True


def load_tables(
    store: TuningStore,
    specs: Iterable[KernelSpec],
    *,
    gpu: str = "",
    policy: str = DEFAULT_POLICY,
    wanted: Wanted = everything,
    digest_of: DigestOf = template_digest,
) -> list[Table]:
    """One table for each family and fingerprint with a tuned problem; `gpu` is a part of the name in any case."""
    found = []
    for spec in specs:
        current = digest_of(spec)
        winners = [*filter(wanted, store.winners(family=spec.family, template_digest=current, policy=policy))]
        trials = store.trials(family=spec.family, template_digest=current, policy=policy, provider="template")
        raced = [trial for trial in trials if trial.stage in RACES]
        machines = {canonical_json(record.fingerprint): record.fingerprint for record in (*winners, *raced)}
        for _, machine in sorted(machines.items()):
            if gpu.lower() not in machine["gpu"].lower():
                continue
            table = build_table(spec, winners, trials, fingerprint=machine, template_digest=current, policy=policy)
            if table.rows:
                found.append(table)
    return found


def table_here(
    store: TuningStore, spec: KernelSpec, fingerprint: dict[str, str], digest_of: DigestOf = template_digest
) -> Table:
    """The table of a GPU at hand with every problem tuned on its kind, also with other versions."""
    current = digest_of(spec)
    winners = store.winners(family=spec.family, template_digest=current, policy=DEFAULT_POLICY)
    trials = store.trials(
        family=spec.family, template_digest=current, policy=DEFAULT_POLICY, provider="template", gpu=fingerprint["gpu"]
    )
    return build_table(
        spec,
        winners,
        trials,
        fingerprint=fingerprint,
        template_digest=current,
        policy=DEFAULT_POLICY,
        unmeasured=True,
    )


def races(missing: Iterable[Missing]) -> Iterator[tuple[Row, list[Config]]]:
    """Fields of a race each: the row's winner first, for comparison, then configs that are missing there."""
    by_row: dict[str, tuple[Row, dict[str, Config]]] = {}
    for cell in missing:
        row, configs = by_row.setdefault(cell.row.winner.problem_key, (cell.row, {}))
        configs[config_key(cell.config)] = cell.config
    for row, configs in by_row.values():
        others = [config for key, config in configs.items() if key != row.own_key]
        for first in range(0, max(1, len(others)), RACE_FIELD - 1):
            yield row, [row.winner.config, *others[first : first + RACE_FIELD - 1]]


def measure_missing(
    table: Table, missing: Iterable[Missing], *, racer: Racer, store: TuningStore, tell: Tell | None = None
) -> int:
    """Race what is missing beside each problem's winner, store every result at once; the number of measurements."""
    count = 0
    for row, configs in races(missing):
        task = Task(table.spec, row.problem, table.fingerprint, table.template_digest)
        results = racer.race(table.spec.family, row.problem, configs)
        pairs = zip(configs, results, strict=True)
        store.add_trials([task.trial(config, result, RACE_STAGE) for config, result in pairs])
        count += len(configs)
        if tell is not None:
            tell(table.spec, row.problem, results)
    return count


def covering_winner(row: Row, cell: Cell) -> WinnerRecord | None:
    """The row's winner with the cell's config and evidence in its place; None if the cell has no samples."""
    trial = cell.trial
    if config_key(cell.config) == row.own_key:
        return row.winner
    if trial is None or not trial.samples_us or not (trial.median_us and trial.p20_us and trial.p80_us):
        return None
    base = row.winner
    if base.fingerprint != trial.fingerprint:  # what was measured beside it comes from other versions
        base = replace(base, default_median_us=None, library="", library_median_us=None)
    return replace(
        base,
        fingerprint=trial.fingerprint,
        config=trial.config,
        median_us=trial.median_us,
        p20_us=trial.p20_us,
        p80_us=trial.p80_us,
        samples_us=trial.samples_us,
        verdict=RACED if cell.raced else "provisional",
        rivals=(),
        resources=trial.resources,
        created=trial.created,
        tool_version=trial.tool_version,
        source="local",
    )


def covering_winners(cover: Cover) -> tuple[list[tuple[Row, WinnerRecord]], int]:
    """Each problem's winner under the cover, and how many kept their own because the other has no samples."""
    found, kept = [], 0
    for served in cover.served:
        winner = covering_winner(served.row, served.row.cells[config_key(served.config)])
        kept += winner is None
        found.append((served.row, winner or served.row.winner))
    return found, kept


def apply_cover(store: TuningStore, cover: Cover) -> tuple[int, int]:
    """Store the cover's configs as winners; numbers of winners that changed and that were kept for want of samples.

    A winner that gives way leaves its samples as a trial (`rows.upsert_winner`), with which the next cover compares.
    """
    found, kept = covering_winners(cover)
    changed = 0
    for row, winner in found:
        if winner is row.winner:
            continue
        store.set_winner(winner)
        changed += 1
    return changed, kept
