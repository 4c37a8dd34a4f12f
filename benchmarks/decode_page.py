"""What `decode.py` writes: bytes, bounds, marks, ratios to dense attention, the page. Nothing here touches a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_autotune.cli.bench_report import (
    CUDNN,
    FLASH,
    NOT_MEASURED,
    Rates,
    Report,
    Row,
    facts,
    markdown_table,
    ms_text,
    seq_text,
    served_text,
    shape_text,
)
from nsa_autotune.config import NSAConfig
from nsa_autotune.spec import ELEMENT_BYTES, Problem

STEP, APPEND, ATTENTION = "step", "append", "attention"
COMPRESSED, GATHERED = "cmp_decode_fwd", "slc_win_decode_fwd"  # the two kernels of attention

# ms in a CUDA graph on an H100, by batch and length: 64 heads, 4 kv heads, d 128, one token, 16-bit cache
MARKS_MS: Mapping[tuple[int, int], float] = {(64, 8192): 0.15, (16, 32768): 0.075, (8, 65536): 0.060, (1, 65536): 0.030}

SUMMARY = (
    *("batch x length", "step, graph ms", "bound us", "of bound", "mark ms", "step, eager ms", "host us"),
    *("fastest dense, graph ms", "in a graph", "eager"),
)
COLUMNS = (
    *("work", "graph ms", "p20..p80", "eager ms", "p20..p80 ", "host us", "MB", "of bound"),
    *("vs cuDNN", "vs FA2", "served"),
)
NUMBERS = tuple({*SUMMARY, *COLUMNS} - {"work", "served"})
NOTES = (
    "graph: replayed from a CUDA graph. eager: launched one by one on a device kept busy, so without the host's time.",
    "Before every launch of both the L2 cache is overwritten. Medians, with the 20th and 80th percentile.",
    "host us: what a call takes on the host, many calls in a row; where it is more than the device's time, it counts.",
    f"{STEP}: {APPEND} of new tokens to a cache that holds them already, in random pages, then {ATTENTION}.",
    "Lengths stay; a model's step also adds to them, one more small launch. No projections on either side.",
    "All sequences have the same length, with which every one completes a compressed row: the longest append.",
    f"{COMPRESSED}, {GATHERED}: the kernels of {ATTENTION} by themselves.",
    "MB: the fewest bytes, of all kv heads: compressed keys and values once, each new token's blocks, and the window.",
    "MB of dense attention: all keys and values. bound: these bytes at the copy rate measured in this run.",
    "Keys are random, so are the selected blocks. Branches share keys and values.",
    f"{CUDNN}, {FLASH}: dense attention of the new tokens to contiguous keys in the problem's dtype; nothing appended.",
    "It has no mask: the last token sees all keys. vs: the fastest of a library's lines over ours, both in a graph.",
    "served: the step of the dispatcher's ladder on which the line's kernels stand.",
    "mark: set for an H100; judge it by the GPU named above.",
)


def keys_read(problem: Problem) -> dict[str, int]:
    """Keys that a sequence and kv head must read, by kernel: compressed rows; selected blocks and the window."""
    nsa, length = problem.nsa, problem.seq_k
    selected = min(problem.seq_q * nsa.num_selected * nsa.select_block_size, length)
    window = min(nsa.window_size + problem.seq_q - 1, length)
    return {COMPRESSED: nsa.num_compressed(length), GATHERED: selected + window}


def moved_bytes(problem: Problem, kinds: Sequence[str] = (COMPRESSED, GATHERED), *, dense: bool = False) -> float:
    """The fewest bytes of keys and values, of all sequences and kv heads; dense ones are in the problem's dtype."""
    keys = problem.seq_k if dense else sum(keys_read(problem)[kind] for kind in kinds)
    fp8 = problem.cache_dtype != "problem" and not dense
    size = 1 if fp8 else ELEMENT_BYTES[problem.dtype]
    return float(problem.batch * problem.num_kv_heads * keys * (problem.d_qk + problem.d_v) * size)


