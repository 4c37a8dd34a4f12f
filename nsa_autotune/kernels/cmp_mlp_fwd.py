"""Compression of keys or values by an MLP, forward. One tensor a launch: its head dim is the problem's d_qk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, ProblemRule, Value
from . import _common as c
from ._lazy import reference

if TYPE_CHECKING:
    from ..layout import PackedLayout


def _chunks(problem: Problem) -> list[dict[str, int]]:
    """Chunks of the head dim; halved where a float32 tile of W1 would not fit in shared memory."""
    return c.chunks(problem.d_qk, 128 if problem.dtype == "float32" else 256)


def structure(problem: Problem, config: Config) -> dict[str, Any]:
    """Structural switches."""
    return {
        "dtype": problem.dtype,
        "packed": problem.layout == "packed",
        "chunks": _chunks(problem),
        "num_parts": len(_chunks(problem)),
        "dot_precision": c.dot_precision(problem),
    }


def constants(problem: Problem, config: Config) -> dict[str, Value]:
    """tl.constexpr values of the kernel."""
    return {
        "D": problem.d_qk,
        "HIDDEN": problem.phi_hidden,
        "BLOCK_C": config["BLOCK_C"],
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """Both products of every window; each tile reads W1 and W2 through L2 once."""
    keys, nsa = c.num_tokens(problem, "seq_k"), problem.nsa
    rows, size = keys // nsa.compress_stride, ELEMENT_BYTES[problem.dtype]
    fan_in, heads = nsa.compress_block_size * problem.d_qk, problem.num_kv_heads
    weights = (fan_in + problem.d_qk) * problem.phi_hidden * size
    tiles = rows * heads / int(config["BLOCK_C"])
    return Cost(
        flops=2.0 * rows * heads * problem.phi_hidden * (fan_in + problem.d_qk),
        bytes_moved=float(size * (keys + rows) * heads * problem.d_qk + weights),
        on_chip_bytes=tiles * weights + float(rows * heads * fan_in * size),
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The paper's equation in PyTorch; the position encoding is already part of b1."""
    x, w1 = inputs["x"], inputs["w1"]
    phi = reference.PhiWeights(
        position=x.new_zeros(problem.nsa.compress_block_size, problem.d_qk),
        w1=w1,
        b1=inputs["b1"].to(x.dtype),
        w2=inputs["w2"],
        b2=inputs["b2"].to(x.dtype),
    )
    return {"out": reference.compress_mlp(x, phi, problem.nsa, layout=layout)}


def _registers_fit(problem: Problem, config: Config) -> bool:
    rows, width = int(config["BLOCK_C"]), problem.phi_hidden + _chunks(problem)[0]["size"]
    return rows * width / (32 * int(config["num_warps"])) <= c.MAX_THREAD_REGISTERS


def _tiles_fit(problem: Problem, config: Config) -> bool:
    stages, chunk = max(int(config["num_stages"]) - 1, 1), _chunks(problem)[0]["size"]
    tile = chunk * (int(config["BLOCK_C"]) + problem.phi_hidden) * ELEMENT_BYTES[problem.dtype]
    return stages * tile <= c.SHARED_LIMIT_BYTES


def _no_narrow_wgmma(problem: Problem, config: Config) -> bool:
    """Tiles of 64 rows and more are multiplied by WGMMA, on the H100 wrongly if 16 or 32 columns wide (Triton 3.6)."""
    return int(config["BLOCK_C"]) < 64 or all(chunk["size"] >= 64 for chunk in _chunks(problem))


SPEC = KernelSpec(
    family="cmp_mlp_fwd",
    doc="compressed keys or values by a learned MLP with intra-block position encoding",
    arguments=(
        Argument("x", ("K", "H", "D_QK")),
        Argument("w1", ("L_DQK", "HIDDEN"), fill="weight"),
        Argument("b1", ("HIDDEN",), "float32", fill="bias"),
        Argument("w2", ("HIDDEN", "D_QK"), fill="weight"),
        Argument("b2", ("D_QK",), "float32", fill="bias"),
        Argument("out", ("C", "H", "D_QK"), fill="out"),
        c.PACKED_ARGUMENTS["cmp_source"],
    ),
    problem_fields=("batch", "seq_k", "num_kv_heads", "d_qk", "dtype", "layout", "phi_hidden"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_C", (16, 32, 64, 128), "compressed rows a tile"),
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        Constraint("hidden sums and one output tile must fit in 240 registers a thread", _registers_fit),
        Constraint("pipelined tiles must fit in 227 KiB of shared memory", _tiles_fit),
        Constraint("64 rows and more need head dims that split into chunks of at least 64", _no_narrow_wgmma),
    ),
    rules=(
        ProblemRule(
            "the head dim must be a multiple of 16, at most 256, and a sum of at most three powers of two",
            lambda p: c.head_dim_ok(p.d_qk),
            c.PAD_THE_HEAD_DIM,
        ),
        c.PHI_HIDDEN,
    ),
    defaults=lambda problem: {
        "BLOCK_C": 32,
        "num_warps": 4,
        "num_stages": 2 if problem.dtype != "float32" else 1,
        "maxnreg": 0,
    },
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=tuple(case.replace(phi_hidden=32) for case in c.small_cases()),
)
