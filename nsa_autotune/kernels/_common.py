"""What several specs share: head-dim chunks, parameters, constraints with their reasons, and work counts."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Param, Problem, ProblemRule, Value

SHARED_LIMIT_BYTES = 232_448  # largest dynamic shared memory of any supported GPU (sm_90, sm_100)
MAX_THREAD_REGISTERS = 240  # of 255, some are needed for addresses

NUM_WARPS = Param("num_warps", (2, 4, 8), "warps of a program", reserve=(1, 16))
LAUNCH_PDL = Param(
    "launch_pdl",
    (False, True),
    "start while the kernel before ends: programmatic dependent launch, from sm_90 on",
    structural=True,
    former=False,
)
NUM_STAGES = Param("num_stages", (1, 2, 3, 4), "depth of the software pipeline of key tiles", reserve=(5, 6))
MAXNREG = Param("maxnreg", (0, 128, 168, 224), "registers a thread may use; 0 leaves it to the compiler")
USE_TMA = Param("use_tma", (False, True), "load key tiles with tensor-memory-access descriptors", structural=True)
SPLIT_MASK = Param("split_mask", (False, True), "peel off the key tiles that every row sees whole", structural=True)
LEAN_SOFTMAX = Param(
    "lean_softmax",
    (False, True),
    "scores are scaled in exp2's multiply-add and masked once",
    structural=True,
    former=False,
)
SWAP = Param("swap", (False, True), "transpose the products: S^T = K Q^T", structural=True)

PACKED_ARGUMENTS = {  # index tensors of PackedLayout
    name: Argument(name, (), "int32", fill=name)
    for name in (
        *("q_pos", "k_start", "cmp_start", "cmp_source"),
        *("win_begin", "win_end", "cmp_begin", "cmp_end", "slc_first", "slc_end", "k_pos", "k_cmp"),
    )
}


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def chunks(width: int, largest: int = 256) -> list[dict[str, int]]:
    """A head dim as power-of-two chunks of at most `largest`, largest first: 192 -> 128 + 64."""
    parts: list[dict[str, int]] = []
    offset = 0
    while offset < width:
        size = min(largest, 1 << ((width - offset).bit_length() - 1))
        parts.append({"i": len(parts), "offset": offset, "size": size})
        offset += size
    return parts


def dot_precision(problem: Problem) -> str:
    """Extra argument of tl.dot: float32 inputs are multiplied exactly, not as tf32."""
    return ', input_precision="ieee"' if problem.dtype == "float32" else ""


def block_g(problem: Problem, config: Config) -> int:
    """Rows a token takes: the group size padded to a power of two, and to 16 rows a tile."""
    return max(next_power_of_2(problem.group_size), -(-16 // int(config["BLOCK_T"])))


def block_m(problem: Problem, config: Config) -> int:
    """Rows of a tile."""
    return block_g(problem, config) * int(config["BLOCK_T"])


def score_tile(problem: Problem, config: Config) -> tuple[int, int]:
    """Rows and columns of the tile of scores that a program of an attention family holds."""
    rows, columns = block_m(problem, config), int(config["BLOCK_N"])
    return (columns, rows) if config.get("swap", False) else (rows, columns)


def default_block_t(problem: Problem, rows: int) -> int:
    """Tokens a tile so that it has about `rows` rows."""
    return max(1, rows // next_power_of_2(problem.group_size))


def attention_structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches that all attention templates read."""
    return {
        "dtype": problem.dtype,
        "packed": problem.layout == "packed",
        "use_tma": config["use_tma"],
        "split_mask": config.get("split_mask", False),
        "swap": config.get("swap", False),
        "lean_softmax": config.get("lean_softmax", False),
        "store_lse": True,
        "dot_precision": dot_precision(problem),
        "qk_chunks": chunks(problem.d_qk),
        "v_chunks": chunks(problem.d_v),
        "num_qk_parts": len(chunks(problem.d_qk)),
        "num_v_parts": len(chunks(problem.d_v)),
    }


def head_dim_ok(width: int) -> bool:
    """A multiple of 16 of at most 256 that splits into three chunks or fewer."""
    return width % 16 == 0 and width <= 256 and len(chunks(width)) <= 3


PAD_THE_HEAD_DIM = "Pad the head dim, for example 80 -> 96."
PHI_HIDDEN = ProblemRule(
    "phi_hidden must be a power of two from 16 to 256",
    lambda p: p.phi_hidden in (16, 32, 64, 128, 256),
    "Choose phi_hidden=128, say.",
)
ATTENTION_RULES = (
    ProblemRule(
        "head dims must be multiples of 16, at most 256, and a sum of at most three powers of two",
        lambda p: head_dim_ok(p.d_qk) and head_dim_ok(p.d_v),
        PAD_THE_HEAD_DIM,
    ),
    ProblemRule("the group size must be at most 64", lambda p: p.group_size <= 64, "Use more kv heads."),
)
SELECTION_RULES = (
    ProblemRule(
        "select_block_size (l') must be a power of two from 16 to 256",
        lambda p: p.nsa.select_block_size in (16, 32, 64, 128, 256),
        "Choose select_block_size=64, say.",
    ),
    ProblemRule(
        "num_selected (n) must be at most 64", lambda p: p.nsa.num_selected <= 64, "Choose num_selected=16, say."
    ),
)


