"""One function a forward: on CUDA tensors allocate the outputs and launch a kernel, on others compute the equation.

Inputs are checked by the caller. Outputs are contiguous and share no memory with inputs, as operators have to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels, reference
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import KernelError
from ..layout import PackedLayout
from ..reference import PhiWeights
from ..spec import Problem
from . import checks, serve
from .phi import fold
from .serve import Call

WINDOW_AND_SUM = "win_sum_fwd"


def rows(layout: PackedLayout | None, *names: str) -> dict[str, Any]:
    """Index tensors of the packed layout by name; None when batched."""
    return {name: None if layout is None else getattr(layout, name) for name in names}


def launch_compress(
    x: Tensor, *weights: Tensor, config: NSAConfig, layout: PackedLayout | None, dispatcher: Dispatcher | None
) -> Tensor:
    """Compressed keys or values; `weights` are phi's, or none for the mean."""
    if not serve.on_kernels(x):
        if weights:
            return reference.compress_mlp(x, PhiWeights(*weights), config, layout=layout).contiguous()
        return reference.compress_mean(x, config, layout=layout).contiguous()
    x = checks.readable(x)
    count = config.num_compressed(x.shape[1]) if layout is None else layout.num_cmp_rows
    out = x.new_empty((*x.shape[:-3], count, *x.shape[-2:]))
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    tensors = {"x": x, "out": out, **rows(layout, "cmp_source")}
    family, hidden = "cmp_pool_fwd", 128
    if weights:
        phi = fold(PhiWeights(*weights))
        family, hidden = "cmp_mlp_fwd", phi.w1.shape[-1]
        tensors |= vars(phi)
    shape = (x.shape, x.dtype, config, serve.packing_of(layout), hidden)
    problem = partial(serve.describe, None, x, config, layout, seq_k=x.shape[-3], d_v=x.shape[-1], phi_hidden=hidden)
    serve.launch(dispatcher, kernels.get_spec(family), shape, problem, tensors, x.device)
    return out


def launch_attention(
    branch: str, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, call: Call, **summed: Tensor
) -> tuple[Tensor, Tensor]:
    """o and lse of branch "cmp", "slc" (which needs `blocks`) or "win", whose kernel may fill a gated sum as well."""
    if not serve.on_kernels(q):
        o, lse = _attention_equation(branch, q, k, v, blocks, call)
        return o.contiguous(), lse.contiguous()
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = checks.readable(k), checks.readable(v)
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if k.numel() == 0 or q.numel() == 0:  # fewer tokens than one block: nothing is visible
        return o.zero_(), lse.fill_(float("-inf"))
    extra = rows(call.layout, "q_pos", "cmp_start" if branch == "cmp" else "k_start")
    extra |= {"seq_k": call.seq_k} if branch == "cmp" else {}
    extra |= {} if blocks is None else {"blocks": blocks.contiguous()}
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": call.scale, **extra, **summed}
    spec = kernels.get_spec(WINDOW_AND_SUM if summed else f"{branch}_attn_fwd")
    serve.launch(call.dispatcher, spec, *_attention_problem(q, k, v, call), tensors, q.device)
    return o, lse


def _attention_problem(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[tuple[Any, ...], Callable[[], Problem]]:
    """What tells the call of an attention kernel from others, and what describes it."""
    layout, config, seq_k = call.layout, call.config, call.seq_k
    locality = (call.dispatcher or serve.default_dispatcher()).locality
    shape = (q.shape, k.shape, v.shape[-1], q.dtype, config, serve.packing_of(layout), seq_k)
    return shape, partial(serve.describe, q, k, config, layout, seq_k=seq_k, d_v=v.shape[-1], locality=locality)


def launch_window_and_sum(
    gates: Tensor, q: Tensor, k: Tensor, v: Tensor, o_cmp: Tensor, o_slc: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """o and lse of the window, and the gated sum: by one kernel where that was measured to be faster than two."""
    if serve.on_kernels(q) and q.numel() > 0 and k.numel() > 0:
        shape, problem = _attention_problem(q, k, v, call)
        if serve.fuses(call.dispatcher, WINDOW_AND_SUM, shape, problem, q.device):
            out = torch.empty_like(o_cmp, memory_format=torch.contiguous_format)
            others = {"o_cmp": o_cmp.contiguous(), "o_slc": o_slc.contiguous(), "gates": gates.contiguous()}
            try:
                return *launch_attention("win", q, k, v, None, call, **others, out=out), out
            except KernelError as error:
                serve.split(call.dispatcher, shape, q.device, error)
    o, lse = launch_attention("win", q, k, v, None, call)
    return o, lse, launch_combine(gates, o_cmp, o_slc, o, dispatcher=call.dispatcher)


def _attention_equation(
    branch: str, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    how: dict[str, Any] = {"config": call.config, "scale": call.scale, "layout": call.layout}
    if branch == "cmp":
        return reference.compressed_attention(q, k, v, seq_k=call.seq_k, **how)
    if blocks is None:
        return reference.window_attention(q, k, v, **how)
    return reference.selected_attention(q, k, v, blocks, **how)


def launch_select(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    """The blocks of every token and kv head; k holds the compressed keys."""
    config, layout, seq_k, scale = call.config, call.layout, call.seq_k, call.scale
    if not serve.on_kernels(q):
        return reference.select_blocks(q, k, lse, config, seq_k=seq_k, scale=scale, layout=layout).contiguous()
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = checks.readable(k)
    blocks = torch.empty((*q.shape[:-2], k.shape[-2], config.num_selected), dtype=torch.int32, device=q.device)
    if k.numel() == 0 or q.numel() == 0:  # fewer tokens than one block: every token selects block 0
        blocks.fill_(-1)[..., 0] = 0
        return blocks
    shape = (q.shape, k.shape, q.dtype, config, serve.packing_of(layout), seq_k)
    tensors = {"q": q, "k": k, "lse": lse.contiguous(), "blocks": blocks, "scale": scale, "seq_k": seq_k}
    tensors |= rows(layout, "q_pos", "cmp_start")
    problem = partial(serve.describe, q, k, config, layout, seq_k=seq_k, d_v=k.shape[-1])
    serve.launch(call.dispatcher, kernels.get_spec("slc_select_fwd"), shape, problem, tensors, q.device)
    return blocks


def launch_combine(gates: Tensor, *outputs: Tensor, dispatcher: Dispatcher | None) -> Tensor:
    """The gated sum of the branches' outputs."""
    if not serve.on_kernels(gates):
        return reference.combine(gates, *outputs).contiguous()
    o_cmp, o_slc, o_win = (o.contiguous() for o in outputs)
    out = torch.empty_like(o_cmp)
    if out.numel() == 0:
        return out
    tokens = o_cmp if o_cmp.ndim == 4 else o_cmp[None]  # packed or not makes no difference here
    tensors = {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win, "gates": gates.contiguous(), "out": out}

    def problem() -> Problem:
        return serve.describe(tokens, tokens, NSAConfig(), None, seq_k=tokens.shape[1], d_v=tokens.shape[-1])

    shape = (tokens.shape, out.dtype)
    serve.launch(dispatcher, kernels.get_spec("gate_sum_fwd"), shape, problem, tensors, out.device)
    return out
