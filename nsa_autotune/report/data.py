"""What the page shows, as facts: winners with their place under the roofs, searches, speed-ups. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from ..db.records import TrialRecord, WinnerRecord
from ..errors import NSAError
from ..search.guess import gpu_of
from ..search.mirror import TrialGroup, importances
from ..search.roofline import GpuModel
from ..spec import KernelSpec, Problem
from .text import shape_text

MAX_SEARCHES = 200  # problems whose search is drawn, the newest ones


@dataclass(frozen=True)
class Keys:
    """What the page is filtered by; `seq` counts keys, None stands for several lengths."""

    gpu: str
    family: str
    dtype: str
    policy: str
    seq: int | None


@dataclass(frozen=True)
class Rates:
    """What a winner reaches, and what its GPU's data sheet allows at this intensity."""

    tflops: float  # useful operations over the median
    tbps: float  # fewest bytes through device memory over the median, 1e12 bytes/s
    intensity: float  # operations a byte
    roof_tflops: float
    share: float  # of the roof


@dataclass(frozen=True)
class WinnerRow:
    """A winner with its evidence."""

    keys: Keys
    shape: str
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    default_us: float | None
    library: str
    library_us: float | None
    rates: Rates | None  # None where the family's cost or the GPU's data sheet is not known
    verdict: str
    tied: int
    config: dict[str, Any]
    rivals: tuple[dict[str, Any], ...]
    fingerprint: dict[str, str]
    created: str
    tool_version: str
    source: str
    stale: bool  # the template has changed since: it is no longer served

    @property
    def spread(self) -> float:
        """Width between the 20th and the 80th percentile over the median."""
        return (self.p80_us - self.p20_us) / self.median_us


@dataclass(frozen=True)
class Search:
    """The trials of one problem in the order of their making."""

    keys: Keys
    shape: str
    template_digest: str
    stale: bool
    times_us: tuple[float | None, ...]  # None is a failure
    failures: tuple[tuple[str, int], ...]  # status and how often, most frequent first
    default_us: float | None  # of the default config, if it was tried
    importances: tuple[tuple[str, float], ...] | None  # shares that sum to 1; None for too few trials
    first: str  # when, ISO 8601
    last: str

    @property
    def best_so_far(self) -> tuple[tuple[int, float], ...]:
        """Number of the trial, from 1, and time in us, wherever a trial beat all before it."""
        found: list[tuple[int, float]] = []
        for number, time_us in enumerate(self.times_us, start=1):
            if time_us is not None and (not found or time_us < found[-1][1]):
                found.append((number, time_us))
        return tuple(found)


@dataclass(frozen=True)
class Speedup:
    """A library's time over ours on one problem, measured in one run."""

    keys: Keys
    shape: str
    work: str  # what was timed
    library: str
    ours_us: float
    library_us: float
    created: str
    origin: str  # file, or `winner`

    @property
    def ratio(self) -> float:
        """Above 1 where ours is faster."""
        return self.library_us / self.ours_us


@dataclass(frozen=True)
class Report:
    """All that one page shows."""

    database: str
    created: str  # when the page was made, ISO 8601
    tool_version: str
    winners: tuple[WinnerRow, ...] = ()
    searches: tuple[Search, ...] = ()
    speedups: tuple[Speedup, ...] = ()
    gpus: tuple[tuple[str, GpuModel], ...] = ()  # GPUs of winners whose data sheet is known
    notes: tuple[str, ...] = ()  # what was left out, in sentences


def winner_rows(
    records: Iterable[WinnerRecord], specs: Mapping[str, KernelSpec], templates: Mapping[str, str]
) -> tuple[WinnerRow, ...]:
    """Winners by GPU, family in the order of the pipeline, and length; `templates` are the current digests."""
    order = {family: place for place, family in enumerate(specs)}
    rows = [_winner_row(record, specs.get(record.family), templates) for record in records]
    return tuple(
        sorted(
            rows,
            key=lambda row: (
                row.keys.gpu,
                order.get(row.keys.family, len(order)),
                row.keys.family,
                row.keys.seq,
                row.shape,
                row.created,
            ),
        )
    )


