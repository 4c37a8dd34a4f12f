"""What `training.py` writes: sums of parts, marks, ratios to dense attention, memory. Nothing here touches a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nsa_autotune.cli.bench_report import (
    CUDNN,
    FLASH,
    NOT_MEASURED,
    Report,
    Row,
    by_shape,
    facts,
    has_marks,
    markdown_table,
    ms_text,
    reasons,
    seq_text,
    served_text,
    shape_text,
    tflops,
)
from nsa_autotune.spec import Problem

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
SAVING = "forward that saves for the backward"
FAMILIES = "whole backward, sum of families"
STAGES: Mapping[str, str] = {FORWARD: FORWARD, SAVING: FORWARD, BACKWARD: BACKWARD, BOTH: BOTH}  # ours: the libraries'
COMPRESSED, SELECTED, WINDOW = "compressed backward", "selected backward", "window backward"

# ms on an H100 by tokens: batch 1, 64 heads in groups of 16, d 128
MARKS_MS: Mapping[tuple[str, float | None], Mapping[int, float]] = {
    (COMPRESSED, None): {32768: 8.0, 65536: 30.0},
    (SELECTED, 0.0): {8192: 2.9, 32768: 12.5, 65536: 26.0},
    (SELECTED, 0.8): {8192: 2.2, 32768: 9.0, 65536: 19.0},
    (FAMILIES, 0.8): {8192: 4.8, 32768: 20.0, 65536: 58.0},
    (BACKWARD, None): {65536: 90.0},
}
# by group size: random selections, 32k tokens, 4 kv heads of d 128
GROUP_MARKS_MS: Mapping[str, Mapping[int, float]] = {
    "slc_attn_fwd": {1: 4.55, 2: 4.7, 4: 4.75, 8: 4.75},
    SELECTED: {1: 6.05, 2: 6.4, 4: 6.55, 8: 7.55},
}
GROUPS = tuple(GROUP_MARKS_MS[SELECTED])
GROUP_TOKENS, GROUP_KV_HEADS = 32768, 4

NOT_SUPPORTED = "not supported"
COLUMNS = ("work", "seq", "locality", "ms", "p20..p80", "TFLOP/s", "served", "vs cuDNN", "vs FA2", "mark ms")
MEMORY_COLUMNS = ("who", "work", "seq", "kv heads", "inputs GiB", "peak over inputs GiB", "sum GiB")
NUMBERS = tuple({*COLUMNS, *MEMORY_COLUMNS} - {"work", "served", "who", "kv heads"})
NOTES = (
    "ms: median, with the 20th and 80th percentile, of samples on a cold L2 cache. Ours and cuDNN are interleaved.",
    "Fewer samples than named above: FlashAttention-2 from 128k tokens on 3, ours at 256k and 512k tokens 1.",
    f"{FORWARD}: under no_grad. {SAVING}: with gradients enabled.",
    f"{BACKWARD}: torch.autograd.grad of all inputs on a graph that is kept.",
    "Ours has keys and values for each branch; gates are inputs. Importance on random data selects.",
    f"{COMPRESSED}, {SELECTED}, {WINDOW}: sums of the medians of their families, each timed on inputs of its own.",
    f"{FAMILIES}: these three, the gated sum's and the compression's, at a locality; {BACKWARD} has its own selection.",
    "module: NativeSparseAttention with projections and learned compression; gradients of its input and all weights.",
    "locality: of the selections that a family was given; the other families do not depend on it.",
    f"Dense: causal, without projections, on the same heads. Dense {BOTH}: sum of the two medians.",
    "Expanded kv heads: the library takes no groups, so it got as many kv heads as query heads, and returns so many.",
    f"vs: the library's time for the same work over ours; {SAVING} is compared with its forward under no_grad.",
    "TFLOP/s: operations of the cost model over the median; ours counts products that dq and dkv both compute.",
    "served: the steps of the dispatcher's ladder for the line's kernels and those that were timed with it.",
    "inputs: the leaves, and the gradient of the output, held before the call.",
    "peak over inputs: the most that one call added: outputs, saved tensors, gradients and temporaries.",
    "mark: set for an H100; judge it by the GPU named above.",
)


@dataclass(frozen=True)
class Memory:
    """What one call holds on the device."""

    who: str
    work: str
    problem: Problem
    kv_heads: str  # grouped, or expanded to the query heads
    input_bytes: int  # leaves, and the gradient of the output if there is one
    peak_bytes: int | None  # most beyond what was allocated before; None without a GPU


def sum_of(work: str, kind: str, parts: Sequence[Row], locality: float | None = None) -> Row:
    """A line for parts that were timed one by one: the sum of their medians."""
    times = [row.median_us for row in parts if row.median_us is not None]
    missing = [row.reason or f"{row.work} was not measured" for row in parts if row.median_us is None]
    whole = None if missing or not parts else sum(times)
    reason = missing[0] if missing else "" if parts else "it has no parts"
    flops, moved = sum(row.flops for row in parts), sum(row.bytes_moved for row in parts)
    return Row(work, kind, parts[0].problem, locality, flops, moved, {}, (), whole, None, None, reason)


def mark_ms(row: Row) -> float | None:
    """The mark of this line, None where none is set."""
    p = row.problem
    if has_marks(p):
        return MARKS_MS.get((row.work, row.locality), {}).get(p.seq_k)
    is_small = has_marks(p, p.num_q_heads) and p.seq_k == GROUP_TOKENS and row.locality == 0.0
    return GROUP_MARKS_MS.get(row.work, {}).get(p.group_size) if is_small else None


def verdict(row: Row) -> str:
    """Whether the line meets its mark; "" without one."""
    mark = mark_ms(row)
    if mark is None:
        return ""
    return NOT_MEASURED if row.median_us is None else "met" if row.median_us <= mark * 1e3 else "missed"


def ratio(rows: Iterable[Row], row: Row, library: str) -> float | None:
    """A dense library's time for the same work over ours."""
    stage = STAGES.get(row.work.partition(", ")[0])
    if row.kind != "ours" or row.median_us is None or stage is None:
        return None
    same = (other for other in rows if other.work == f"{library} {stage}" and other.problem == row.problem)
    dense = next(same, None)
    return dense.median_us / row.median_us if dense is not None and dense.median_us is not None else None


