"""nsa_attention: the three branches and their gated sum, as in the paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..layout import PackedLayout, packed_layout
from ..reference import PhiWeights
from . import checks, serve, whole
from .branches import compress


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    config: NSAConfig,
    k_slc: Tensor | None = None,
    v_slc: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    phi_k: PhiWeights | None = None,
    phi_v: PhiWeights | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
    recompute: bool = False,
) -> Tensor:
    """o = g_cmp Attn(q, phi(k), phi(v)) + g_slc Attn(q, k_slc, v_slc) + g_win Attn(q, k_win, v_win)   (Eq. 5).

    q `[B, TQ, HQ, D_QK]`, keys `[B, TK, H, D_QK]`, values `[B, TK, H, D_V]`, gates `[B, TQ, HQ, 3]` in [0, 1]; packed
    tensors drop B and bring int32 `cu_seqlens` `[S + 1]` (`cu_seqlens_k` if the keys' lengths differ). k and v serve
    the compressed branch, and the others unless they have their own. Queries are aligned with the last keys. Position
    encoding is the caller's business. On a GPU a negative gate makes gradients of keys and values NaN.
    `strict=True` raises NotTuned rather than serve an untuned kernel on a GPU. `recompute=True` saves no branch's
    output (3 B TQ HQ D_V elements) for the backward, which attends once more.
    Returns `[B, TQ, HQ, D_V]`; raises InvalidInput for tensors that do not fit together.
    """
    if not isinstance(config, NSAConfig):
        raise InvalidInput("config must be an NSAConfig", {"config": type(config).__name__}, "Use NSAConfig(...).")
    checks.check_form(q, packed=cu_seqlens is not None)
    checks.check_tensor("k", k)
    layout = _layout(q, k, cu_seqlens, cu_seqlens_k, config)
    checks.check_query(q, layout)
    checks.check_key("k", k, q, q.shape[-1])
    checks.check_key("v", v, q)
    checks.check_pair(k, v, "compressed")
    checks.check_lengths(q, k.shape[-3], layout)
    checks.check_gates(gates, q)
    k_slc, v_slc = _branch("slc", q, k, v, k_slc, v_slc)
    k_win, v_win = _branch("win", q, k, v, k_win, v_win)
    served = serve.handle_of(dispatcher, strict)
    how: dict[str, Any] = {"layout": layout, "dispatcher": dispatcher, "strict": strict}
    k_cmp, v_cmp = compress(k, config, phi_k, **how), compress(v, config, phi_v, **how)
    rest = (recompute, serve.index_of(layout), config.to_text(), k.shape[-3], serve.scale_of(q, scale), served)
    keys = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    out: Tensor = whole.gated_attention(gates.to(q.dtype), q, *keys, *rest)[0]
    return out


def _layout(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, config: NSAConfig
) -> PackedLayout | None:
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise InvalidInput("cu_seqlens_k needs cu_seqlens", {}, "Pass both, or none for batched tensors.")
        return None
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens.numel() != cu_seqlens_k.numel():
        values = {"sequences of q": cu_seqlens.numel() - 1, "sequences of k": cu_seqlens_k.numel() - 1}
        raise InvalidInput("queries and keys must be packed from the same sequences", values)
    if checks.values_are_known(cu_seqlens) and bool((cu_seqlens.diff() > cu_seqlens_k.diff()).any()):
        offsets = {"cu_seqlens": cu_seqlens.tolist(), "cu_seqlens_k": cu_seqlens_k.tolist()}
        remedy = "Queries are aligned with the last keys."
        raise InvalidInput("a sequence must have no more queries than keys", offsets, remedy)
    return packed_layout(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0], config)


def _branch(
    name: str, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A branch's own keys and values, shaped as k and v, or the shared ones; both or none."""
    if (own_k is None) != (own_v is None):
        raise InvalidInput(f"k_{name} and v_{name} come together", {}, "Pass both, or none to share k and v.")
    if own_k is None or own_v is None:
        return k, v
    for letter, own, shared in (("k", own_k, k), ("v", own_v, v)):
        checks.check_same(f"{letter}_{name}", own, q)
        if own.shape != shared.shape:
            values = {letter: tuple(shared.shape), f"{letter}_{name}": tuple(own.shape)}
            raise InvalidInput(f"{letter}_{name} must have the shape of {letter}", values)
    return own_k, own_v
