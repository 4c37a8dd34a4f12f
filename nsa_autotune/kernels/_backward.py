"""What the attention backward specs share: arguments, parameters, constraints with their reasons, work counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, Param, Problem, Value
from . import _common as c
from . import _gluon as g
from ._lazy import gradients

if TYPE_CHECKING:
    from ..layout import PackedLayout

NUM_WARPS = Param("num_warps", (4, 8), "warps of a program", reserve=(2, 16))
NUM_STAGES = Param("num_stages", (1, 2, 3, 4), "depth of the software pipeline of the loop's tiles", reserve=(5,))
NUM_SPLITS = Param("num_splits", (1, 2, 4, 8, 16, 32), "programs that share a key tile's query tokens", reserve=(64,))
SPLIT_QUERIES = Param("split_mask", (False, True), "peel off the query tiles that see every key", structural=True)
LOCKSTEP = Param(
    "lockstep", (False, True), "splits take runs of tokens that key tiles walk together", structural=True, former=False
)
DP_FIRST = Param(
    "dp_first", (False, True), "ask for do v^T before exp2, which then runs beside it", structural=True, former=False
)
TMA_QUERIES = Param("use_tma", (False, True), "load query tiles with tensor-memory-access descriptors", structural=True)
ATTENTION_FIELDS = ("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "layout")


def arguments(branch: str, keys: str, out: tuple[Argument, ...], *index: str) -> tuple[Argument, ...]:
    """Arguments of a backward family of one branch; symbol `keys` counts its keys, `index` names index tensors."""
    return (
        Argument("q", ("Q", "HQ", "D_QK")),
        Argument("k", (keys, "H", "D_QK")),
        Argument("v", (keys, "H", "D_V")),
        Argument("do", ("Q", "HQ", "D_V")),
        Argument("lse", ("Q", "HQ"), "float32", fill=f"lse_{branch}"),
        Argument("delta", ("Q", "HQ"), "float32", fill="delta"),
        Argument("gate", ("Q", "HQ"), fill="gates"),
        *out,
        *(c.PACKED_ARGUMENTS[name] for name in index),
    )


DQ = (Argument("dq", ("Q", "HQ", "D_QK"), fill="out"),)


def dkv(keys: str) -> tuple[Argument, ...]:
    """The outputs of a key-major family."""
    return Argument("dk", (keys, "H", "D_QK"), fill="out"), Argument("dv", (keys, "H", "D_V"), fill="out")


def _width(problem: Problem) -> int:
    return problem.d_qk + problem.d_v


def _query_major_registers(problem: Problem, config: Config) -> bool:
    """The accumulator of dq and two score tiles, in float32."""
    rows, width = c.block_m(problem, config), problem.d_qk + 2 * int(config["BLOCK_N"])
    return rows * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _key_major_registers(problem: Problem, config: Config) -> bool:
    """The accumulators of dk and dv and two score tiles, in float32."""
    width = _width(problem) + 2 * c.block_m(problem, config)
    return int(config["BLOCK_N"]) * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _fits_shared(problem: Problem, config: Config, held: int, walked: int) -> bool:
    """Lower bound of shared memory: rows that stay, and pipelined rows of the loop."""
    stages = max(int(config["num_stages"]) - 1, 1)
    size = _width(problem) * ELEMENT_BYTES[problem.dtype]
    return (held + stages * walked) * size <= c.SHARED_LIMIT_BYTES


def _query_major_shared(problem: Problem, config: Config) -> bool:
    return _fits_shared(problem, config, c.block_m(problem, config), int(config["BLOCK_N"]))


def _key_major_shared(problem: Problem, config: Config) -> bool:
    return _fits_shared(problem, config, int(config["BLOCK_N"]), c.block_m(problem, config))


TILES = (
    Param("BLOCK_T", (1, 2, 4, 8, 16, 32, 64, 128), "query tokens a tile"),
    Param("BLOCK_N", (16, 32, 64, 128), "keys a tile"),
)
DQ_PARAMS = (*TILES, c.USE_TMA, c.SPLIT_MASK, *g.DQ, NUM_WARPS, NUM_STAGES, c.MAXNREG)
DKV_PARAMS = (*TILES, NUM_SPLITS, TMA_QUERIES, SPLIT_QUERIES, DP_FIRST, NUM_WARPS, NUM_STAGES, c.MAXNREG)
DQ_CONSTRAINTS = (
    c.ROWS_16_TO_128,
    c.NO_IDLE_TOKENS,
    Constraint("dq and two tiles of scores must fit in 240 registers a thread", _query_major_registers),
    Constraint("query tiles and pipelined key tiles must fit in 227 KiB of shared memory", _query_major_shared),
    c.TMA_16_BIT,
)
RANGE_DQ_CONSTRAINTS = (*DQ_CONSTRAINTS, *g.constraints(g.DQ, use_tma=True))
DKV_TILES = (
    c.ROWS_16_TO_128,
    c.NO_IDLE_TOKENS,
    Constraint("dk, dv and two tiles of scores must fit in 240 registers a thread", _key_major_registers),
    Constraint("key tiles and pipelined query tiles must fit in 227 KiB of shared memory", _key_major_shared),
)
DKV_CONSTRAINTS = (
    *DKV_TILES,
    Constraint(
        "TMA query tiles are for 16-bit types and groups that need no padding",
        lambda p, config: not config["use_tma"] or (p.dtype != "float32" and c.block_g(p, config) == p.group_size),
    ),
)


def dq_defaults(problem: Problem, *, split_mask: bool) -> Config:
    """Half-size tiles and pointer loads: works on every GPU from sm_80 on; float32 holds its operands in registers."""
    exact, wide = problem.dtype == "float32", _width(problem) > 256
    return {
        "BLOCK_T": c.default_block_t(problem, 16 if exact else 64),
        "BLOCK_N": 16 if exact else 32 if wide else 64,
        "use_tma": False,
        "split_mask": split_mask,
        **g.defaults(g.DQ),
        "num_warps": 8 if exact else 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def dq_structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches of dq over ranges of keys."""
    return {**c.attention_structure(problem, config), **g.structure(g.DQ, config)}


