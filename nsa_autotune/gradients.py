"""The backward of the equations in `reference`, by explicit formulas in plain PyTorch: any dtype, batched or packed.

Shapes are those of `reference`; `do` `[.., TQ, HQ, D_V]` is the gradient of the gated sum, so that each branch's gate g
enters here. With p = exp(s - lse) over the visible keys and delta = g * rowsum(do * o):
    ds = p * (g * do v^T - delta),  dq = scale * ds k,  dk = scale * ds^T q,  dv = (p * g)^T do.
Products are computed in the dtype of the inputs, sums over queries and windows in float32, or float64 for float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import NSAConfig
from .dense import Span, Visible, check_heads, in_chunks, not_empty, scaled_scores, sequences, softmax_dtype
from .errors import InvalidInput
from .layout import PackedLayout

BRANCHES = ("cmp", "slc", "win")


@torch.no_grad()
def attention_gradients(
    branch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    gate: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None = None,
    blocks: Tensor | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> dict[str, Tensor]:
    """Gradients dq, dk, dv of one branch, `gate` `[.., TQ, HQ]` being its own; `positions` as in `reference`.

    `k`, `v` are compressed for "cmp", which needs `seq_k` unless packed or given `positions`; "slc" needs `blocks`.
    """
    if layout is not None:
        run = functools.partial(attention_gradients, branch, config=config, scale=scale)
        return _packed(run, branch, (q, k, v), (do, lse, delta, gate), blocks, config, layout)
    check_heads(q, k, v)
    if positions is None:
        tokens = _given("seq_k", seq_k) if branch == "cmp" else k.shape[1]
        positions = torch.arange(q.shape[1], device=q.device) + (tokens - q.shape[1])
    span, visible = _visibility(branch, config, blocks)
    return _attend_backward(q, k, v, do, lse, delta, gate, positions.long(), span, visible, scale)


@torch.no_grad()
def gate_gradients(do: Tensor, gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> dict[str, Tensor]:
    """Gradient of the gates `[.., TQ, HQ, 3]`, and delta = g * rowsum(do * o) of each branch `[.., TQ, HQ]`, wide."""
    wide = softmax_dtype(do)
    sums = torch.stack([(do.to(wide) * o.to(wide)).sum(-1) for o in (o_cmp, o_slc, o_win)], dim=-1)
    delta_cmp, delta_slc, delta_win = (gates.to(wide) * sums).unbind(-1)
    return {"dgates": sums.to(gates.dtype), "delta_cmp": delta_cmp, "delta_slc": delta_slc, "delta_win": delta_win}


@torch.no_grad()
def pool_gradient(dout: Tensor, seq_k: int, config: NSAConfig, layout: PackedLayout | None = None) -> Tensor:
    """Gradient `[B, seq_k, H, D]` (packed `[seq_k, H, D]`) of the tokens whose windows' means have gradient `dout`."""
    filled, tokens = _windows(dout.shape[0], seq_k, config, layout, dout.device)
    share = dout.flatten(0, -3)[filled].to(softmax_dtype(dout)) / config.compress_block_size  # [R, H, D]
    lead = (seq_k,) if layout is not None else (dout.shape[0], seq_k)
    dx = share.new_zeros(math.prod(lead), *dout.shape[-2:])
    for place in tokens.unbind(-1):  # no token twice at one place of the windows
        dx.index_add_(0, place, share)
    return dx.view(*lead, *dout.shape[-2:]).to(dout.dtype)


