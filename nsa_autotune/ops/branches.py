"""One function an equation: each serves a generated kernel on CUDA tensors and the reference on others.

Tensors are batched `[B, T, H, D]`, or packed `[T, H, D]` with a PackedLayout. `scale` defaults to 1/sqrt(D_QK).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..layout import PackedLayout
from ..reference import PhiWeights
from . import checks, library, serve


def compress(
    x: Tensor,
    config: NSAConfig,
    phi: PhiWeights | None = None,
    *,
    layout: PackedLayout | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
) -> Tensor:
    """Eq. 7: keys or values `[.., T, H, D]` to `[.., NC, H, D]`, by phi, or by the mean without one."""
    checks.check_tensor("x", x)
    if x.ndim != (4 if layout is None else 3):
        raise InvalidInput("keys to compress must be [B, T, H, D], or packed [T, H, D]", {"shape": tuple(x.shape)})
    if phi is not None:
        _check_phi(x, phi, config)
    weights = [] if phi is None else [phi.position, phi.w1, phi.b1, phi.w2, phi.b2]
    out: Tensor = library.compress(
        x, weights, serve.index_of(layout), config.to_text(), serve.handle_of(dispatcher, strict)
    )
    return out


def _check_phi(x: Tensor, phi: PhiWeights, config: NSAConfig) -> None:
    if not isinstance(phi, PhiWeights):
        raise InvalidInput("phi must be PhiWeights, or None for the mean", {"phi": type(phi).__name__})
    length, width = config.compress_block_size, x.shape[-1]
    hidden = phi.w1.shape[-1]
    want = {
        "position": (length, width),
        "w1": (length * width, hidden),
        "b1": (hidden,),
        "w2": (hidden, width),
        "b2": (width,),
    }
    for name, shape in want.items():
        tensor: Tensor = getattr(phi, name)
        checks.check_same(f"phi.{name}", tensor, x)
        if tuple(tensor.shape) != shape:
            raise InvalidInput(f"phi.{name} must be {shape}", {"shape": tuple(tensor.shape)}, "Match l, D and hidden.")


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None = None,
    scale: float | None = None,
    layout: PackedLayout | None = None,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible compressed blocks: o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]` float32.

    `seq_k` counts the raw keys (batched only; the number of blocks does not tell), default: as many as queries.
    """
    tokens = _check_compressed(q, k_cmp, config, seq_k, layout)
    checks.check_key("v_cmp", v_cmp, q)
    checks.check_pair(k_cmp, v_cmp, "compressed")
    return _attend("cmp", q, k_cmp, v_cmp, None, config, tokens, scale, layout, dispatcher)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    *,
    seq_k: int | None = None,
    scale: float | None = None,
    layout: PackedLayout | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Eq. 8-12: the n blocks of every token and kv head, int32 `[.., TQ, H, n]`, ascending, unused slots -1."""
    tokens = _check_compressed(q, k_cmp, config, seq_k, layout)
    checks.check_lse(lse, q)
    rest = (serve.index_of(layout), config.to_text(), tokens, serve.scale_of(q, scale), serve.handle_of(dispatcher))
    blocks: Tensor = library.select_blocks(q, k_cmp, lse, *rest)
    return blocks


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    layout: PackedLayout | None = None,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of the selected blocks: o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]` float32."""
    _check_branch(q, k, v, "selected", layout)
    checks.check_blocks(blocks, q, k.shape[-2], config)
    return _attend("slc", q, k, v, blocks, config, k.shape[-3], scale, layout, dispatcher)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    layout: PackedLayout | None = None,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last w tokens t-w+1 .. t: o `[.., TQ, HQ, D_V]`, lse `[.., TQ, HQ]` float32."""
    _check_branch(q, k, v, "window", layout)
    return _attend("win", q, k, v, None, config, k.shape[-3], scale, layout, dispatcher)


def _attend(
    branch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    config: NSAConfig,
    seq_k: int,
    scale: float | None,
    layout: PackedLayout | None,
    dispatcher: Dispatcher | None,
) -> tuple[Tensor, Tensor]:
    rest = (serve.index_of(layout), config.to_text(), seq_k, serve.scale_of(q, scale), serve.handle_of(dispatcher))
    o, lse = library.attend(branch, q, k, v, blocks, *rest)
    return o, lse


def combine(
    gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, *, dispatcher: Dispatcher | None = None
) -> Tensor:
    """Eq. 5: g_cmp o_cmp + g_slc o_slc + g_win o_win, with gates `[.., TQ, HQ, 3]`."""
    checks.check_tensor("o_cmp", o_cmp)
    checks.check_gates(gates, o_cmp)
    for name, branch in (("o_slc", o_slc), ("o_win", o_win)):
        checks.check_same(name, branch, o_cmp)
        if branch.shape != o_cmp.shape:
            raise InvalidInput(f"{name} must have the shape of o_cmp", {name: tuple(branch.shape)})
    out: Tensor = library.combine(gates.to(o_cmp.dtype), o_cmp, o_slc, o_win, serve.handle_of(dispatcher))
    return out


def _check_branch(q: Tensor, k: Tensor, v: Tensor, branch: str, layout: PackedLayout | None) -> None:
    checks.check_query(q, layout)
    checks.check_key("k", k, q, q.shape[-1])
    checks.check_key("v", v, q)
    checks.check_pair(k, v, branch)
    checks.check_lengths(q, k.shape[-3], layout)


def _check_compressed(
    q: Tensor, k_cmp: Tensor, config: NSAConfig, seq_k: int | None, layout: PackedLayout | None
) -> int:
    """The number of raw keys behind k_cmp, which must hold as many blocks as they make."""
    tokens = layout.total_k if layout is not None else q.shape[-3] if seq_k is None else seq_k
    checks.check_query(q, layout)
    checks.check_key("k_cmp", k_cmp, q, q.shape[-1])
    checks.check_lengths(q, tokens, layout)
    expected = config.num_compressed(tokens) if layout is None else layout.num_cmp_rows
    if k_cmp.shape[-3] != expected:
        values = {"NC": k_cmp.shape[-3], "TK": tokens, "expected": expected}
        remedy = "Pass seq_k, the raw key count, and take k_cmp from compress()."
        raise InvalidInput("k_cmp must hold floor((TK - l) / d) + 1 blocks", values, remedy)
    return tokens