def dkv_defaults(problem: Problem, *, split_mask: bool, num_splits: int) -> Config:
    """Half-size tiles and pointer loads: works on every GPU from sm_80 on; float32 holds its operands in registers."""
    exact, wide = problem.dtype == "float32", _width(problem) > 256
    many_rows = problem.group_size > 32
    return {
        "BLOCK_T": c.default_block_t(problem, 16 if exact else 32),
        "BLOCK_N": 16 if exact else 32 if wide else 64,
        "num_splits": num_splits,
        "use_tma": False,
        "split_mask": split_mask,
        "dp_first": False,
        "num_warps": 8 if exact or many_rows else 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def dkv_constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values that all key-major kernels take."""
    return {**c.tile_constants(problem, config), "NUM_SPLITS": config["num_splits"]}


def dkv_structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches of the key-major families that walk ranges of queries."""
    own = {"lockstep": config.get("lockstep", False), "dp_first": config["dp_first"]}
    return {**c.attention_structure(problem, config), **own}


def dq_cost(problem: Problem, config: Config, pairs: float, keys: int, waste: float = 1.0) -> Cost:
    """Three products of `pairs` (query token, key) pairs a kv head; a tile reads its keys through L2 once."""
    size, rows = ELEMENT_BYTES[problem.dtype], c.num_tokens(problem, "seq_q") * problem.num_q_heads
    flops = 2 * pairs * problem.num_q_heads * (2 * problem.d_qk + problem.d_v)
    moved = rows * (2 * problem.d_qk + problem.d_v + 1) + keys * problem.num_kv_heads * _width(problem)
    return Cost(
        flops=flops,
        bytes_moved=float(size * moved + 8 * rows),
        on_chip_bytes=pairs / int(config["BLOCK_T"]) * problem.num_kv_heads * _width(problem) * size,
        mma_flops=flops * waste * c.block_g(problem, config) / problem.group_size,
        tile_rows=c.block_m(problem, config),
        tile_columns=int(config["BLOCK_N"]),
    )


def dkv_cost(problem: Problem, config: Config, pairs: float, keys: int, waste: float = 1.0) -> Cost:
    """Four products of `pairs` (query token, key) pairs a kv head; a key tile reads its queries through L2 once."""
    size, rows = ELEMENT_BYTES[problem.dtype], c.num_tokens(problem, "seq_q") * problem.num_q_heads
    flops = 4 * pairs * problem.num_q_heads * _width(problem)
    key_elements, splits = keys * problem.num_kv_heads * _width(problem), int(config["num_splits"])
    partial_sums = 8.0 * key_elements * splits if splits > 1 else 0.0  # written and read
    moved = size * (rows * (_width(problem) + 1) + 2 * key_elements) + 8 * rows
    return Cost(
        flops=flops,
        bytes_moved=moved + partial_sums,
        on_chip_bytes=pairs / int(config["BLOCK_N"]) * problem.num_q_heads * _width(problem) * size + partial_sums,
        mma_flops=flops * waste * c.block_g(problem, config) / problem.group_size,
        tile_rows=int(config["BLOCK_N"]),  # keys: the scores are transposed
        tile_columns=c.block_m(problem, config),
    )


def run_reference(
    problem: Problem,
    inputs: dict[str, Any],
    layout: PackedLayout | None = None,
    positions: Any = None,
    *,
    branch: str,
    names: tuple[str, ...],
) -> dict[str, Any]:
    """The outputs `names` of one branch's gradients in PyTorch."""
    given = {name: inputs[name] for name in ("q", "k", "v", "do", "lse", "delta", "gate")}
    found = gradients.attention_gradients(
        branch,
        **given,
        config=problem.nsa,
        seq_k=problem.seq_k,
        blocks=inputs.get("blocks"),
        positions=positions,
        layout=layout,
    )
    return {name: found[name] for name in names}


def reference(branch: str, *names: str) -> Callable[..., dict[str, Any]]:
    """`run_reference` of one branch and some of its gradients."""
    return partial(run_reference, branch=branch, names=names)