def cells(rows: Sequence[Row], row: Row) -> list[object]:
    """One line, in the order of COLUMNS."""
    mark, said = mark_ms(row), verdict(row)
    mark_text = "" if mark is None else f"{mark:g} ({said})"
    head = [row.work, seq_text(row.problem.seq_k), "" if row.locality is None else f"{row.locality:g}"]
    if row.median_us is None:
        return [*head, missing_text(row), "", "", "", "", "", mark_text]
    spread = "" if row.p20_us is None or row.p80_us is None else f"{ms_text(row.p20_us)}..{ms_text(row.p80_us)}"
    gains = [ratio(rows, row, library) for library in (CUDNN, FLASH)]
    gain_texts = ["" if gain is None else f"{gain:.2f}x" for gain in gains]
    speed = tflops(row) or None  # a call whose operations nobody counts has none
    return [*head, ms_text(row.median_us), spread, speed, served_text(row.served), *gain_texts, mark_text]


def missing_text(row: Row) -> str:
    """What stands in place of a time."""
    return NOT_SUPPORTED if row.reason.startswith(NOT_SUPPORTED) else NOT_MEASURED


def memory_cells(memory: Memory) -> list[object]:
    """One line, in the order of MEMORY_COLUMNS."""
    peak = memory.peak_bytes
    whole = None if peak is None else peak + memory.input_bytes
    sizes = ["" if size is None else f"{size / 2**30:.2f}" for size in (memory.input_bytes, peak, whole)]
    return [memory.who, memory.work, seq_text(memory.problem.seq_k), memory.kv_heads, *sizes]


def markdown(report: Report, memory: Sequence[Memory], title: str) -> str:
    """The whole page."""
    lines = [f"# {title}", "", *markdown_table(("what", "found"), facts(report), ())]
    for shape, rows in by_shape(report.rows).items():
        lines += ["", f"## {shape}", "", *markdown_table(COLUMNS, [cells(rows, row) for row in rows], NUMBERS)]
        if held := [memory_cells(m) for m in memory if shape_text(m.problem) == shape]:
            lines += ["", *markdown_table(MEMORY_COLUMNS, held, NUMBERS)]
    if missing := reasons(report):
        lines += ["", "## Not measured", *(f"- {reason}" for reason in missing)]
    return "\n".join([*lines, "", "## How to read it", *(f"- {note}" for note in NOTES)]) + "\n"


def to_dict(report: Report, memory: Sequence[Memory]) -> dict[str, Any]:
    """All facts, marks and ratios, ready for JSON."""
    head = report.to_dict()
    for found, row in zip(head["rows"], report.rows, strict=True):
        found["mark_ms"], found["verdict"] = mark_ms(row), verdict(row)
        found["speedup_over"] = {library: ratio(report.rows, row, library) for library in (CUDNN, FLASH)}
    return {**head, "memory": [{**asdict(m), "problem": m.problem.to_dict()} for m in memory]}
