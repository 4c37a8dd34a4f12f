"""Importance and top-n selection, forward: the blocks of every token and kv head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, ProblemRule, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout

POWERS_TO_128 = (1, 2, 4, 8, 16, 32, 64, 128)  # strides a selection block; a tile of keys holds whole ones

ARGUMENTS = (
    Argument("q", ("Q", "HQ", "D_QK")),
    Argument("k", ("C", "H", "D_QK")),
    Argument("lse", ("Q", "HQ"), "float32", fill="lse"),
    Argument("blocks", ("Q", "H", "N"), "int32", fill="out"),
    c.PACKED_ARGUMENTS["q_pos"],
    c.PACKED_ARGUMENTS["cmp_start"],
)


def ratio(problem: Problem) -> int:
    """Compressed strides a selection block: l' / d."""
    return problem.nsa.select_block_size // problem.nsa.compress_stride


def span(problem: Problem) -> int:
    """Compressed strides a window: l / d."""
    return problem.nsa.compress_block_size // problem.nsa.compress_stride


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    nsa = problem.nsa
    return {
        "D_QK": problem.d_qk,
        "H": problem.num_kv_heads,
        "G": problem.group_size,
        "BLOCK_G": c.block_g(problem, config),
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_J": config["BLOCK_J"],
        "CMP_BLOCK": nsa.compress_block_size,
        "CMP_STRIDE": nsa.compress_stride,
        "SELECT_BLOCK": nsa.select_block_size,
        "RATIO": ratio(problem),
        "SPAN": span(problem),
        "N": nsa.num_selected,
        "N_POW2": c.next_power_of_2(nsa.num_selected),
        "NUM_INITIAL": nsa.num_initial,
        "NUM_LOCAL": nsa.num_local,
    }


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches; `overlap`: windows reach into the next selection block."""
    return {**c.attention_structure(problem, config), "overlap": span(problem) > 1}


def defaults(problem: Problem) -> Config:
    """Half-size tiles and pointer loads: works on every GPU from sm_80 on."""
    return {
        "BLOCK_T": min(16, c.default_block_t(problem, 64)),  # more tokens a tile spill in the top-n
        "BLOCK_N": max(64 if problem.d_qk <= 128 and problem.dtype != "float32" else 32, ratio(problem)),
        "BLOCK_J": max(128, c.next_power_of_2(problem.nsa.num_selected)),
        "swap": False,
        "use_tma": False,
        "split_mask": True,
        "programs_per_sm": 2,
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 0,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """QK products over the visible blocks; the scores go out to L2 and back."""
    visible = c.total_positions(problem) / problem.nsa.compress_stride  # (token, block) pairs a kv head
    size, tokens = ELEMENT_BYTES[problem.dtype], c.num_tokens(problem, "seq_q")
    flops = 2 * visible * problem.num_q_heads * problem.d_qk
    rows = c.num_tokens(problem, "seq_k") // problem.nsa.compress_stride
    moved = size * (tokens * problem.num_q_heads + rows * problem.num_kv_heads) * problem.d_qk
    scratch = 24 * visible / ratio(problem) * problem.num_kv_heads  # two float32 sums and a score, written and read
    return Cost(
        flops=flops,
        bytes_moved=moved + 4 * tokens * (problem.num_q_heads + problem.num_kv_heads * problem.nsa.num_selected),
        on_chip_bytes=visible / int(config["BLOCK_T"]) * problem.num_kv_heads * problem.d_qk * size + scratch,
        mma_flops=flops * c.block_g(problem, config) / problem.group_size,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equations in PyTorch."""
    blocks = reference.select_blocks(
        inputs["q"], inputs["k"], inputs["lse"], problem.nsa, seq_k=problem.seq_k, positions=positions, layout=layout
    )
    return {"blocks": blocks}


def _columns_fit(problem: Problem, config: Config) -> bool:
    return int(config["BLOCK_J"]) >= c.next_power_of_2(problem.nsa.num_selected)


def _scores_fit(problem: Problem, config: Config) -> bool:
    scores = c.block_m(problem, config) * int(config["BLOCK_N"])
    return scores / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _candidates_fit(problem: Problem, config: Config) -> bool:
    """Beyond that, ptxas spends minutes on spills."""
    return int(config["BLOCK_T"]) * int(config["BLOCK_J"]) / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _keys_fit(problem: Problem, config: Config) -> bool:
    """Values are not read, and d_v is not in the key."""
    tile = int(config["BLOCK_N"]) * problem.d_qk * ELEMENT_BYTES[problem.dtype]
    return max(int(config["num_stages"]) - 1, 1) * tile <= c.SHARED_LIMIT_BYTES


SPEC = KernelSpec(
    family="slc_select_fwd",
    doc="importance of the selection blocks and the n best",
    arguments=ARGUMENTS,
    scalars=("scale", "seq_k"),
    problem_fields=("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "dtype", "layout"),
    nsa_fields=(
        "compress_block_size",
        "compress_stride",
        "select_block_size",
        "num_selected",
        "num_initial",
        "num_local",
    ),
    params=(
        *c.TILE_PARAMS,
        Param("BLOCK_J", (32, 64, 128, 256), "selection blocks a step of the top-n"),
        c.SWAP,
        c.USE_TMA,
        c.SPLIT_MASK,
        Param(
            "programs_per_sm", (1, 2, 3, 4), "programs of the persistent grid for each multiprocessor", reserve=(6, 8)
        ),
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        Constraint(
            "a tile must have 16 to 128 rows (BLOCK_T tokens times the padded group size), or 256 with swap",
            lambda p, config: 16 <= c.block_m(p, config) <= (256 if config["swap"] else 128),
        ),
        c.NO_IDLE_TOKENS,
        Constraint(
            "BLOCK_N must be a multiple of l'/d, so that a tile holds whole selection blocks",
            lambda p, config: int(config["BLOCK_N"]) % ratio(p) == 0,
        ),
        Constraint("BLOCK_J must hold num_selected (n) candidates", _columns_fit),
        Constraint("one tile of scores must fit in 240 registers a thread", _scores_fit),
        Constraint("one step of the top-n must fit in 240 registers a thread", _candidates_fit),
        Constraint("pipelined key tiles must fit in 227 KiB of shared memory", _keys_fit),
        c.TMA_16_BIT,
    ),
    rules=(
        *c.ATTENTION_RULES,
        *c.SELECTION_RULES,
        ProblemRule(
            "l'/d must be a power of two of at most 128", lambda p: ratio(p) in POWERS_TO_128, "Choose d = l'/4, say."
        ),
    ),
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
