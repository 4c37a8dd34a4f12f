"""What the specs of the decode families share: arguments over a paged cache, rules and constraints."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Param, Problem, ProblemRule
from . import _common as c

MAX_NEW_TOKENS = 8
MAX_ROWS = 128  # new tokens times heads of a group, both padded to powers of two

FINISH = Param("finish", ("ticket", "kernel"), "who joins the splits: the last program, or a second kernel", True)
CARRY_PAGE = Param("carry_page", (False, True), "load a tile's pages one step ahead", structural=True, former=False)
HEADS_FIRST = Param(
    "heads_first", (False, True), "kv heads, which share pages, start side by side", structural=True, former=False
)
TABLE_ARGUMENTS = (Argument("table", ("B", "TABLE"), "int32", "table"), Argument("lengths", ("B",), "int32", "lengths"))
COUNTERS = Argument("counters", ("Q", "H"), "int32", "counters")
PROBLEM_FIELDS = (
    *("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "layout"),
    *("page_size", "cache_dtype"),
)

WHOLE_CELLS = ProblemRule(
    "page_size must be a multiple of compress_stride (d)",
    lambda p: p.page_size % p.nsa.compress_stride == 0,
    "Use page_size=64, say.",
)
RULES = (
    *c.ATTENTION_RULES,
    *c.SELECTION_RULES,
    ProblemRule(
        f"a step decodes at most {MAX_NEW_TOKENS} tokens a sequence",
        lambda p: p.seq_q <= MAX_NEW_TOKENS,
        "Use `prefill` for more.",
    ),
    ProblemRule(
        f"new tokens times the group size, each padded to a power of two, must be at most {MAX_ROWS}",
        lambda p: c.next_power_of_2(p.seq_q) * c.next_power_of_2(p.group_size) <= MAX_ROWS,
        "Decode fewer tokens a step.",
    ),
    WHOLE_CELLS,
)


def page_arguments(name: str, rows: str, fill: str, width: str) -> tuple[Argument, Argument]:
    """Pages of keys or values, and their scales."""
    return (
        Argument(name, ("PAGES", rows, "H", width), "cache", fill),
        Argument(f"{name}_scale", ("PAGES", "H"), "float32", "page_scale"),
    )


def cache_bytes(problem: Problem) -> int:
    """Bytes of a cached element."""
    return 1 if problem.has_fp8_cache else ELEMENT_BYTES[problem.dtype]


def tiles_fit(problem: Problem, config: Config) -> bool:
    """Lower bound of shared memory: pipelined key and value tiles, or one of them without a pipeline."""
    size = int(config["BLOCK_N"]) * ELEMENT_BYTES[problem.dtype]
    stages = int(config["num_stages"])
    held = (stages - 1) * (problem.d_qk + problem.d_v) if stages > 1 else max(problem.d_qk, problem.d_v)
    return size * held <= c.SHARED_LIMIT_BYTES


HEADS_SHARE = Constraint(
    "heads_first needs two kv heads or more: one has none beside it",
    lambda p, x: p.num_kv_heads > 1 or not x["heads_first"],
)
TILES_FIT = Constraint("pipelined key and value tiles must fit in 227 KiB of shared memory", tiles_fit)


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches that both decode templates read."""
    return {
        **c.attention_structure(problem, {**config, "use_tma": False}),
        "fp8": problem.has_fp8_cache,
        "finish": config["finish"],
        "carry_page": config["carry_page"],
        "heads_first": config["heads_first"],
        "launch_pdl": config["launch_pdl"],
    }


def small_cases() -> tuple[Problem, ...]:
    """Small ragged problems for the interpreter: odd groups, several new tokens, other page sizes, fp8."""
    small = c.small_cases()[0].replace(layout="paged", batch=4, seq_k=530, seq_q=1)
    return (
        small,
        small.replace(seq_q=3, num_q_heads=10, num_kv_heads=2, d_qk=48, d_v=32, dtype="float32", page_size=16),
        small.replace(seq_q=2, cache_dtype="float8_e4m3fn", page_size=128),
    )


def block_d(problem: Problem, rows: int, splits: int) -> int:
    """Columns of o that one step of joining the splits holds: at most 64 float32 values a thread of four warps."""
    width = problem.d_v & -problem.d_v  # the largest power of two that divides it
    while width > 16 and rows * splits * width > 64 * 128:
        width //= 2
    return width
