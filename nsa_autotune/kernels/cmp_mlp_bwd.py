"""Compression of keys or values by an MLP, backward. One tensor a launch: its head dim is the problem's d_qk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..spec import ELEMENT_BYTES, Argument, Config, Constraint, Cost, KernelSpec, Param, Problem, Value
from . import _common as c
from . import cmp_mlp_fwd
from ._lazy import gradients

if TYPE_CHECKING:
    from ..layout import PackedLayout

NUM_SPLITS = Param("num_splits", (1, 2, 4, 8, 16), "parts in which the rows are summed to the gradients of the weights")


def _chunks(problem: Problem) -> list[dict[str, int]]:
    """Chunks of the head dim; smaller where a tile of W1 or W2 beside the sums would not fit."""
    return c.chunks(problem.d_qk, 64 if problem.dtype == "float32" else 128)


def _block_d(problem: Problem) -> int:
    """Columns of W1's gradient by head dim: the largest power of two that divides it."""
    return min(problem.d_qk & -problem.d_qk, 64 if problem.dtype == "float32" else 128)


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
    """tl.constexpr values of the kernels."""
    return {
        "D": problem.d_qk,
        "HIDDEN": problem.phi_hidden,
        "BLOCK_C": config["BLOCK_C"],
        "BLOCK_R": config["BLOCK_R"],
        "BLOCK_D": _block_d(problem),
        "BLOCK_H": min(problem.phi_hidden, 128),
        "CMP_BLOCK": problem.nsa.compress_block_size,
        "CMP_STRIDE": problem.nsa.compress_stride,
    }


def cost(problem: Problem, config: Config) -> Cost:
    """The forward's first product again, its two gradients, and three products with W2's size."""
    keys, nsa = c.num_tokens(problem, "seq_k"), problem.nsa
    rows, size = keys // nsa.compress_stride * problem.num_kv_heads, ELEMENT_BYTES[problem.dtype]
    fan_in, hidden = nsa.compress_block_size * problem.d_qk, problem.phi_hidden
    weights, tokens = (fan_in + problem.d_qk) * hidden, keys * problem.num_kv_heads * problem.d_qk
    scratch = 4.0 * rows * hidden  # h and dpre, written and read
    partial = 4.0 * weights * int(config["num_splits"])
    return Cost(
        flops=2.0 * rows * hidden * (3 * fan_in + 2 * problem.d_qk),
        bytes_moved=size * (3.0 * tokens + 2 * rows * problem.d_qk + scratch + 2 * weights),
        on_chip_bytes=size * 2.0 * rows * (fan_in + weights / int(config["BLOCK_C"])) + 2 * partial,
    )


def run_reference(
    problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None = None, positions: Any = None
) -> dict[str, Any]:
    """The gradients in PyTorch; the position encoding is already part of b1."""
    x, w1, b1, w2, dout = (inputs[name] for name in ("x", "w1", "b1", "w2", "dout"))
    return dict(gradients.mlp_gradients(x, w1, b1, w2, dout, problem.nsa, layout=layout))


def _registers_fit(problem: Problem, config: Config) -> bool:
    threads, rows = 32 * int(config["num_warps"]), int(config["BLOCK_C"])
    hidden_sums = rows * 2 * problem.phi_hidden  # pre-activation and its gradient
    token_sums = rows * problem.d_qk
    weight_sums = _block_d(problem) * min(problem.phi_hidden, 128)
    return max(hidden_sums, token_sums, weight_sums) / threads <= c.MAX_THREAD_REGISTERS


def _tiles_fit(problem: Problem, config: Config) -> bool:
    stages, chunk = max(int(config["num_stages"]) - 1, 1), _chunks(problem)[0]["size"]
    row_tiles = chunk * (int(config["BLOCK_C"]) + problem.phi_hidden)
    weight_tiles = int(config["BLOCK_R"]) * (_block_d(problem) + min(problem.phi_hidden, 128))
    return stages * max(row_tiles, weight_tiles) * ELEMENT_BYTES[problem.dtype] <= c.SHARED_LIMIT_BYTES


def defaults(problem: Problem) -> Config:
    """Tiles that fill no thread's registers with eight warps: the pre-activation and its gradient are held at once."""
    exact = problem.dtype == "float32"  # multiplied without matrix units, operands in registers
    wide = max(problem.phi_hidden, problem.d_qk) > 128
    return {
        "BLOCK_C": 16 if exact or problem.phi_hidden > 128 else 32 if wide else 64,
        "BLOCK_R": 16 if exact else 64,
        "num_splits": 8,
        "num_warps": 8,
        "num_stages": 1 if exact else 2,
        "maxnreg": 0,
    }


SPEC = KernelSpec(
    family="cmp_mlp_bwd",
    doc="gradients of the tokens and weights of the learned MLP compression",
    arguments=(
        Argument("x", ("K", "H", "D_QK")),
        Argument("w1", ("L_DQK", "HIDDEN"), fill="weight"),
        Argument("b1", ("HIDDEN",), "float32", fill="bias"),
        Argument("w2", ("HIDDEN", "D_QK"), fill="weight"),
        Argument("dout", ("C", "H", "D_QK")),
        Argument("dx", ("K", "H", "D_QK"), fill="out"),
        Argument("dw1", ("L_DQK", "HIDDEN"), fill="out"),
        Argument("db1", ("HIDDEN",), "float32", fill="out"),
        Argument("dw2", ("HIDDEN", "D_QK"), fill="out"),
        Argument("db2", ("D_QK",), "float32", fill="out"),
        c.PACKED_ARGUMENTS["cmp_source"],
        c.PACKED_ARGUMENTS["k_pos"],
        c.PACKED_ARGUMENTS["k_cmp"],
    ),
    problem_fields=("batch", "seq_k", "num_kv_heads", "d_qk", "dtype", "layout", "phi_hidden"),
    nsa_fields=("compress_block_size", "compress_stride"),
    params=(
        Param("BLOCK_C", (16, 32, 64, 128), "compressed rows, or tokens of one residue, a tile"),
        Param("BLOCK_R", (16, 32, 64, 128), "rows a step of the weights' gradients"),
        NUM_SPLITS,
        c.NUM_WARPS,
        c.NUM_STAGES,
        c.MAXNREG,
    ),
    constraints=(
        Constraint("every kernel's sums must fit in 240 registers a thread", _registers_fit),
        Constraint("pipelined tiles must fit in 227 KiB of shared memory", _tiles_fit),
    ),
    rules=cmp_mlp_fwd.SPEC.rules,
    defaults=defaults,
    cost=cost,
    structure=structure,
    constants=constants,
    reference=run_reference,
    cases=tuple(case.replace(phi_hidden=32) for case in c.small_cases()),
)
