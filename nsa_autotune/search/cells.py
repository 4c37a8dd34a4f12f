"""What each tuned problem loses with each config: a table of one family on one fingerprint, made of measurements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from ..db.records import TrialRecord, WinnerRecord
from ..spec import Config, KernelSpec, Problem
from .space import config_key

RACES = ("final", "confirm")  # stages whose configs are timed interleaved
STAGES = ("search", *RACES)


@dataclass(frozen=True)
class Cell:
    """One config on one problem; a cell that was not measured does not exist."""

    config: Config
    loss: float  # share of the fastest raced config's time that is lost; infinite for a config that fails
    median_us: float | None
    raced: bool  # interleaved with others, not timed on its own
    trial: TrialRecord | None  # None where the winner's record alone has the median


@dataclass(frozen=True)
class Row:
    """One tuned problem with its cells by config key."""

    problem: Problem
    winner: WinnerRecord
    cells: Mapping[str, Cell]

    @property
    def own_key(self) -> str:
        """The key of the winner's config."""
        return config_key(self.winner.config)

    def loss(self, config: Config) -> float | None:
        """What the config loses here; None where that is not known."""
        cell = self.cells.get(config_key(config))
        return None if cell is None else cell.loss


@dataclass(frozen=True)
class Table:
    """The tuned problems of one family on one fingerprint under one policy."""

    spec: KernelSpec
    fingerprint: dict[str, str]
    template_digest: str
    policy: str
    rows: tuple[Row, ...]

    @property
    def winner_configs(self) -> list[Config]:
        """The different configs that serve today, those of most problems first."""
        counts: dict[str, list[Config]] = defaultdict(list)
        for row in self.rows:
            counts[row.own_key].append(row.winner.config)
        return [group[0] for _, group in sorted(counts.items(), key=lambda item: (-len(item[1]), item[0]))]


@dataclass(frozen=True)
class Missing:
    """A config that may serve a problem and was never measured on it."""

    row: Row
    config: Config


def build_table(
    spec: KernelSpec,
    winners: Iterable[WinnerRecord],
    trials: Iterable[TrialRecord],
    *,
    fingerprint: dict[str, str],
    template_digest: str,
    policy: str,
    unmeasured: bool = False,
) -> Table:
    """The table of one fingerprint.

    A problem tuned on this GPU with other versions only has a row if its winner was measured again with these, or if
    `unmeasured`; the row then may lack its winner's cell. Records of other families, templates, policies and GPUs are
    left out, so are trials of another length of a bucket.
    """
    by_problem: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if _belongs(trial, spec, template_digest, policy) and _is_timing(trial) and trial.fingerprint == fingerprint:
            by_problem[_exact_key(spec, trial)].append(trial)
    chosen: dict[str, WinnerRecord] = {}
    for winner in sorted(winners, key=lambda w: (w.fingerprint != fingerprint, -_seconds(w.created))):
        if _belongs(winner, spec, template_digest, policy) and winner.fingerprint["gpu"] == fingerprint["gpu"]:
            chosen.setdefault(winner.problem_key, winner)
    rows = []
    for _, winner in sorted(chosen.items()):
        cells = _cells(winner, by_problem[_exact_key(spec, winner)], here=winner.fingerprint == fingerprint)
        usable = config_key(winner.config) in cells and any(math.isfinite(cell.loss) for cell in cells.values())
        if unmeasured or usable:
            rows.append(Row(Problem.from_dict(winner.problem), winner, cells))
    rows.sort(key=lambda row: (row.problem.seq_k, row.winner.problem_key))
    return Table(spec, fingerprint, template_digest, policy, tuple(rows))


def missing_cells(table: Table, configs: Sequence[Config] | None = None) -> list[Missing]:
    """What to measure so that each of `configs` (the winners' if None) is known wherever it is legal."""
    wanted = table.winner_configs if configs is None else configs
    return [
        Missing(row, config)
        for row in table.rows
        for config in wanted
        if row.loss(config) is None and table.spec.broken_constraint(row.problem, config) is None
    ]


