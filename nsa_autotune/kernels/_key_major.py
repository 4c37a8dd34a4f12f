"""What the key-major order of selected attention adds to a spec: parameters, constraints and work counts.

A program takes one block of keys and CHUNK of the entries (token, slot) that selected it; each has a partial result.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import ELEMENT_BYTES, Config, Constraint, Cost, Param, Problem
from . import _common as c

ORDER = "key_major"
OTHER_SWITCHES = ("swap", "use_tma", "split_mask", "lean_softmax")  # of the orders that walk keys
SCRATCH_LIMIT_BYTES = 4 << 30  # of the partial results of one run

CHUNK = Param(
    "CHUNK", (256, 512, 1024, 2048), "key_major: entries of a block's list that one program walks", former=1024
)
NUM_RUNS = Param(
    "num_runs", (1, 2, 4, 8, 16, 32), "key_major: runs of tokens, one after the other in one scratch", former=1
)


def is_on(config: Config) -> bool:
    """True if programs take blocks of keys."""
    return config["loop_order"] == ORDER


def defaults() -> Config:
    """The values of other loop orders, in which both mean nothing."""
    return {param.name: param.former for param in (CHUNK, NUM_RUNS) if param.former is not None}


def num_entries(problem: Problem) -> int:
    """Entries (token, kv head, slot) of the whole selection, unused ones included."""
    return c.num_tokens(problem, "seq_q") * problem.num_kv_heads * problem.nsa.num_selected


def partial_bytes(problem: Problem, width: int) -> int:
    """Partial results of all entries, of `width` values in the problem's dtype."""
    return num_entries(problem) * problem.group_size * width * ELEMENT_BYTES[problem.dtype]


def _keys(problem: Problem) -> int:
    """Keys of a score tile: a packed block may begin anywhere in its place, and so needs twice as many."""
    return problem.nsa.select_block_size * (2 if problem.layout == "packed" else 1)


def _fits(problem: Problem, config: Config, width: int, tiles: int) -> bool:
    """`tiles` score tiles and an accumulator of `width` in registers; a block and pipelined rows in shared memory."""
    rows, keys, size = c.block_m(problem, config), _keys(problem), ELEMENT_BYTES[problem.dtype]
    values = rows * (width + tiles * keys) / (32 * int(config["num_warps"]))
    walked = problem.d_qk + (problem.d_v if tiles > 1 else 0)  # the backward reads do beside q
    stages = max(int(config["num_stages"]) - 1, 1)
    shared = (keys * (problem.d_qk + problem.d_v) + stages * rows * walked) * size
    return values <= c.MAX_THREAD_REGISTERS and shared <= c.SHARED_LIMIT_BYTES


def work(problem: Problem, config: Config, base: Cost, read: int, written: int) -> Cost:
    """A family's cost in this order: values that an entry reads, and those of its partial result, twice."""
    size, partial = ELEMENT_BYTES[problem.dtype], 2.0 * partial_bytes(problem, written)
    rows = num_entries(problem) * problem.group_size * read * size
    keys = num_entries(problem) / int(config["CHUNK"]) * _keys(problem) * (problem.d_qk + problem.d_v) * size
    padded = c.block_g(problem, config) / problem.group_size * _keys(problem) / problem.nsa.select_block_size
    return replace(
        base,
        bytes_moved=base.bytes_moved + partial + 16.0 * num_entries(problem),
        on_chip_bytes=rows + keys + partial,
        mma_flops=base.flops * padded,
    )


def _scratch_fits(problem: Problem, config: Config, width: int) -> bool:
    runs = int(config["num_runs"])
    return partial_bytes(problem, width) <= runs * SCRATCH_LIMIT_BYTES and num_entries(problem) < 2**31


def constraints(width: str, tiles: int) -> tuple[Constraint, ...]:
    """What key_major asks for; partial results have as many values as the head dim `width` says."""
    return (
        Constraint(
            f"CHUNK and num_runs are for key_major; other loop orders say {CHUNK.former} and {NUM_RUNS.former}",
            lambda p, x: is_on(x) or all(x[name] == value for name, value in defaults().items()),
        ),
        Constraint(
            "key_major takes whole blocks: BLOCK_N must be select_block_size (l')",
            lambda p, x: not is_on(x) or x["BLOCK_N"] == p.nsa.select_block_size,
        ),
        Constraint(
            "key_major loads a block once and masks it always: no swap, use_tma, split_mask or lean_softmax",
            lambda p, x: not is_on(x) or not any(x.get(name) for name in OTHER_SWITCHES),
        ),
        Constraint(
            "key_major's keys, values, scores and accumulator must fit in shared memory and 240 registers a thread",
            lambda p, x: not is_on(x) or _fits(p, x, getattr(p, width), tiles),
        ),
        Constraint(
            "key_major's partial results of a run must fit in 4 GiB, and its lists count in int32",
            lambda p, x: not is_on(x) or _scratch_fits(p, x, getattr(p, width)),
        ),
    )
