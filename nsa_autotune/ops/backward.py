"""Gradients of each branch from its log-sum-exp and delta: by kernels, one launch an output, or by the equations.

Deterministic: every sum has a fixed order. What is returned shares no memory with what is given, as operators have to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import gradients, kernels
from ..codegen.shapes import INDEX_FILLS
from ..config import NSAConfig
from ..dense import softmax_dtype
from ..dispatch.dispatcher import Dispatcher
from ..layout import PackedLayout
from ..reference import PhiWeights
from ..spec import KernelSpec, Problem
from . import checks, launches, serve
from .phi import folded_bias
from .serve import Call

Gradients = list[Tensor | None]


def index_tensors(spec: KernelSpec, layout: PackedLayout | None) -> dict[str, Tensor | None]:
    """The index tensors that a family takes; None when batched."""
    names = [argument.name for argument in spec.arguments if argument.fill in INDEX_FILLS]
    return {name: None if layout is None else getattr(layout, name) for name in names}


def attention_gradients(
    branch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    gate: Tensor,
    call: Call,
    *,
    blocks: Tensor | None = None,
    dq: Tensor | None = None,
    add: bool = False,
    keys: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """dk and dv of branch "cmp", "slc" or "win" (None unless `keys`); fills `dq` if given, or adds to it.

    p = exp(scale q k^T - lse), ds = p (gate do v^T - delta): dq = scale ds k, dk = scale ds^T q, dv = (p gate)^T do.
    """
    if not serve.on_kernels(q):
        found = gradients.attention_gradients(
            *(branch, q, k, v, do, lse, delta, gate, call.config),
            seq_k=call.seq_k,
            blocks=blocks,
            scale=call.scale,
            layout=call.layout,
        )
        if dq is not None:
            dq.copy_(dq + found["dq"] if add else found["dq"])
        return (found["dk"].contiguous(), found["dv"].contiguous()) if keys else (None, None)
    q, k, v = checks.readable(q), checks.readable(k), checks.readable(v)
    if k.numel() == 0 or q.numel() == 0:  # nothing is visible
        if dq is not None and not add:
            dq.zero_()
        return (torch.zeros_like(k), torch.zeros_like(v)) if keys else (None, None)
    given = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta, "gate": gate}
    given |= {} if blocks is None else {"blocks": blocks.contiguous()}
    if dq is not None:
        _launch(f"{branch}_attn_bwd_dq", {**given, "dq": dq, "accumulate": add}, call)
    if not keys:
        return None, None
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    _launch(f"{branch}_attn_bwd_dkv", {**given, "dk": dk, "dv": dv}, call)
    return dk, dv


def _launch(family: str, tensors: dict[str, Any], call: Call) -> None:
    spec, q, k, v = kernels.get_spec(family), tensors["q"], tensors["k"], tensors["v"]
    scalars: dict[str, Any] = {"scale": call.scale, "seq_k": call.seq_k}
    given = {**tensors, **index_tensors(spec, call.layout), **{name: scalars[name] for name in spec.scalars}}
    locality = (call.dispatcher or serve.default_dispatcher()).locality
    shape = (q.shape, k.shape, v.shape[-1], q.dtype, call.config, serve.packing_of(call.layout), call.seq_k)
    how: dict[str, Any] = {"seq_k": call.seq_k, "d_v": v.shape[-1], "locality": locality}
    problem = partial(serve.describe, q, k, call.config, call.layout, **how)
    serve.launch(call.dispatcher, spec, shape, problem, given, q.device)


def branch_gradients(
    branch: str,
    call: Call,
    blocks: Tensor | None,
    saved: Sequence[Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of q, k, v of one branch used alone: (o, lse) have the gradients `grads`, its gate is 1."""
    q, k, v = saved
    o, lse = outputs
    wide = softmax_dtype(o)
    do = torch.zeros_like(o) if grads[0] is None else checks.readable(grads[0].contiguous())
    delta = torch.linalg.vecdot(do.to(wide), o.to(wide))  # [.., TQ, HQ]
    if grads[1] is not None:
        delta = delta - grads[1].masked_fill(lse == float("-inf"), 0.0)  # ds = p (dp - delta + dlse)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needs[0] else None
    gate = do.new_ones(lse.shape)
    given = (do, lse, delta.contiguous(), gate, call)
    dk, dv = attention_gradients(branch, q, k, v, *given, blocks=blocks, dq=dq, keys=needs[1] or needs[2])
    return [dq, dk, dv]


def gate_gradients(
    do: Tensor, gates: Tensor, outputs: Sequence[Tensor], dispatcher: Dispatcher | None
) -> tuple[Tensor, list[Tensor]]:
    """dgates `[.., HQ, 3]` and each branch's delta `[.., HQ]` float32, in one pass over do and the outputs."""
    if not serve.on_kernels(do):
        o_cmp, o_slc, o_win = outputs
        dgates, *deltas = gradients.gate_gradients(do, gates, o_cmp, o_slc, o_win).values()
        return dgates.contiguous(), [delta.contiguous() for delta in deltas]
    dgates = torch.empty_like(gates)
    deltas = [torch.empty(gates.shape[:-1], dtype=torch.float32, device=gates.device) for _ in range(3)]
    if do.numel() == 0:
        return dgates, deltas
    tokens = do if do.ndim == 4 else do[None]  # packed or not makes no difference here
    names = ("do", "gates", "o_cmp", "o_slc", "o_win", "dgates", "delta_cmp", "delta_slc", "delta_win")
    tensors = dict(zip(names, (do, gates, *outputs, dgates, *deltas), strict=True))

    def problem() -> Problem:
        return serve.describe(tokens, tokens, NSAConfig(), None, seq_k=tokens.shape[1], d_v=tokens.shape[-1])

    spec = kernels.get_spec("gate_sum_bwd")
    serve.launch(dispatcher, spec, (tokens.shape, do.dtype), problem, tensors, do.device)
    return dgates, deltas


