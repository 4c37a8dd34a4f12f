"""What the specs of the kernels that write to a paged cache share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Param, Problem, ProblemRule, Value
from . import _common as c
from . import _paged as g
from ._lazy import paged, paged_append, reference

if TYPE_CHECKING:
    from torch import Tensor

NUM_WARPS = Param("num_warps", (1, 2, 4, 8), "warps of a program")
RESCALED_AT_ONCE = 16  # rows of a page, where its fp8 scale grew


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
    return {"dtype": problem.dtype, "fp8": problem.has_fp8_cache, "launch_pdl": config["launch_pdl"]}


def token_constants(problem: Problem) -> dict[str, Value]:
    """tl.constexpr values of kernels that write tokens: dims padded to powers of two, for nothing is multiplied."""
    values: dict[str, Value] = {"D_QK": problem.d_qk, "D_V": problem.d_v}
    values |= {"BLOCK_QK": c.next_power_of_2(problem.d_qk), "BLOCK_V": c.next_power_of_2(problem.d_v)}
    values |= {"PAGE_SIZE": problem.page_size, "BLOCK_Q": new_token_slots(problem)}
    return {**values, "BLOCK_R": RESCALED_AT_ONCE} if problem.has_fp8_cache else values


def state_pages(name: str, rows: str, width: str) -> tuple[Argument, ...]:
    """paged.Pages of "PAGE" tokens or "CELLS" that the kernel adds to, and their scales."""
    pages, scale = g.page_arguments(name, rows, "state_tokens" if rows == "PAGE" else "state_cells", width)
    return (pages, replace(scale, fill="state_scale"))


TOKENS = (  # new ones, and the pages that they go to
    Argument("k_new", ("Q", "H", "D_QK")),
    Argument("v_new", ("Q", "H", "D_V")),
    *state_pages("k", "PAGE", "D_QK"),
    *state_pages("v", "PAGE", "D_V"),
)


def token_bytes(problem: Problem) -> float:
    """Bytes that a step's new tokens take: read once and written once."""
    elements = problem.batch * problem.seq_q * problem.num_kv_heads * (problem.d_qk + problem.d_v)
    return float(elements * (ELEMENT_BYTES[problem.dtype] + g.cache_bytes(problem)))


def pages_in(inputs: dict[str, Any], name: str) -> paged.Pages:
    """A copy of pages that were given to a reference; fp8 ones that were made wide for it lose their scale."""
    data, scale = inputs[name].clone(), inputs.get(f"{name}_scale")
    if scale is None or data.dtype != paged.FP8:
        return paged.Pages(data if scale is None else data * scale[:, None, :, None])
    return paged.Pages(data, scale.clone())


def values_of(pages: paged.Pages) -> Tensor:
    """All rows of pages as numbers: fp8 ones times their scale, in float32."""
    return pages.data if pages.scale is None else pages.data.float() * pages.scale[:, None, :, None]


def appended(inputs: dict[str, Any], name: str) -> paged.Pages:
    """paged.Pages "k" or "v" after the new tokens were written to them."""
    pages = pages_in(inputs, name)
    paged_append.write_tokens(pages, inputs["table"], inputs["lengths"], inputs[f"{name}_new"])
    return pages


def compressed(
    problem: Problem, inputs: dict[str, Any], raw: paged.Pages, name: str, phi: reference.PhiWeights | None = None
) -> Tensor:
    """What the cells `name` hold, as `values_of`, after the rows were written that the new tokens complete."""
    cells = pages_in(inputs, name)
    paged_append.write_compressed(raw, cells, inputs["table"], inputs["lengths"], problem.seq_q, problem.nsa, phi)
    return values_of(cells)


PROBLEM_FIELDS = (  # not seq_k: what a step writes does not depend on what there is
    *("batch", "seq_q", "num_kv_heads", "d_qk", "d_v", "dtype", "layout", "page_size", "cache_dtype"),
)
RULES = (
    ProblemRule(
        f"a step appends at most {g.MAX_NEW_TOKENS} tokens to a sequence",
        lambda p: p.seq_q <= g.MAX_NEW_TOKENS,
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
        base.replace(d_qk=32, d_v=16, seq_q=8, seq_k=80, dtype="float32"),
    )
