"""Native Sparse Attention token by token: plain Python floats (float64) and loops, written from the paper's equations.

An oracle for tests. It shares no code with the package; `config` is any object with the named constants.
Sequences are nested lists: q[t][head][d], k[token][head][d]. Queries are aligned with the last keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
Phi = Callable[[list[Vector]], Vector]


@dataclass
class Answer:
    """Everything that NSA computes for one sequence, per query token."""

    o_cmp: list[Any] = field(default_factory=list)
    lse_cmp: list[Any] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)
    o_slc: list[Any] = field(default_factory=list)
    lse_slc: list[Any] = field(default_factory=list)
    o_win: list[Any] = field(default_factory=list)
    lse_win: list[Any] = field(default_factory=list)
    o: list[Any] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        """One of the fields as float64, or int32 for the blocks."""
        return torch.tensor(getattr(self, name), dtype=torch.int32 if name == "blocks" else torch.float64)


def dot(a: Vector, b: Vector) -> float:
    return sum(map(mul, a, b))


def mean(block: list[Vector]) -> Vector:
    return [sum(column) / len(block) for column in zip(*block, strict=True)]


def mlp(position: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Phi:
    """phi(x) = W2 silu(W1 flatten(x + position) + b1) + b2."""
    place, first, second = position.tolist(), w1.T.tolist(), w2.T.tolist()

    def phi(block: list[Vector]) -> Vector:
        flat = [x + p for row, place_row in zip(block, place, strict=True) for x, p in zip(row, place_row, strict=True)]
        hidden = [dot(flat, column) + b for column, b in zip(first, b1.tolist(), strict=True)]
        hidden = [h / (1.0 + math.exp(-h)) for h in hidden]
        return [dot(hidden, column) + b for column, b in zip(second, b2.tolist(), strict=True)]

    return phi


def compress(x: list[list[Vector]], config: Any, phi: Phi = mean) -> list[list[Vector]]:
    """Eq. 7: every block of l tokens, d apart, that lies wholly in the sequence."""
    out = []
    first = 0
    while first + config.compress_block_size <= len(x):
        tokens = x[first : first + config.compress_block_size]
        out.append([phi([token[head] for token in tokens]) for head in range(len(x[0]))])
        first += config.compress_stride
    return out


def attend(q: Vector, keys: list[Vector], values: list[Vector], scale: float, d_v: int) -> tuple[Vector, float]:
    """softmax(q k^T scale) v and the log of its denominator; nothing seen gives 0 and -inf."""
    if not keys:
        return [0.0] * d_v, -math.inf
    scores = [dot(q, key) * scale for key in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = sum(weights)
    return [dot(weights, list(column)) / total for column in zip(*values, strict=True)], top + math.log(total)


def tokens_of(first: int, size: int) -> set[int]:
    return set(range(first, first + size))


def choose(scores: Vector, own: int, config: Any) -> list[int]:
    """Eq. 11-12: forced blocks, then the best of the rest, the lower index first among equals."""
    forced = {j for j in range(own + 1) if j < config.num_initial or j > own - config.num_local}
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    chosen = sorted([*forced, *rest[: config.num_selected - len(forced)]])
    return chosen + [-1] * (config.num_selected - len(chosen))


def nsa(
    q: Tensor, k_cmp: Any, v_cmp: Any, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    config: Any, scale: float | None = None,
) -> Answer:  # fmt: skip
    """One sequence: q `[TQ, HQ, D]`, keys `[TK, H, D]`, compressed keys `[NC][H][D]`, gates `[TQ, HQ, 3]`."""
    num_heads, num_kv_heads, d_v = q.shape[1], k_slc.shape[1], v_slc.shape[2]
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    shift = k_slc.shape[0] - q.shape[0]
    keys, values = k_slc.tolist(), v_slc.tolist()
    near_keys, near_values = k_win.tolist(), v_win.tolist()
    answer = Answer()
    for row, token in enumerate(q.tolist()):
        t = row + shift
        seen = [i for i in range(len(k_cmp)) if i * config.compress_stride + config.compress_block_size - 1 <= t]
        window = [s for s in range(len(near_keys)) if t - config.window_size < s <= t]
        o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win, all_scores, all_blocks = ([] for _ in range(8))
        for g in range(num_kv_heads):
            group = range(g * num_heads // num_kv_heads, (g + 1) * num_heads // num_kv_heads)
            far_keys, far_values = [k_cmp[i][g] for i in seen], [v_cmp[i][g] for i in seen]
            scores = [0.0] * (-(-len(keys) // config.select_block_size))
            for head in group:
                o, lse = attend(token[head], far_keys, far_values, scale, d_v)
                o_cmp.append(o)
                lse_cmp.append(lse)
                for i, key in zip(seen, far_keys, strict=True):
                    p = math.exp(dot(token[head], key) * scale - lse)
                    covered = tokens_of(i * config.compress_stride, config.compress_block_size)
                    for j in range(len(scores)):
                        shared = covered & tokens_of(j * config.select_block_size, config.select_block_size)
                        scores[j] += p * len(shared) / config.compress_stride
            own = t // config.select_block_size
            blocks = choose(scores, own, config)
            all_scores.append([s if j <= own else -math.inf for j, s in enumerate(scores)])
            all_blocks.append(blocks)
            picked = [s for s in range(len(keys)) if s <= t and s // config.select_block_size in blocks]
            for head in group:
                o, lse = attend(token[head], [keys[s][g] for s in picked], [values[s][g] for s in picked], scale, d_v)
                o_slc.append(o)
                lse_slc.append(lse)
                near = [near_keys[s][g] for s in window], [near_values[s][g] for s in window]
                o, lse = attend(token[head], *near, scale, d_v)
                o_win.append(o)
                lse_win.append(lse)
        gated = [
            [a * x + b * y + c * z for x, y, z in zip(*branches, strict=True)]
            for (a, b, c), *branches in zip(gates[row].tolist(), o_cmp, o_slc, o_win, strict=True)
        ]
        values_of_row = (o_cmp, lse_cmp, all_scores, all_blocks, o_slc, lse_slc, o_win, lse_win, gated)
        for name, value in zip(answer.__dataclass_fields__, values_of_row, strict=True):
            getattr(answer, name).append(value)
    return answer
