"""What a benchmark found, and what follows from it: rates, shares of the roofline, speed-ups, tables. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..config import NSAConfig
from ..spec import Problem
from .console import cell_text, make_table

SCHEMA = 1
END_TO_END = "whole forward, own selection"
GIVEN_BLOCKS = "whole forward, given blocks"
CUDNN, FLASH = "cudnn_sdpa", "flash_sdpa"
NOT_MEASURED = "not measured"

# ms on an H100 by tokens: batch 1, 64 heads in groups of 16, d 128
MARKS_MS: Mapping[tuple[str, float | None], Mapping[int, float]] = {
    ("cmp_attn_fwd", None): {32768: 2.4, 65536: 8.0},
    ("slc_select_fwd", None): {8192: 0.2, 32768: 1.9, 65536: 7.0},
    ("slc_attn_fwd", 0.0): {8192: 1.5, 32768: 6.7, 65536: 14.0},
    ("slc_attn_fwd", 0.8): {8192: 0.8, 32768: 3.2, 65536: 6.5},
    ("win_attn_fwd", None): {32768: 1.4, 65536: 2.8},
    (GIVEN_BLOCKS, 0.8): {8192: 1.8, 32768: 8.5, 65536: 25.0},
}

COLUMNS = (
    *("work", "seq", "locality", "ms", "p20..p80", "TFLOP/s", "GB/s", "roofline"),
    *("served", "vs cuDNN", "vs FA2", "mark ms"),
)
NUMBERS = ("seq", "locality", "ms", "p20..p80", "TFLOP/s", "GB/s", "roofline", "vs cuDNN", "vs FA2", "mark ms")
NOTES = (
    "ms: median, with the 20th and 80th percentile, of samples on a cold L2 cache; what is compared is interleaved.",
    "TFLOP/s and GB/s: useful operations (no padding, visible keys only) and the fewest bytes, over the median time.",
    "roofline: operations at the measured matrix rate, or bytes at the measured copy rate if that is longer, over ms.",
    "A whole forward counts the operations and bytes of all its kernels, the window and the gated sum as two.",
    "served: the step of the dispatcher's ladder on which the kernels stand; exact is a winner tuned for this problem.",
    "Whole forwards compress by the mean, and their branches share one pair of keys and values.",
    "win_sum_fwd does the work of win_attn_fwd and gate_sum_fwd, and runs in their place where its winner is faster.",
    f"{END_TO_END}: nsa_attention as called; importance on random data selects, so adjacent tokens share few blocks.",
    f"{GIVEN_BLOCKS}: one timed call too; the selection runs, but synthetic blocks of the locality are attended to.",
    f"{CUDNN} and {FLASH}: dense causal attention on the same shapes, without projections; vs: their time over ours.",
    "mark: set for an H100 with d 128, 64 heads in groups of 16; judge it by the GPU named above.",
)


@dataclass(frozen=True)
class Rates:
    """What the device reaches in this run: the roofs."""

    tflops: float  # matrix product of two large squares
    gbps: float  # large copy, bytes read and written

    def least_us(self, flops: float, bytes_moved: float) -> float:
        """Microseconds that the slower of arithmetic and memory takes at full rate."""
        return max(flops / (self.tflops * 1e6), bytes_moved / (self.gbps * 1e3))


@dataclass(frozen=True)
class Row:
    """One measured call; without a time, `reason` says why."""

    work: str
    kind: str  # branch, whole, module or dense
    problem: Problem  # at locality 0
    locality: float | None  # None where the work does not depend on it, or nobody chose it
    flops: float
    bytes_moved: float
    served: Mapping[str, int]  # kernels on each step of the dispatcher's ladder
    samples_us: tuple[float, ...] = ()
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    reason: str = ""

    @property
    def failed(self) -> bool:
        """True for work of ours that did not run; a library may have good reasons."""
        return self.median_us is None and self.kind != "dense"


@dataclass(frozen=True)
class Report:
    """A whole run: where, with what, how, and what came out."""

    fingerprint: Mapping[str, str]
    command: str
    created: str  # ISO, UTC
    tool_version: str
    rounds: int
    untuned: bool
    rates: Mapping[str, Rates]  # by dtype
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """All facts and what follows from them, ready for JSON."""
        head = {
            "schema": SCHEMA,
            "fingerprint": dict(self.fingerprint),
            "command": self.command,
            "created": self.created,
            "tool_version": self.tool_version,
            "rounds": self.rounds,
            "untuned": self.untuned,
            "rates": {dtype: {"tflops": r.tflops, "gbps": r.gbps} for dtype, r in self.rates.items()},
        }
        return {**head, "rows": [self._row_dict(row) for row in self.rows]}

    def _row_dict(self, row: Row) -> dict[str, Any]:
        facts = {name: getattr(row, name) for name in ("work", "kind", "locality", "flops", "bytes_moved", "reason")}
        times = {name: getattr(row, name) for name in ("median_us", "p20_us", "p80_us")}
        return {
            **facts,
            **times,
            "seq": row.problem.seq_k,
            "problem": row.problem.to_dict(),
            "samples_us": list(row.samples_us),
            "served": dict(row.served),
            "tflops": tflops(row),
            "gbps": gbps(row),
            "roofline_share": self.share(row),
            "speedup_over": {library: self.speedup(row, library) for library in (CUDNN, FLASH)},
            "mark_ms": mark_ms(row),
        }

    def share(self, row: Row) -> float | None:
        """Part of the roofline that the row reaches, at most about 1."""
        if row.median_us is None:
            return None
        return self.rates[row.problem.dtype].least_us(row.flops, row.bytes_moved) / row.median_us

    def speedup(self, row: Row, library: str) -> float | None:
        """A dense library's time over that of a whole forward on the same problem."""
        if row.kind != "whole" or row.median_us is None:
            return None
        same = (other for other in self.rows if other.work == library and other.problem == row.problem)
        dense = next(same, None)
        return dense.median_us / row.median_us if dense is not None and dense.median_us is not None else None


