"""Gradients by generated kernels: each branch from its log-sum-exp and delta, deterministic, one launch an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..codegen.shapes import INDEX_FILLS
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..layout import PackedLayout
from ..spec import KernelSpec
from . import checks, serve

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Call:
    """What the kernels of one call share besides their tensors."""

    config: NSAConfig
    seq_k: int  # raw keys
    scale: float
    layout: PackedLayout | None
    dispatcher: Dispatcher | None


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
    q, k, v = checks.readable(q), checks.readable(k), checks.readable(v)
    if k.numel() == 0 or q.numel() == 0:  # nothing is visible
        if dq is not None and not add:
            dq.zero_()
        return (torch.zeros_like(k), torch.zeros_like(v)) if keys else (None, None)
    given = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta, "gate": gate}
    given |= {} if blocks is None else {"blocks": blocks}
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
    shape = (tuple(q.shape), tuple(k.shape), v.shape[-1], q.dtype, call.config, call.layout is None, call.seq_k)
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
    do = torch.zeros_like(o) if grads[0] is None else checks.readable(grads[0].contiguous())
    delta = torch.linalg.vecdot(do.float(), o.float())  # [.., TQ, HQ]
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
    dgates = torch.empty_like(gates)
    deltas = [torch.empty(gates.shape[:-1], dtype=torch.float32, device=gates.device) for _ in range(3)]
    if do.numel() == 0:
        return dgates, deltas
    tokens = do if do.ndim == 4 else do[None]  # packed or not makes no difference here
    names = ("do", "gates", "o_cmp", "o_slc", "o_win", "dgates", "delta_cmp", "delta_slc", "delta_win")
    tensors = dict(zip(names, (do, gates, *outputs, dgates, *deltas), strict=True))
    problem = partial(serve.describe, tokens, tokens, NSAConfig(), None, seq_k=tokens.shape[1], d_v=tokens.shape[-1])
    spec = kernels.get_spec("gate_sum_bwd")
    serve.launch(dispatcher, spec, (tuple(tokens.shape), do.dtype), problem, tensors, do.device)
    return dgates, deltas


def combine_gradients(
    dispatcher: Dispatcher | None,
    saved: Sequence[Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of gates and of the branches' outputs, for a gated sum used alone."""
    gates, *branches = saved
    do = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0].contiguous()
    dgates, _ = gate_gradients(do, gates.contiguous(), [o.contiguous() for o in branches], dispatcher)
    return [dgates, *(do * gates[..., number, None] for number in range(3))]


class GatedAttention(torch.autograd.Function):
    """out = sum of gate * branch, computed before; its gradients go to q, gates and every branch's keys and values.

    No branch's do is ever materialised: the kernels take the gate. dq is summed over window, selected and compressed
    attention in this order, each row by one program, so that two runs give the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        combine: Any,
        call: Call,
        blocks: Tensor,
        branches: tuple[tuple[Tensor, Tensor], ...],
        gates: Tensor,
        q: Tensor,
        *keys: Tensor,
    ) -> Tensor:
        """`branches` holds (o, lse) of cmp, slc, win; `keys` is k_cmp, v_cmp, k_slc, v_slc, k_win, v_win."""
        ctx.call = call
        outputs = [o for o, _ in branches]
        ctx.save_for_backward(gates, q, *keys, blocks, *outputs, *(lse for _, lse in branches))
        out: Tensor = combine(gates, *outputs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of gates, q and the keys and values."""
        gates, q, *rest = ctx.saved_tensors
        keys, blocks, outputs, lses = rest[:6], rest[6], rest[7:10], rest[10:]
        needs = ctx.needs_input_grad[4:]
        do, gates = checks.readable(grad.contiguous()), gates.to(grad.dtype).contiguous()
        q = checks.readable(q)
        dgates, deltas = gate_gradients(do, gates, outputs, ctx.call.dispatcher)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needs[1] else None
        found: Gradients = [None] * 6
        for number, branch in reversed(list(enumerate(("cmp", "slc", "win")))):
            given = (do, lses[number], deltas[number], gates[..., number], ctx.call)
            k, v = keys[2 * number : 2 * number + 2]
            found[2 * number : 2 * number + 2] = attention_gradients(
                branch,
                q,
                k,
                v,
                *given,
                blocks=blocks if branch == "slc" else None,
                dq=dq,
                add=branch != "win",
                keys=needs[2 + 2 * number] or needs[3 + 2 * number],
            )
        return None, None, None, None, dgates.to(ctx.saved_tensors[0].dtype), dq, *found


def compress_gradients(
    config: NSAConfig,
    layout: PackedLayout | None,
    dispatcher: Dispatcher | None,
    saved: Sequence[Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of x, and of phi's position, w1, b1, w2, b2 if it is learned."""
    x, *weights = saved
    dout, dx = grads[0], torch.empty_like(saved[0], memory_format=torch.contiguous_format)
    if dout is None or dout.numel() == 0 or x.numel() == 0:
        return [torch.zeros_like(t) for t in saved]
    tensors: dict[str, Any] = {"dout": dout.contiguous(), "dx": dx}
    family, hidden = "cmp_pool_bwd", 128
    if weights:
        family, hidden = "cmp_mlp_bwd", weights[1].shape[-1]
        tensors |= _phi_tensors(checks.readable(x), weights)
    spec = kernels.get_spec(family)
    shape = (tuple(x.shape), x.dtype, config, layout is None, hidden)
    problem = partial(serve.describe, None, x, config, layout, seq_k=x.shape[-3], d_v=x.shape[-1], phi_hidden=hidden)
    serve.launch(dispatcher, spec, shape, problem, {**tensors, **index_tensors(spec, layout)}, x.device)
    if not weights:
        return [dx]
    position, w1 = weights[:2]
    dbias = tensors["db1"]  # of the folded bias b1 + flatten(position) w1
    dposition = (w1.float() @ dbias).view(position.shape)
    dw1 = tensors["dw1"].float() + torch.outer(position.float().flatten(), dbias)
    found = (dx, dposition, dw1, dbias, tensors["dw2"], tensors["db2"])
    return [g.to(t.dtype) for g, t in zip(found, saved, strict=True)]


def _phi_tensors(x: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    position, w1, b1, w2, b2 = weights
    share = position.float().flatten() @ w1.float()
    return {
        "x": x,
        "w1": w1.contiguous(),
        "b1": b1.float() + share,
        "w2": w2.contiguous(),
        "dw1": torch.empty_like(w1, memory_format=torch.contiguous_format),
        "db1": torch.empty_like(b1, dtype=torch.float32),
        "dw2": torch.empty_like(w2, memory_format=torch.contiguous_format),
        "db2": torch.empty_like(b2, dtype=torch.float32),
    }