def mean_loss(losses: Sequence[float]) -> float:
    """Geometric mean of time ratios, less one; 0 of none."""
    return math.expm1(sum(math.log1p(loss) for loss in losses) / len(losses)) if losses else 0.0


def _belongs(record: TrialRecord | WinnerRecord, spec: KernelSpec, template_digest: str, policy: str) -> bool:
    return (record.family, record.template_digest, record.policy) == (spec.family, template_digest, policy)


def _is_timing(trial: TrialRecord) -> bool:
    return trial.kind == "measured" and trial.provider == "template" and trial.stage in STAGES


def _exact_key(spec: KernelSpec, record: TrialRecord | WinnerRecord) -> str:
    return spec.problem_key(Problem.from_dict(record.problem), bucket=False)


def _seconds(created: str) -> float:
    return datetime.fromisoformat(created).timestamp()


class _Anchor(NamedTuple):
    """One time of the winner's config, with which others of that hour are compared."""

    when: float  # seconds
    raced: bool
    median_us: float


def _cells(winner: WinnerRecord, trials: Sequence[TrialRecord], *, here: bool) -> dict[str, Cell]:
    """Cells by config key; `here` says that the winner's own numbers are of these versions."""
    groups: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        groups[config_key(trial.config)].append(trial)
    own = groups.get(config_key(winner.config), ())
    anchors = [_Anchor(_seconds(t.created), t.stage in RACES, t.median_us) for t in own if _is_time(t) and t.median_us]
    if here:
        anchors.append(_Anchor(_seconds(winner.created), True, winner.median_us))
    ratios: dict[str, tuple[float, Cell]] = {}
    for key, group in groups.items():
        found = _ratio(_decisive(group), anchors)
        if found is not None:
            ratios[key] = found
    if here:
        ratios.update(_own_numbers(winner, ratios.keys()))
    best = _yardstick(ratios.values())
    return {key: _with_loss(cell, ratio / best) for key, (ratio, cell) in ratios.items()}


def _yardstick(ratios: Collection[tuple[float, Cell]]) -> float:
    """The smallest ratio of a race; of a search only where no race succeeded, for a search picks lucky times."""
    raced = [ratio for ratio, cell in ratios if cell.raced and math.isfinite(ratio)]
    return min(raced or [ratio for ratio, _ in ratios if math.isfinite(ratio)], default=1.0)


def _is_time(trial: TrialRecord) -> bool:
    return trial.status == "ok" and bool(trial.median_us)


def _decisive(group: Sequence[TrialRecord]) -> TrialRecord:
    """The newest race, else the newest trial."""
    return max(group, key=lambda trial: (trial.stage in RACES, _seconds(trial.created)))


def _ratio(trial: TrialRecord, anchors: Sequence[_Anchor]) -> tuple[float, Cell] | None:
    """Time over the winner's: taken by the same kind of stage if there is one, and as close in time as there is."""
    raced = trial.stage in RACES
    if not _is_time(trial) or trial.median_us is None:
        return math.inf, Cell(trial.config, math.inf, None, raced, trial)
    when = _seconds(trial.created)
    near = min(anchors, key=lambda anchor: (anchor.raced != raced, abs(anchor.when - when)), default=None)
    if near is None:
        return None
    return trial.median_us / near.median_us, Cell(trial.config, 0.0, trial.median_us, raced, trial)


def _own_numbers(winner: WinnerRecord, known: Iterable[str]) -> dict[str, tuple[float, Cell]]:
    """What the winner's record says of its own config, and of the default where no trial does."""
    found = {config_key(winner.config): (1.0, Cell(winner.config, 0.0, winner.median_us, True, None))}
    default, default_us = winner.default_config, winner.default_median_us
    if default is not None and default_us is not None and config_key(default) not in {*found, *known}:
        cell = Cell(default, 0.0, default_us, True, None)
        found[config_key(default)] = (default_us / winner.median_us, cell)
    return found


def _with_loss(cell: Cell, ratio: float) -> Cell:
    """Faster than every race on its own is noise of the search: it counts as no loss."""
    return Cell(cell.config, max(0.0, ratio - 1.0), cell.median_us, cell.raced, cell.trial)