def tflops(row: Row) -> float | None:
    """Useful operations a second, in 1e12."""
    return None if row.median_us is None else row.flops / row.median_us / 1e6


def gbps(row: Row) -> float | None:
    """The fewest bytes a second, in 1e9."""
    return None if row.median_us is None else row.bytes_moved / row.median_us / 1e3


def mark_ms(row: Row) -> float | None:
    """The mark of this work, None where none is set."""
    return MARKS_MS.get((row.work, row.locality), {}).get(row.problem.seq_k) if has_marks(row.problem) else None


def has_marks(problem: Problem, num_q_heads: int = 64) -> bool:
    """True for the heads and the constants that marks are set for."""
    p = problem
    shape = (p.layout, p.batch, p.seq_q, p.num_q_heads, p.num_kv_heads, p.d_qk, p.d_v)
    return shape == ("batched", 1, p.seq_k, num_q_heads, 4, 128, 128) and p.dtype != "float32" and p.nsa == NSAConfig()


def cells(report: Report, row: Row) -> tuple[object, ...]:
    """One line of the table, in the order of COLUMNS."""
    head = (row.work, seq_text(row.problem.seq_k), "" if row.locality is None else f"{row.locality:g}")
    if row.median_us is None or row.p20_us is None or row.p80_us is None:
        return (*head, *[""] * 5, NOT_MEASURED, "", "", _mark_text(row))
    share = report.share(row)
    gains = [report.speedup(row, library) for library in (CUDNN, FLASH)]
    return (
        *head,
        ms_text(row.median_us),
        f"{ms_text(row.p20_us)}..{ms_text(row.p80_us)}",
        tflops(row),
        gbps(row),
        "" if share is None else f"{share:.0%}",
        served_text(row.served),
        *("" if gain is None else f"{gain:.2f}x" for gain in gains),
        _mark_text(row),
    )