def _winner_row(record: WinnerRecord, spec: KernelSpec | None, templates: Mapping[str, str]) -> WinnerRow:
    problem = Problem.from_dict(record.problem)
    return WinnerRow(
        keys=_keys(record, problem),
        shape=shape_text(problem, spec),
        median_us=record.median_us,
        p20_us=record.p20_us,
        p80_us=record.p80_us,
        samples=len(record.samples_us),
        default_us=record.default_median_us,
        library=record.library,
        library_us=record.library_median_us,
        rates=rates_of(record, problem, spec),
        verdict=record.verdict,
        tied=len(record.tied),
        config=record.config,
        rivals=record.rivals,
        fingerprint=record.fingerprint,
        created=record.created,
        tool_version=record.tool_version,
        source=record.source,
        stale=templates.get(record.family) != record.template_digest,
    )


def rates_of(record: WinnerRecord, problem: Problem, spec: KernelSpec | None) -> Rates | None:
    """The winner's place under the roofs of its GPU's data sheet; None if one of the three is not known."""
    gpu = gpu_of(record.fingerprint)
    if gpu is None or spec is None or spec.broken_constraint(problem, record.config) is not None:
        return None
    try:
        cost = spec.cost(problem, record.config)
    except ArithmeticError:  # of sizes that no GPU holds
        return None
    intensity = cost.flops / cost.bytes_moved
    roof = min(peak_tflops(gpu, problem.dtype), intensity * gpu.hbm_tbps)
    tflops = cost.flops / record.median_us / 1e6
    found = Rates(tflops, cost.bytes_moved / record.median_us / 1e6, intensity, roof, tflops / roof)
    return found if all(map(math.isfinite, astuple(found))) else None


def peak_tflops(gpu: GpuModel, dtype: str) -> float:
    """The flat roof: matrix units, or vector units for float32."""
    return gpu.vector_tflops if dtype == "float32" else gpu.mma_tflops


def searches(
    groups: Sequence[TrialGroup], specs: Mapping[str, KernelSpec], templates: Mapping[str, str]
) -> tuple[Search, ...]:
    """The newest MAX_SEARCHES searches, by GPU, family and length."""
    parts = [tuple(r for r in group.records if r.stage == "search") for group in groups]
    newest = sorted((part for part in parts if part), key=lambda part: part[-1].created, reverse=True)[:MAX_SEARCHES]
    found = [_search(part, specs.get(part[0].family), templates) for part in newest]
    return tuple(sorted(found, key=lambda s: (s.keys.gpu, s.keys.family, s.keys.seq, s.shape, s.first)))


def _search(records: Sequence[TrialRecord], spec: KernelSpec | None, templates: Mapping[str, str]) -> Search:
    first, problem = records[0], Problem.from_dict(records[0].problem)
    failures = Counter(record.status for record in records if not record.median_us)
    shares = importances(records)
    return Search(
        keys=_keys(first, problem),
        shape=shape_text(problem, spec),
        template_digest=first.template_digest,
        stale=templates.get(first.family) != first.template_digest,
        times_us=tuple(record.median_us or None for record in records),  # 0 is no time
        failures=tuple(failures.most_common()),
        default_us=_default_us(records, problem, spec),
        importances=None if shares is None else tuple(shares.items()),
        first=first.created,
        last=records[-1].created,
    )


def _default_us(records: Sequence[TrialRecord], problem: Problem, spec: KernelSpec | None) -> float | None:
    if spec is None:
        return None
    try:
        default = spec.default_config(problem)
    except NSAError:  # the family no longer serves this problem
        return None
    return next((r.median_us for r in records if r.config == default and r.median_us is not None), None)


def library_speedups(rows: Iterable[WinnerRow]) -> tuple[Speedup, ...]:
    """Winners over the library that was measured beside them."""
    return tuple(
        Speedup(row.keys, row.shape, row.keys.family, row.library, row.median_us, row.library_us, row.created, "winner")
        for row in rows
        if row.library and row.library_us is not None and 0 < row.library_us / row.median_us < math.inf
    )


def known_gpus(records: Iterable[WinnerRecord]) -> tuple[tuple[str, GpuModel], ...]:
    """The GPUs that winners come from with their data sheets, by name; those without one are left out."""
    found = {record.fingerprint["gpu"]: gpu_of(record.fingerprint) for record in records}
    return tuple((name, gpu) for name, gpu in sorted(found.items()) if gpu is not None)


def _keys(record: TrialRecord | WinnerRecord, problem: Problem) -> Keys:
    return Keys(record.fingerprint["gpu"], record.family, problem.dtype, record.policy, problem.seq_k)