def append_bytes(problem: Problem) -> float:
    """New tokens, read and written; one window read and one compressed row written for each sequence."""
    size = 1 if problem.cache_dtype != "problem" else ELEMENT_BYTES[problem.dtype]
    a_row = problem.num_kv_heads * (problem.d_qk + problem.d_v)
    tokens = problem.seq_q * (ELEMENT_BYTES[problem.dtype] + size)
    return float(problem.batch * a_row * (tokens + size * (problem.nsa.compress_block_size + 1)))


@dataclass(frozen=True)
class Line:
    """One call under both clocks, and what it takes on the host."""

    graph: Row
    eager: Row
    host_us: float | None

    @property
    def work(self) -> str:
        """Its name."""
        return self.graph.work

    @property
    def problem(self) -> Problem:
        """Batch, length and the rest."""
        return self.graph.problem

    @property
    def failed(self) -> bool:
        """True for work of ours that did not run; a library may have good reasons."""
        return self.graph.failed or self.eager.failed


def size_text(problem: Problem) -> str:
    """8x64k."""
    return f"{problem.batch}x{seq_text(problem.seq_k)}"


def bound_us(row: Row, rates: Rates) -> float:
    """Microseconds in which the row's bytes are copied."""
    return row.bytes_moved / (rates.gbps * 1e3)


def share(row: Row, rates: Rates) -> float | None:
    """Part of the bound that the row reaches, at most about 1."""
    return None if row.median_us is None else bound_us(row, rates) / row.median_us


def mark_ms(line: Line) -> float | None:
    """The mark of a step in a graph, None where none is set."""
    p = line.problem
    usual = (p.seq_q, p.num_q_heads, p.num_kv_heads, p.d_qk, p.d_v) == (1, 64, 4, 128, 128) and p.nsa == NSAConfig()
    if line.work != STEP or not usual or p.dtype == "float32" or p.cache_dtype != "problem":
        return None
    return MARKS_MS.get((p.batch, p.seq_k))


def verdict(line: Line) -> str:
    """Whether the line meets its mark; "" without one."""
    mark, time_us = mark_ms(line), line.graph.median_us
    if mark is None:
        return ""
    return NOT_MEASURED if time_us is None else "met" if time_us <= mark * 1e3 else "missed"


def fastest(lines: Iterable[Line], problem: Problem, clock: str, library: str = "") -> Row | None:
    """The fastest dense row of a problem under a clock, of one library or of both."""
    rows = (getattr(line, clock) for line in lines if line.problem == problem and line.work.startswith(library))
    timed = [row for row in rows if row.kind == "dense" and row.median_us is not None]
    return min(timed, key=lambda row: float(row.median_us or 0.0), default=None)


def ratio(lines: Iterable[Line], line: Line, clock: str, library: str = "") -> float | None:
    """Dense attention's time over that of our step, or of its attention."""
    time_us = getattr(line, clock).median_us
    dense = fastest(lines, line.problem, clock, library)
    if line.work not in (STEP, ATTENTION) or time_us is None or dense is None or dense.median_us is None:
        return None
    return float(dense.median_us / time_us)


def _gain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _ms(row: Row | None) -> str:
    return NOT_MEASURED if row is None or row.median_us is None else ms_text(row.median_us)


def _spread(row: Row) -> str:
    return "" if row.p20_us is None or row.p80_us is None else f"{ms_text(row.p20_us)}..{ms_text(row.p80_us)}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _host(line: Line) -> str:
    return "" if line.host_us is None else f"{line.host_us:.1f}"