def ms_text(time_us: float) -> str:
    """Milliseconds with three digits behind the point, fewer for long times."""
    time_ms = time_us / 1e3
    return f"{time_ms:.3f}" if time_ms < 10 else f"{time_ms:.2f}"


def seq_text(tokens: int) -> str:
    """65536 as 64k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def served_text(served: Mapping[str, int]) -> str:
    """The step alone if all kernels stand on one, else how many stand on each."""
    if len(served) == 1:
        return next(iter(served))
    return ", ".join(f"{count} {step}" for step, count in served.items())


def _mark_text(row: Row) -> str:
    mark = mark_ms(row)
    if mark is None:
        return ""
    verdict = NOT_MEASURED if row.median_us is None else "met" if row.median_us <= mark * 1e3 else "not met"
    return f"{mark:g} ({verdict})"


def shape_text(problem: Problem) -> str:
    """What the problems of one table have in common."""
    dims = f"{problem.d_qk}" if problem.d_qk == problem.d_v else f"{problem.d_qk}/{problem.d_v}"
    heads = f"batch {problem.batch}, {problem.num_q_heads} query heads, {problem.num_kv_heads} kv heads, d {dims}"
    nsa = problem.nsa
    sizes = f"l {nsa.compress_block_size}, d {nsa.compress_stride}, l' {nsa.select_block_size}"
    return f"{heads}, {problem.dtype}; {sizes}, n {nsa.num_selected}, w {nsa.window_size}"


def by_shape(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each table, in the order in which they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(shape_text(row.problem), []).append(row)
    return found


def facts(report: Report) -> list[tuple[str, str]]:
    """GPU, versions, command and roofs."""
    f = report.fingerprint
    rates = [f"{dtype} {r.tflops:.0f} TFLOP/s, copy {r.gbps:.0f} GB/s" for dtype, r in report.rates.items()]
    return [
        ("GPU", f"{f['gpu']}, compute capability {f['capability']}"),
        ("driver, CUDA", f"{f['driver']}, {f['cuda']}"),
        ("torch, Triton", " ".join(filter(None, (f"{f['torch']}, {f['triton']}", f.get("assembler"))))),
        ("nsa-autotune", report.tool_version),
        ("date", report.created),
        ("command", report.command),
        ("kernels", "default configs only" if report.untuned else "as the dispatcher serves them"),
        ("rates measured in this run", "; ".join(rates)),
        ("samples", f"at most {report.rounds} a line, at least 5"),
    ]


def reasons(report: Report) -> list[str]:
    """A sentence for each line that has no time."""
    missing = [row for row in report.rows if row.median_us is None]
    return [f"{row.work}, {seq_text(row.problem.seq_k)}, {shape_text(row.problem)}: {row.reason}" for row in missing]


def tables(report: Report) -> list[Table]:
    """Tables for the terminal: the facts, then one for each shape."""
    found = [make_table("benchmark", ("what", "found"), facts(report))]
    for shape, rows in by_shape(report.rows).items():
        found.append(make_table(shape, COLUMNS, [cells(report, row) for row in rows], NUMBERS))
    return found


def markdown(report: Report, title: str) -> str:
    """The whole report as one Markdown page."""
    lines = [f"# {title}", "", *markdown_table(("what", "found"), [list(fact) for fact in facts(report)], ())]
    for shape, rows in by_shape(report.rows).items():
        lines += ["", f"## {shape}", "", *markdown_table(COLUMNS, [cells(report, row) for row in rows], NUMBERS)]
    if missing := reasons(report):
        lines += ["", "## Not measured", *(f"- {reason}" for reason in missing)]
    lines += ["", "## How to read it", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[str]) -> list[str]:
    """Lines of a table; columns named in `numbers` are aligned to the right."""
    rule = ["---:" if name in numbers else "---" for name in columns]
    texts = [[cell_text(cell).replace("\\[", "[").replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (list(columns), rule, *texts)]
