"""The equations of Native Sparse Attention (arXiv 2502.11089) in plain PyTorch: any dtype, differentiable, packed.

Shapes: q `[B, TQ, HQ, D_QK]`, k `[B, TK, H, D_QK]`, v `[B, TK, H, D_V]`; query head h reads kv head `h // (HQ / H)`.
With `layout` (packed) the B dimension is absent and tokens of all sequences follow one another.
Products are computed in the dtype of the inputs; softmax and `lse` (natural log) in float32, or float64 for float64.
A query that sees no key gets o = 0, lse = -inf and gradients of zero.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import NSAConfig
from .dense import (
    Sequence,
    Span,
    attend,
    check_heads,
    each_sequence,
    in_chunks,
    not_empty,
    packed_attention,
    scaled_scores,
    sequences,
)
from .errors import InvalidInput
from .layout import PackedLayout


@dataclass(frozen=True)
class PhiWeights:
    """Weights of phi, shared by the heads: phi(x) = silu(flatten(x + position) w1 + b1) w2 + b2."""

    position: Tensor  # [l, D], position encoding inside a block
    w1: Tensor  # [l * D, hidden]
    b1: Tensor  # [hidden]
    w2: Tensor  # [hidden, D]
    b2: Tensor  # [D]


def compress_mean(x: Tensor, config: NSAConfig, *, layout: PackedLayout | None = None) -> Tensor:
    """Eq. 7 with phi = mean: `[B, T, H, D]` to `[B, NC, H, D]`, or packed `[T, H, D]` to `[num_cmp_rows, H, D]`."""
    return _keep_filled(_overlapping_blocks(x, config, layout).mean(-2), layout)


def compress_mlp(x: Tensor, phi: PhiWeights, config: NSAConfig, *, layout: PackedLayout | None = None) -> Tensor:
    """Eq. 7 with a learned phi: `[B, T, H, D]` to `[B, NC, H, D]`, or packed `[T, H, D]` to `[num_cmp_rows, H, D]`."""
    blocks = _overlapping_blocks(x, config, layout) + phi.position  # [.., NC, H, l, D]
    hidden = F.silu(blocks.flatten(-2) @ phi.w1 + phi.b1)
    return _keep_filled(hidden @ phi.w2 + phi.b2, layout)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed blocks i with i*d + l - 1 <= t: (o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]`)."""
    if layout is not None:
        run = functools.partial(compressed_attention, config=config, scale=scale)
        return packed_attention(
            q, v_cmp, sequences(layout, config), lambda s: run(q[s.q], k_cmp[s.cmp], v_cmp[s.cmp], seq_k=s.len_k)
        )
    visible = functools.partial(_compressed_visible, config)
    positions = _positions(q, seq_k, positions)
    return attend(q, k_cmp, v_cmp, positions, _compressed_span(config), lambda _, *where: visible(*where), scale)


