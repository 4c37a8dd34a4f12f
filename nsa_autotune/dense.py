"""Masked softmax attention in plain PyTorch, in chunks of bounded memory, one packed sequence after the other.

What `reference` computes with; nothing here knows a branch of NSA. Every step is finite: no value or gradient is NaN.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import NSAConfig
from .errors import InvalidInput
from .layout import PackedLayout

CHUNK_BYTES = 256 << 20  # largest temporary of one chunk of queries

Span = Callable[[int, int], tuple[int, int]]  # (least, greatest position) -> keys [first, stop) that may be visible
Chunk = Callable[[slice, slice, Tensor], tuple[Tensor, ...]]  # (rows, keys, positions of the rows [c, 1]) -> outputs
Visible = Callable[[slice, Tensor, Tensor], Tensor]  # (rows, positions [c, 1], keys [K]) -> bool, to [B, H, 1, c, K]
Index = tuple[None, slice]


@dataclass(frozen=True)
class Sequence:
    """One packed sequence: indices that cut its queries, keys and compressed rows out as a batch of one."""

    q: Index
    k: Index
    cmp: Index
    len_k: int


def sequences(layout: PackedLayout, config: NSAConfig) -> list[Sequence]:
    """The sequences that have queries; waits for the device, since lengths are needed on the host."""
    cut: list[Sequence] = []
    offsets = torch.stack([layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cmp_offsets]).T.tolist()
    for (q, k, cmp), (q_stop, k_stop, _) in itertools.pairwise(offsets):
        if q_stop > q:
            cmp_stop = cmp + config.num_compressed(k_stop - k)
            cut.append(
                Sequence((None, slice(q, q_stop)), (None, slice(k, k_stop)), (None, slice(cmp, cmp_stop)), k_stop - k)
            )
    return cut


def each_sequence(
    cut: list[Sequence], outputs: tuple[Tensor, ...], run: Callable[[Sequence], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Fills the rows of every sequence in packed `outputs` with what `run` returns for it as a batch of one."""
    for sequence in cut:
        for output, part in zip(outputs, run(sequence), strict=True):
            output[sequence.q] = part
    return outputs


def packed_attention(
    q: Tensor, v: Tensor, cut: list[Sequence], run: Callable[[Sequence], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(o, lse) of all sequences; rows outside every sequence see nothing: o = 0, lse = -inf."""
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=softmax_dtype(q))
    each_sequence(cut, (o, lse), run)
    return o, lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, span: Span, visible: Visible, scale: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the visible keys: (o `[B, TQ, HQ, D_V]`, lse `[B, TQ, HQ]`)."""
    check_heads(q, k, v)
    k, v = not_empty(k), not_empty(v)

    def chunk(rows: slice, keys: slice, position: Tensor) -> tuple[Tensor, Tensor]:
        seen = visible(rows, position, torch.arange(keys.start, keys.stop, device=q.device))
        blind = ~seen.any(-1, keepdim=True)  # [.., c, 1]
        scores = scaled_scores(q[:, rows], k[:, keys], scale)
        scores = scores.masked_fill(~seen, -math.inf).masked_fill(blind, 0.0)  # finite lse, so finite gradients
        lse = scores.logsumexp(-1, keepdim=True)  # [B, H, G, c, 1]
        p = (scores - lse).exp().masked_fill(~seen, 0.0).to(v.dtype)
        o = torch.einsum("bhgqk,bkhd->bqhgd", p, v[:, keys]).flatten(2, 3)
        return o, lse.masked_fill(blind, -math.inf)[..., 0].flatten(1, 2).transpose(1, 2)

    o, lse = in_chunks(q, k.shape[1], positions, span, chunk)
    return o, lse


def in_chunks(q: Tensor, num_keys: int, positions: Tensor, span: Span, chunk: Chunk) -> tuple[Tensor, ...]:
    """Joins what `chunk` returns for pieces of the queries whose scores fit in CHUNK_BYTES; the backward recomputes."""
    pair_bytes = q.shape[0] * q.shape[2] * softmax_dtype(q).itemsize
    where, start, stop = positions.tolist(), 0, len(positions)
    parts: list[tuple[Tensor, ...]] = []
    while start < len(where) or not parts:
        rows = where[start:stop] or [0]
        first, last = span(min(rows), max(rows))
        keys = slice(max(0, min(first, num_keys - 1)), min(num_keys, max(last, 1)))
        if len(rows) > 1 and len(rows) * (keys.stop - keys.start) * pair_bytes > CHUNK_BYTES:
            stop = start + len(rows) // 2
            continue
        work = functools.partial(chunk, slice(start, stop), keys, positions[start:stop, None])
        again = torch.is_grad_enabled()  # recomputing needs torch's checkpoint, which is slow to load
        parts.append(checkpoint(work, use_reentrant=False, preserve_rng_state=False) if again else work())
        start, stop = stop, stop + 2 * len(rows)
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))


def scaled_scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """q k^T scale, by default with scale = 1 / sqrt(D_QK): `[B, H, G, TQ, TK]`, in the dtype of the softmax throughout.

    A product of float16 overflows beyond 65504 before it is scaled.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    grouped = q.unflatten(2, (k.shape[2], -1))  # [B, TQ, H, G, D_QK]
    wide = softmax_dtype(q)
    return torch.einsum("bqhgd,bkhd->bhgqk", grouped.to(wide), k.to(wide)) * scale


def softmax_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def not_empty(x: Tensor) -> Tensor:
    """At least one key, in a place that no query sees, so that the graph reaches every input."""
    return F.pad(x, (0, 0, 0, 0, 0, 1)) if x.shape[1] == 0 else x


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """HQ must be a multiple of H, and v must have the heads of k; raises InvalidInput."""
    if q.shape[2] % k.shape[2] or k.shape[2] != v.shape[2]:
        raise InvalidInput(
            "the query heads must be a multiple of the kv heads",
            {"q_heads": q.shape[2], "k_heads": k.shape[2], "v_heads": v.shape[2]},
            "Give k and v the same number of heads H, with HQ % H == 0.",
        )