def accumulators_fit(problem: Problem, config: Config) -> bool:
    """Output accumulators and one score tile, in float32 registers of the program's threads."""
    rows, width = block_m(problem, config), problem.d_v + int(config["BLOCK_N"])
    return rows * width / (32 * int(config["num_warps"])) <= MAX_THREAD_REGISTERS


def tiles_fit(problem: Problem, config: Config) -> bool:
    """Lower bound of shared memory: pipelined key and value tiles."""
    stages = max(int(config["num_stages"]) - 1, 1)
    tile = int(config["BLOCK_N"]) * (problem.d_qk + problem.d_v) * ELEMENT_BYTES[problem.dtype]
    return stages * tile <= SHARED_LIMIT_BYTES


ROWS_16_TO_128 = Constraint(
    "a tile must have 16 to 128 rows (BLOCK_T tokens times the padded group size)",
    lambda p, c: 16 <= block_m(p, c) <= 128,
)
NO_IDLE_TOKENS = Constraint(
    "BLOCK_T must not pad the group beyond the 16 rows a matrix instruction needs",
    lambda p, c: block_g(p, c) == next_power_of_2(p.group_size) or int(c["BLOCK_T"]) == 1,
)
ACCUMULATORS_FIT = Constraint("accumulators and scores must fit in 240 registers a thread", accumulators_fit)
TILES_FIT = Constraint("pipelined key tiles must fit in 227 KiB of shared memory", tiles_fit)
TMA_16_BIT = Constraint(
    "TMA tiles are for 16-bit types (float32 serves checks only)", lambda p, c: not c["use_tma"] or p.dtype != "float32"
)


TILE_PARAMS = (
    Param("BLOCK_T", (1, 2, 4, 8, 16, 32, 64, 128), "query tokens a tile"),
    Param("BLOCK_N", (16, 32, 64, 128), "keys a tile", reserve=(256,)),
)
TILE_CONSTRAINTS = (ROWS_16_TO_128, NO_IDLE_TOKENS, ACCUMULATORS_FIT, TILES_FIT, TMA_16_BIT)


def attention_arguments(keys: str, start: str, *extra: Argument) -> tuple[Argument, ...]:
    """Arguments of an attention family; symbol `keys` counts its keys, index tensor `start` tells where they begin."""
    return (
        Argument("q", ("Q", "HQ", "D_QK")),
        Argument("k", (keys, "H", "D_QK")),
        Argument("v", (keys, "H", "D_V")),
        *extra,
        Argument("o", ("Q", "HQ", "D_V"), fill="out"),
        Argument("lse", ("Q", "HQ"), "float32", fill="out"),
        PACKED_ARGUMENTS["q_pos"],
        PACKED_ARGUMENTS[start],
    )


def tile_constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values that all attention kernels take."""
    return {
        "D_QK": problem.d_qk,
        "D_V": problem.d_v,
        "G": problem.group_size,
        "BLOCK_G": block_g(problem, config),
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_N": config["BLOCK_N"],
    }


def range_defaults(problem: Problem, *, split_mask: bool) -> Config:
    """Half-size tiles and pointer loads, for attention over a range of keys: works on every GPU from sm_80 on."""
    wide = problem.d_qk + problem.d_v > 256 or problem.dtype == "float32"
    return {
        "BLOCK_T": default_block_t(problem, 64),
        "BLOCK_N": 32 if wide else 64,
        "use_tma": False,
        "split_mask": split_mask,
        "lean_softmax": False,
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def total_positions(problem: Problem) -> float:
    """Sum over queries of the keys before or at them, all sequences: the triangle, bottom-right aligned."""
    sequences = problem.batch
    seq_q, seq_k = problem.seq_q, problem.seq_k
    if problem.layout == "packed":
        seq_q, seq_k = max(1, seq_q // sequences), max(1, seq_k // sequences)
    return sequences * seq_q * (seq_k - (seq_q - 1) / 2)


def num_tokens(problem: Problem, name: str) -> int:
    """Query ("seq_q") or key ("seq_k") tokens in all sequences."""
    value = int(getattr(problem, name))
    return value if problem.layout == "packed" else value * problem.batch


def union_blocks(problem: Problem, tokens: int) -> float:
    """Expected blocks in the union of `tokens` adjacent tokens' selections, from the locality."""
    nsa = problem.nsa
    forced = nsa.num_initial + nsa.num_local
    free = nsa.num_selected - forced
    available = max(1, nsa.num_select_blocks(problem.seq_k) - forced)
    distinct = free * (1 + (tokens - 1) * (1 - problem.locality))
    return min(forced + min(distinct, available), nsa.num_select_blocks(problem.seq_k))


def small_cases() -> tuple[Problem, ...]:
    """Problems of a second or less in the interpreter: odd lengths, odd groups, two dtypes, batched and packed."""
    return (
        Problem(batch=1, seq_q=70, seq_k=70, num_q_heads=4, num_kv_heads=1, d_qk=64, d_v=64, dtype="float16"),
        Problem(batch=2, seq_q=33, seq_k=150, num_q_heads=5, num_kv_heads=1, d_qk=48, d_v=32, dtype="float32"),
        Problem(
            batch=4,
            seq_q=160,
            seq_k=160,
            num_q_heads=2,
            num_kv_heads=2,
            d_qk=32,
            d_v=16,
            dtype="float16",
            layout="packed",
        ),
    )