def combine_gradients(
    do: Tensor, gates: Tensor, outputs: Sequence[Tensor], dispatcher: Dispatcher | None
) -> list[Tensor]:
    """Gradients of gates and of the branches' outputs, for a gated sum used alone."""
    do = do.contiguous()
    dgates, _ = gate_gradients(do, gates.contiguous(), [o.contiguous() for o in outputs], dispatcher)
    return [dgates, *(do * gates[..., number, None] for number in range(3))]


def gated_attention_gradients(
    do: Tensor,
    gates: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    blocks: Tensor,
    outputs: Sequence[Tensor],
    lses: Sequence[Tensor],
    needs: Sequence[bool],
    call: Call,
) -> Gradients:
    """Gradients of gates, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win; without `outputs` they are computed again.

    No branch's do is ever materialised: the kernels take the gate. dq is summed over window, selected and compressed
    attention in this order, each row by one program, so that two runs give the same bits.
    """
    parts = [(branch, keys[2 * n], keys[2 * n + 1]) for n, branch in enumerate(("cmp", "slc", "win"))]
    chosen = {"slc": blocks}
    outputs = outputs or [launches.launch_attention(b, q, k, v, chosen.get(b), call)[0] for b, k, v in parts]
    do, gates, q = checks.readable(do.contiguous()), gates.contiguous(), checks.readable(q)
    dgates, deltas = gate_gradients(do, gates, outputs, call.dispatcher)
    del outputs  # recomputed ones are not needed any more
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needs[1] else None
    found: Gradients = [None] * 6
    for n, (branch, k, v) in reversed(list(enumerate(parts))):
        how: dict[str, Any] = {"blocks": chosen.get(branch), "dq": dq, "add": branch != "win"}
        wanted = needs[2 + 2 * n] or needs[3 + 2 * n]
        found[2 * n : 2 * n + 2] = attention_gradients(
            branch, q, k, v, do, lses[n], deltas[n], gates[..., n], call, keys=wanted, **how
        )
    return [dgates, dq, *found]


def compress_gradients(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    config: NSAConfig,
    layout: PackedLayout | None,
    dispatcher: Dispatcher | None,
) -> list[Tensor]:
    """Gradients of x, and of phi's position, w1, b1, w2, b2 if it is learned."""
    if dout.numel() == 0 or x.numel() == 0:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, *weights)]
    if not serve.on_kernels(x):
        return _compress_equation(x, weights, dout, config, layout)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors: dict[str, Any] = {"dout": dout.contiguous(), "dx": dx}
    family, hidden = "cmp_pool_bwd", 128
    if weights:
        family, hidden = "cmp_mlp_bwd", weights[1].shape[-1]
        tensors |= _phi_tensors(checks.readable(x), weights)
    spec = kernels.get_spec(family)
    shape = (x.shape, x.dtype, config, serve.packing_of(layout), hidden)
    problem = partial(serve.describe, None, x, config, layout, seq_k=x.shape[-3], d_v=x.shape[-1], phi_hidden=hidden)
    serve.launch(dispatcher, spec, shape, problem, {**tensors, **index_tensors(spec, layout)}, x.device)
    if not weights:
        return [dx]
    return _unfold_bias([x, *weights], {name: tensors[name] for name in ("dx", "dw1", "db1", "dw2", "db2")})


def _compress_equation(
    x: Tensor, weights: Sequence[Tensor], dout: Tensor, config: NSAConfig, layout: PackedLayout | None
) -> list[Tensor]:
    if not weights:
        return [gradients.pool_gradient(dout, x.shape[-3], config, layout).contiguous()]
    position, w1, b1, w2, _ = weights
    bias = b1 + position.flatten() @ w1
    return _unfold_bias([x, *weights], gradients.mlp_gradients(x, w1, bias, w2, dout, config, layout))


def _unfold_bias(saved: Sequence[Tensor], found: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of x and phi's weights from those of x, w1, w2, b2 and of the folded bias b1 + flatten(position) w1."""
    position, w1 = saved[1:3]
    dbias = found["db1"]
    dposition = (w1.to(dbias.dtype) @ dbias).view(position.shape)
    dw1 = found["dw1"].to(dbias.dtype) + torch.outer(position.to(dbias.dtype).flatten(), dbias)
    ordered = (found["dx"], dposition, dw1, dbias, found["dw2"], found["db2"])
    return [g.to(t.dtype).contiguous() for g, t in zip(ordered, saved, strict=True)]


def _phi_tensors(x: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    _, w1, b1, w2, b2 = weights
    return {
        "x": x,
        "w1": w1.contiguous(),
        "b1": folded_bias(PhiWeights(*weights)),
        "w2": w2.contiguous(),
        "dw1": torch.empty_like(w1, memory_format=torch.contiguous_format),
        "db1": torch.empty_like(b1, dtype=torch.float32),
        "dw2": torch.empty_like(w2, memory_format=torch.contiguous_format),
        "db2": torch.empty_like(b2, dtype=torch.float32),
    }