@torch.no_grad()
def mlp_gradients(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, dout: Tensor, config: NSAConfig, layout: PackedLayout | None = None
) -> dict[str, Tensor]:
    """Gradients dx, dw1, db1, dw2, db2 of silu(X w1 + b1) w2 + b2 over the windows X; db1 and db2 are wide."""
    wide, (size, width) = softmax_dtype(x), (config.compress_block_size, x.shape[-1])
    seq_k = x.shape[0] if layout is not None else x.shape[1]
    filled, tokens = _windows(x.shape[0], seq_k, config, layout, x.device)
    flat = x.flatten(0, -3)  # [tokens, H, D]
    rows = flat[tokens].transpose(1, 2).flatten(2).flatten(0, 1)  # [R * H, l * D]
    dout = dout.flatten(0, -3)[filled].flatten(0, 1)  # [R * H, D]
    before = (rows @ w1).to(wide) + b1.to(wide)
    gate = before.sigmoid()
    hidden = (before * gate).to(x.dtype)
    dbefore = (dout @ w2.T).to(wide) * gate * (1 + before * (1 - gate))
    small = dbefore.to(x.dtype)
    drows = (small @ w1.T).to(wide).view(len(tokens), x.shape[-2], size, width)
    dx = torch.zeros_like(flat, dtype=wide)
    for index, place in enumerate(tokens.unbind(-1)):
        dx.index_add_(0, place, drows[:, :, index])
    return {
        "dx": dx.view(x.shape).to(x.dtype),
        "dw1": rows.T @ small,
        "db1": dbefore.sum(0),
        "dw2": hidden.T @ dout,
        "db2": dout.to(wide).sum(0),
    }


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    gate: Tensor,
    positions: Tensor,
    span: Span,
    visible: Visible,
    scale: float | None,
) -> dict[str, Tensor]:
    """The three gradients, in chunks of queries; dk and dv are summed over the chunks in the dtype of the softmax."""
    num_keys, wide = k.shape[1], softmax_dtype(q)
    keys_in, values_in = not_empty(k), not_empty(v)
    dk, dv = torch.zeros_like(keys_in, dtype=wide), torch.zeros_like(values_in, dtype=wide)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale

    def by_row(x: Tensor) -> Tensor:
        """`[B, c, HQ]` to `[B, H, G, c, 1]`."""
        grouped: Tensor = x.to(wide).unflatten(2, (k.shape[2], -1))
        return grouped.permute(0, 2, 3, 1)[..., None]

    def chunk(rows: slice, keys: slice, position: Tensor) -> tuple[Tensor]:
        seen = visible(rows, position, torch.arange(keys.start, keys.stop, device=q.device))
        row_lse, g = by_row(lse[:, rows]), by_row(gate[:, rows])
        blind = row_lse == -math.inf
        scores = scaled_scores(q[:, rows], keys_in[:, keys], scale)  # [B, H, G, c, K]
        p = (scores - row_lse.masked_fill(blind, 0.0)).exp_().masked_fill_(~seen | blind, 0.0)
        dp = scaled_scores(do[:, rows], values_in[:, keys], 1.0)
        ds = ((g * dp - by_row(delta[:, rows])) * p * factor).to(q.dtype)
        q_rows, do_rows = (x[:, rows].unflatten(2, (k.shape[2], -1)) for x in (q, do))  # [B, c, H, G, D]
        dk[:, keys] += torch.einsum("bhgqk,bqhgd->bkhd", ds, q_rows)
        dv[:, keys] += torch.einsum("bhgqk,bqhgd->bkhd", (p * g).to(v.dtype), do_rows)
        return (torch.einsum("bhgqk,bkhd->bqhgd", ds, keys_in[:, keys]).flatten(2, 3),)

    (dq,) = in_chunks(q, keys_in.shape[1], positions, span, chunk)
    return {"dq": dq, "dk": dk[:, :num_keys].to(k.dtype), "dv": dv[:, :num_keys].to(v.dtype)}


def _packed(
    run: Callable[..., dict[str, Tensor]],
    branch: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, ...],
    blocks: Tensor | None,
    config: NSAConfig,
    layout: PackedLayout,
) -> dict[str, Tensor]:
    """The gradients of every sequence as a batch of one, zero outside of all sequences."""
    q, k, v = tensors
    found = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    for s in sequences(layout, config):
        keys = s.cmp if branch == "cmp" else s.k
        chosen = None if blocks is None else blocks[s.q]
        part = run(q[s.q], k[keys], v[keys], *(x[s.q] for x in rows), seq_k=s.len_k, blocks=chosen)
        for name, place in (("dq", s.q), ("dk", keys), ("dv", keys)):
            found[name][place] = part[name]
    return found


def _visibility(branch: str, config: NSAConfig, blocks: Tensor | None) -> tuple[Span, Visible]:
    """Which keys may be, and which are, visible to queries at given positions."""
    stride, reach, width = config.compress_stride, config.compress_block_size - 1, config.window_size
    if branch == "cmp":
        return lambda _, last: (0, config.num_compressed(last + 1)), lambda _, t, i: i * stride + reach <= t
    if branch == "win":
        return lambda first, last: (first - width + 1, last + 1), lambda _, t, s: (s <= t) & (t - s < width)
    if branch not in BRANCHES:
        raise InvalidInput(f"a branch is one of {', '.join(BRANCHES)}", {"branch": branch})
    if blocks is None:
        raise InvalidInput("selected attention needs the chosen blocks", {"blocks": None}, "Give blocks.")

    def chosen(rows: slice, position: Tensor, keys: Tensor) -> Tensor:
        block, index = keys // config.select_block_size, blocks[:, rows]
        last = int(block[-1]) + 1  # the last column takes the unused slots and blocks beyond these keys
        member = torch.zeros(*index.shape[:-1], last + 1, dtype=torch.bool, device=keys.device)
        index = index.long()
        member.scatter_(-1, index.masked_fill((index < 0) | (index > last), last), True)
        return member[..., block].transpose(1, 2)[:, :, None] & (keys <= position)  # [B, H, 1, c, K]

    return lambda _, last: (0, last + 1), chosen


def _windows(
    batch: int, seq_k: int, config: NSAConfig, layout: PackedLayout | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compressed rows that a window fills `[R]`, and its tokens `[R, l]`, both counted over all batches."""
    inside = torch.arange(config.compress_block_size, device=device)
    if layout is not None:
        filled = (layout.cmp_source >= 0).nonzero()[:, 0]
        return filled, layout.cmp_source[filled].long()[:, None] + inside
    first = torch.arange(config.num_compressed(seq_k), device=device) * config.compress_stride
    starts = (torch.arange(batch, device=device)[:, None] * seq_k + first).flatten()  # [B * NC]
    return torch.arange(len(starts), device=device), starts[:, None] + inside


def _given(name: str, value: int | None) -> int:
    if value is None:
        raise InvalidInput(
            "batched compressed keys do not tell the length of the sequence", {name: value}, f"Give {name}."
        )
    return value
