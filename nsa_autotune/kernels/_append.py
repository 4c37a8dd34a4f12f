"""What the specs of the kernels that write to a paged cache share."""

from __future__ import annotations

from typing import Any

from ..spec import ELEMENT_BYTES, Argument, Config, Param, Problem, ProblemRule, Value
from . import _common as c

MOST_NEW_TOKENS = 8  # of a sequence and step
NUM_WARPS = Param("num_warps", (1, 2, 4, 8), "warps of a program")
RESCALED_AT_ONCE = 16  # rows of a page, where its fp8 scale grew
TABLE = (
    Argument("block_table", ("B", "TABLE"), "int32", fill="table"),
    Argument("lengths", ("B",), "int32", fill="lengths"),
)


def is_fp8(problem: Problem) -> bool:
    """True if the pages hold float8_e4m3fn."""
    return problem.cache_dtype != "problem"


def cache_bytes(problem: Problem) -> int:
    """Bytes of an element of a page."""
    return 1 if is_fp8(problem) else ELEMENT_BYTES[problem.dtype]


def new_token_slots(problem: Problem) -> int:
    """New tokens of a sequence, rounded up to a power of two: lengths of one key get one kernel."""
    return c.next_power_of_2(problem.seq_q)


def new_row_slots(problem: Problem) -> int:
    """Compressed rows that the new tokens of a sequence may complete, a power of two."""
    return c.next_power_of_2(-(-new_token_slots(problem) // problem.nsa.compress_stride))


def completed_rows(problem: Problem) -> float:
    """Compressed rows that a step completes, in all sequences and on average."""
    return problem.batch * problem.seq_q / problem.nsa.compress_stride


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    return {"dtype": problem.dtype, "fp8": is_fp8(problem)}


def widths(problem: Problem) -> dict[str, Value]:
    """Head dims, and the powers of two that hold them: nothing is multiplied, so that they need not be split."""
    dims = {"D_QK": problem.d_qk, "D_V": problem.d_v}
    values = {**dims, "BLOCK_QK": c.next_power_of_2(problem.d_qk), "BLOCK_V": c.next_power_of_2(problem.d_v)}
    return {**values, "BLOCK_R": RESCALED_AT_ONCE} if is_fp8(problem) else values


def pool_constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernels that append means."""
    nsa = problem.nsa
    return {
        **widths(problem),
        "PAGE_SIZE": problem.page_size,
        "BLOCK_C": new_row_slots(problem),
        "BLOCK_L": config["BLOCK_L"],
        "CMP_BLOCK": nsa.compress_block_size,
        "CMP_STRIDE": nsa.compress_stride,
    }


def pages(name: str, rows: str, width: str, fill: str, scale_fill: str) -> tuple[Argument, Argument]:
    """Pages of "PAGE" tokens or "CELLS", and the scales that they have if fp8: k_pages, k_scale; k_cmp, k_cmp_scale."""
    scale = f"{name.removesuffix('_pages')}_scale"
    return (
        Argument(name, ("PAGES", rows, "H", width), "cache", fill=fill),
        Argument(scale, ("PAGES", "H"), "float32", fill=scale_fill),
    )


def read_pages(name: str, width: str) -> tuple[Argument, Argument]:
    """Pages of tokens that the kernel reads."""
    return pages(name, "PAGE", width, "tokens", "page_scale")


def state_tokens(name: str, width: str) -> tuple[Argument, Argument]:
    """Pages of tokens that the kernel adds to."""
    return pages(name, "PAGE", width, "state_tokens", "state_scale")


def state_cells(name: str, width: str) -> tuple[Argument, Argument]:
    """Pages of compressed rows that the kernel adds to."""
    return pages(name, "CELLS", width, "state_cells", "state_scale")


PROBLEM_FIELDS = (
    *("batch", "seq_q", "seq_k", "num_kv_heads", "d_qk", "d_v", "dtype", "layout", "page_size", "cache_dtype"),
)
RULES = (
    ProblemRule(
        f"a step appends at most {MOST_NEW_TOKENS} tokens to a sequence",
        lambda p: p.seq_q <= MOST_NEW_TOKENS,
        "Longer runs of tokens are a prefill.",
    ),
    ProblemRule(
        "head dims must be multiples of 16, at most 256",
        lambda p: max(p.d_qk, p.d_v) <= 256 and (p.d_qk | p.d_v) % 16 == 0,
    ),
)


def small_cases() -> tuple[Problem, ...]:
    """Problems of a second or less in the interpreter."""
    base = Problem(batch=4, seq_q=1, seq_k=70, num_q_heads=2, num_kv_heads=2, dtype="float16", layout="paged")
    return (
        base.replace(d_qk=64, d_v=64, page_size=16),
        base.replace(d_qk=48, d_v=32, seq_q=3, page_size=32, cache_dtype="float8_e4m3fn"),
        base.replace(d_qk=32, d_v=16, seq_q=8, seq_k=40, dtype="float32"),
    )


WHOLE_CELLS = ProblemRule(
    "compress_stride (d) must divide the page size",
    lambda p: p.page_size % p.nsa.compress_stride == 0,
    "Choose pages of 64 tokens, say.",
)
PHI_HIDDEN = ProblemRule(
    "phi_hidden must be a power of two from 16 to 256",
    lambda p: p.phi_hidden in (16, 32, 64, 128, 256),
    "Choose phi_hidden=128, say.",
)
