"""Compression of keys or values by the mean, forward. One tensor a launch: its head dim is the problem's d_qk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, ProblemRule, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    return {
        "dtype": problem.dtype,
        "packed": problem.layout == "packed",
        "chunks": c.chunks(problem.d_qk),
        "num_parts": len(c.chunks(problem.d_qk)),
    }


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        "D": problem.d_qk,
        "BLOCK_C": config["BLOCK_C"],
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """One addition an element of every window; keys are read once and the blocks written once."""
    keys, nsa = c.num_tokens(problem, "seq_k"), problem.nsa
    rows, size = keys // nsa.compress_stride, ELEMENT_BYTES[problem.dtype]
    elements = problem.num_kv_heads * problem.d_qk
    return Cost(
        flops=float(rows * nsa.compress_block_size * elements),
        bytes_moved=float(size * (keys + rows) * elements),
        on_chip_bytes=float(size * rows * nsa.compress_block_size * elements),
        mma_flops=1.0,  # additions do not run on the matrix units
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch."""
    return {"out": reference.compress_mean(inputs["x"], problem.nsa, layout=layout)}


SPEC = KernelSpec(
    family="cmp_pool_fwd",
    doc="compressed keys or values by the mean",
    arguments=(
        Argument("x", ("K", "H", "D_QK")),
        Argument("out", ("C", "H", "D_QK"), fill="out"),
        c.PACKED_ARGUMENTS["cmp_source"],
    ),
    problem_fields=("batch", "seq_k", "num_kv_heads", "d_qk", "dtype", "layout"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_C", (1, 2, 4, 8, 16, 32), "compressed rows a program", reserve=(64,)),
        Param("num_warps", (1, 2, 4, 8), "warps of a program", reserve=(16,)),
        Param("num_stages", (1, 2, 4), "depth of the software pipeline"),
    ),
    constraints=(
        Constraint(
            "sums must fit in 240 registers a thread",
            lambda p, config: (
                int(config["BLOCK_C"]) * p.d_qk / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS / 2
            ),
        ),
    ),
    rules=(
        ProblemRule(
            "the head dim must be a multiple of 16, at most 256, and a sum of at most three powers of two",
            lambda p: c.head_dim_ok(p.d_qk),
            c.PAD_THE_HEAD_DIM,
        ),
    ),
    defaults=lambda problem: {"BLOCK_C": 4, "num_warps": 4, "num_stages": 1},
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=c.small_cases(),
)