def summary_cells(lines: Sequence[Line], line: Line, rates: Rates) -> list[object]:
    """One step, in the order of SUMMARY."""
    mark, said, dense = mark_ms(line), verdict(line), fastest(lines, line.problem, "graph")
    return [
        size_text(line.problem),
        _ms(line.graph),
        f"{bound_us(line.graph, rates):.1f}",
        _percent(share(line.graph, rates)),
        "" if mark is None else f"{mark:g} ({said})",
        _ms(line.eager),
        _host(line),
        _ms(dense) if dense is None else f"{_ms(dense)} ({dense.work})",
        *(_gain(ratio(lines, line, clock)) for clock in ("graph", "eager")),
    ]


def cells(lines: Sequence[Line], line: Line, rates: Rates) -> list[object]:
    """One line, in the order of COLUMNS."""
    g, e = line.graph, line.eager
    moved = f"{g.bytes_moved / 1e6:.2f}"
    gains = [_gain(ratio(lines, line, "graph", library)) for library in (CUDNN, FLASH)]
    measured = [_ms(g), _spread(g), _ms(e), _spread(e), _host(line), moved, _percent(share(g, rates))]
    return [line.work, *measured, *gains, served_text(g.served)]


def markdown(report: Report, lines: Sequence[Line], title: str) -> str:
    """The whole page."""
    rates = next(iter(report.rates.values()))
    problems = list(dict.fromkeys(line.problem for line in lines))
    steps = [summary_cells(lines, line, rates) for line in lines if line.work == STEP]
    page = [f"# {title}", "", *markdown_table(("what", "found"), [*facts(report), *cache_facts(problems)], ())]
    page += ["", "## Steps", "", *markdown_table(SUMMARY, steps, NUMBERS)]
    for problem in problems:
        rows = [cells(lines, line, rates) for line in lines if line.problem == problem]
        page += ["", f"## {size_text(problem)}", "", *markdown_table(COLUMNS, rows, NUMBERS)]
    missing = [
        f"- {line.work}, {size_text(line.problem)}, {clock}: {row.reason}"
        for line in lines
        for clock, row in (("graph", line.graph), ("eager", line.eager))
        if row.median_us is None
    ]
    page += ["", "## Not measured", *missing] if missing else []
    return "\n".join([*page, "", "## How to read it", *(f"- {note}" for note in NOTES)]) + "\n"


def cache_facts(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """What all problems of a page have in common."""
    p = problems[0]
    cache = p.dtype if p.cache_dtype == "problem" else p.cache_dtype
    shape = shape_text(p).partition(", ")[2]  # without the batch
    return [("shape", shape), ("cache", f"{cache}, {p.page_size} tokens a page, {p.seq_q} new tokens a sequence")]


def to_dict(report: Report, lines: Sequence[Line]) -> dict[str, Any]:
    """All facts, bounds, marks and ratios, ready for JSON."""
    rates = next(iter(report.rates.values()))
    head = {name: value for name, value in report.to_dict().items() if name != "rows"}
    return {**head, "lines": [_line_dict(lines, line, rates) for line in lines]}


def _line_dict(lines: Sequence[Line], line: Line, rates: Rates) -> dict[str, Any]:
    clocks = ("graph", "eager")
    gains = {clock: {lib: ratio(lines, line, clock, lib) for lib in (CUDNN, FLASH)} for clock in clocks}
    return {
        "work": line.work,
        "kind": line.graph.kind,
        "problem": line.problem.to_dict(),
        "bytes_moved": line.graph.bytes_moved,
        "flops": line.graph.flops,
        "bound_us": bound_us(line.graph, rates),
        "share_of_bound": share(line.graph, rates),
        "host_us": line.host_us,
        "served": dict(line.graph.served),
        "speedup_over": gains,
        "mark_ms": mark_ms(line),
        "verdict": verdict(line),
        **{clock: _times(getattr(line, clock)) for clock in clocks},
    }


def _times(row: Row) -> dict[str, Any]:
    times = {name: getattr(row, name) for name in ("median_us", "p20_us", "p80_us", "reason")}
    return {**times, "samples_us": list(row.samples_us)}