def importance(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Eq. 8-10: attention mass of each selection block, summed over the heads of a group: `[.., TQ, H, NB]`.

    Eq. 9 in its overlap reading: a compressed block counts once for each stride of it that lies in the selection block.
    Blocks of the future are -inf. Packed: NB is that of the longest sequence, and `seq_k` is not read.
    """
    if layout is not None:
        return _packed_importance(q, k_cmp, lse, config, scale, layout)
    check_heads(q, k_cmp, k_cmp)
    k_cmp, num_blocks = not_empty(k_cmp), config.num_select_blocks(_given(seq_k))
    per_block = config.select_block_size // config.compress_stride
    weights = importance_weights(config)

    def chunk(rows: slice, keys: slice, position: Tensor) -> tuple[Tensor]:
        seen = _compressed_visible(config, position, torch.arange(keys.start, keys.stop, device=q.device))
        row_lse = lse[:, rows].masked_fill(lse[:, rows] == -math.inf, 0.0).transpose(1, 2)  # [B, HQ, c]
        log_p = scaled_scores(q[:, rows], k_cmp[:, keys], scale) - row_lse.unflatten(1, (k_cmp.shape[2], -1))[..., None]
        mass = log_p.masked_fill(~seen, -math.inf).exp().sum(2).transpose(1, 2)  # [B, c, H, K]
        mass = F.pad(mass, (len(weights) - per_block, num_blocks * per_block - keys.stop))
        steps = [mass[..., i:][..., : num_blocks * per_block : per_block] * w for i, w in enumerate(weights)]
        future = torch.arange(num_blocks, device=q.device) > _own_block(position[:, 0], config)
        return (torch.stack(steps).sum(0).masked_fill(future, -math.inf),)

    return in_chunks(q, k_cmp.shape[1], _positions(q, seq_k, positions), _compressed_span(config), chunk)[0]


def importance_weights(config: NSAConfig) -> tuple[int, ...]:
    """Eq. 9: weights of blocks j*l'/d - l/d + 1 .. (j+1)*l'/d - 1 in selection block j, by default 1,2,2,2,1."""
    per_select = config.select_block_size // config.compress_stride
    per_compress = config.compress_block_size // config.compress_stride
    offsets = [m - n for m in range(per_select) for n in range(per_compress)]
    return tuple(offsets.count(offset) for offset in range(1 - per_compress, per_select))


def select_from_importance(scores: Tensor, config: NSAConfig, positions: Tensor) -> Tensor:
    """Eq. 11-12: the n best of `[.., TQ, H, NB]`, forced blocks included: int32 `[.., TQ, H, n]`, ascending, -1 last.

    `positions` `[TQ]` are those of the queries among the keys. Of equal scores the lower index wins.
    """
    own = _own_block(positions, config)  # [TQ, 1, 1]
    index = torch.arange(scores.shape[-1], device=scores.device)
    forced = (index < config.num_initial) | (index > own - config.num_local)
    ranked = scores.detach().masked_fill(forced, math.inf).masked_fill(index > own, -math.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True)
    none = scores.shape[-1]  # sorts behind every block
    chosen = best.indices.masked_fill(best.values == -math.inf, none)[..., : config.num_selected]
    chosen = F.pad(chosen, (0, config.num_selected - chosen.shape[-1]), value=none).sort(dim=-1).values
    return chosen.masked_fill(chosen == none, -1).int()


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Eq. 8-12: int32 `[.., TQ, H, n]`, block indices relative to the first key of the sequence, ascending, then -1."""
    with torch.no_grad():
        scores = importance(q, k_cmp, lse, config, seq_k=seq_k, scale=scale, positions=positions, layout=layout)
        where = layout.q_pos if layout is not None else _positions(q, seq_k, positions)
        return select_from_importance(scores, config, where)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens <= t of the chosen blocks: (o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]`)."""
    if layout is not None:
        run = functools.partial(selected_attention, config=config, scale=scale)
        return packed_attention(q, v, sequences(layout, config), lambda s: run(q[s.q], k[s.k], v[s.k], blocks[s.q]))
    num_blocks = config.num_select_blocks(k.shape[1])

    def visible(rows: slice, position: Tensor, keys: Tensor) -> Tensor:
        index = blocks[:, rows].long()  # [B, c, H, n]
        chosen = torch.zeros(*index.shape[:-1], num_blocks + 1, dtype=torch.bool, device=k.device)
        chosen.scatter_(-1, index.masked_fill(index < 0, num_blocks), True)  # the last column takes the unused slots
        causal = keys <= position
        return chosen[..., keys // config.select_block_size].transpose(1, 2)[:, :, None] & causal

    return attend(q, k, v, _positions(q, k.shape[1], positions), lambda _, last: (0, last + 1), visible, scale)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the w tokens t-w+1 .. t: (o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]`)."""
    if layout is not None:
        run = functools.partial(window_attention, config=config, scale=scale)
        return packed_attention(q, v, sequences(layout, config), lambda s: run(q[s.q], k[s.k], v[s.k]))
    width = config.window_size

    def visible(rows: slice, position: Tensor, keys: Tensor) -> Tensor:
        age = position - keys
        return (age >= 0) & (age < width)

    def span(first: int, last: int) -> tuple[int, int]:
        return first - width + 1, last + 1

    return attend(q, k, v, _positions(q, k.shape[1], positions), span, visible, scale)


def combine(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    """Eq. 5: sum of the branches `[.., TQ, HQ, D_V]` weighted by gates `[.., TQ, HQ, 3]` in the order cmp, slc, win."""
    g_cmp, g_slc, g_win = gates.to(o_cmp.dtype).unsqueeze(-2).unbind(-1)  # [.., TQ, HQ, 1]
    return g_cmp * o_cmp + g_slc * o_slc + g_win * o_win


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Eq. 5 with all its terms, `k_cmp` and `v_cmp` being compressed already: o `[.., TQ, HQ, D_V]`."""
    seq_k = k_slc.shape[1] if layout is None else None
    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, config, seq_k=seq_k, scale=scale, layout=layout)
    blocks = select_blocks(q, k_cmp, lse_cmp, config, seq_k=seq_k, scale=scale, layout=layout)
    o_slc, _ = selected_attention(q, k_slc, v_slc, blocks, config, scale=scale, layout=layout)
    o_win, _ = window_attention(q, k_win, v_win, config, scale=scale, layout=layout)
    return combine(gates, o_cmp, o_slc, o_win)


def _packed_importance(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, scale: float | None, layout: PackedLayout
) -> Tensor:
    cut = sequences(layout, config)
    num_blocks = config.num_select_blocks(max((s.len_k for s in cut), default=0))

    def run(s: Sequence) -> tuple[Tensor]:
        part = importance(q[s.q], k_cmp[s.cmp], lse[s.q], config, seq_k=s.len_k, scale=scale)
        return (F.pad(part, (0, num_blocks - part.shape[-1]), value=-math.inf),)

    nothing = lse.new_full((q.shape[0], k_cmp.shape[1], num_blocks), -math.inf)
    return each_sequence(cut, (nothing,), run)[0]


def _compressed_span(config: NSAConfig) -> Span:
    return lambda _, last: (0, config.num_compressed(last + 1))


def _compressed_visible(config: NSAConfig, position: Tensor, index: Tensor) -> Tensor:
    return index * config.compress_stride + config.compress_block_size - 1 <= position


def _own_block(position: Tensor, config: NSAConfig) -> Tensor:
    """Selection block of each query, `[TQ, 1, 1]`; -1 before the first key."""
    return position.long().div(config.select_block_size, rounding_mode="floor")[:, None, None]


def _overlapping_blocks(x: Tensor, config: NSAConfig, layout: PackedLayout | None) -> Tensor:
    """Views (batched) or copies (packed) of the l tokens under each compressed row: `[.., NC, H, l, D]`."""
    size, stride = config.compress_block_size, config.compress_stride
    if layout is None:
        padded = F.pad(x, (0, 0, 0, 0, 0, max(0, size - x.shape[1])))
        return padded.unfold(1, size, stride)[:, : config.num_compressed(x.shape[1])].movedim(-1, -2)
    first = layout.cmp_source.long()[:, None]
    index = torch.where(first < 0, x.shape[0], first + torch.arange(size, device=x.device))  # the added row is zero
    return F.pad(x, (0, 0, 0, 0, 0, 1))[index].movedim(1, 2)


def _keep_filled(rows: Tensor, layout: PackedLayout | None) -> Tensor:
    return rows if layout is None else rows.masked_fill((layout.cmp_source < 0)[:, None, None], 0.0)


def _positions(q: Tensor, seq_k: int | None, positions: Tensor | None) -> Tensor:
    """Positions `[TQ]` of the queries among the keys: given, or aligned with the last keys."""
    if positions is not None:
        return positions.to(q.device, torch.long)
    return torch.arange(q.shape[1], device=q.device) + (_given(seq_k) - q.shape[1])


def _given(seq_k: int | None) -> int:
    if seq_k is None:
        raise InvalidInput(
            "batched compressed keys do not tell the length of the sequence", {"seq_k": seq_k}, "Give seq_k."
        )
    return seq_k
