"""Custom operators of torch.library: what autograd, torch.compile, checkpointing and data parallelism see.

An operator has a real body (kernels or equations), a fake one (shapes only) and a formula of its gradient, which is an
operator too. Operators take tensors, numbers and strings: `index` holds those of a PackedLayout (none if batched),
`constants` is NSAConfig.to_text(), `dispatcher` a handle of `serve`. A second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..config import NSAConfig
from ..dense import softmax_dtype
from ..errors import InvalidInput
from ..layout import PackedLayout
from . import backward, launches, serve
from .serve import Call

Tensors = Sequence[Tensor]
NAMESPACE = __name__.partition(".")[0]  # of the operators: a shipped copy of this package has one of its own


def make_call(x: Tensor, index: Tensors, constants: str, seq_k: int, scale: float, dispatcher: int) -> Call:
    """What an operator's arguments stand for."""
    config = NSAConfig.from_text(constants)
    layout = PackedLayout.from_tensors(index, seq_k, config) if index else None
    return Call(config, seq_k, scale, layout, serve.from_handle(dispatcher, x))


def exactly(x: Tensor) -> Any:
    """Within it, autocast changes no dtype: operators compute in the dtype of their inputs."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def filled(found: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator returns tensors only: an empty one stands for None."""
    return [like.new_empty(0) if g is None else g for g in found]


def wanted(found: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that autograd asked for."""
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def refuse(ctx: Any, *grads: Tensor | None) -> Any:
    """The gradient of a gradient: a sentence."""
    remedy = "Use create_graph=False, or nsa_autotune.reference, which is differentiable twice."
    raise InvalidInput("native sparse attention has no second derivative", {}, remedy)


@custom_op(f"{NAMESPACE}::compress", mutates_args=())
def compress(x: Tensor, weights: Tensors, index: Tensors, constants: str, dispatcher: int) -> Tensor:
    """Eq. 7: phi with its weights, or the mean without."""
    call = make_call(x, index, constants, x.shape[-3], 1.0, dispatcher)
    with exactly(x):
        return launches.launch_compress(x, *weights, config=call.config, layout=call.layout, dispatcher=call.dispatcher)


@compress.register_fake
def _(x: Tensor, weights: Tensors, index: Tensors, constants: str, dispatcher: int) -> Tensor:
    count = index[-1].shape[0] if index else NSAConfig.from_text(constants).num_compressed(x.shape[1])
    return x.new_empty((*x.shape[:-3], count, *x.shape[-2:]))


@custom_op(f"{NAMESPACE}::compress_backward", mutates_args=())
def compress_backward(
    dout: Tensor, x: Tensor, weights: Tensors, index: Tensors, constants: str, dispatcher: int
) -> list[Tensor]:
    """Gradients of x and the weights."""
    call = make_call(x, index, constants, x.shape[-3], 1.0, dispatcher)
    with exactly(x):
        return backward.compress_gradients(dout, x, weights, call.config, call.layout, call.dispatcher)


@compress_backward.register_fake
def _(dout: Tensor, x: Tensor, weights: Tensors, index: Tensors, constants: str, dispatcher: int) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *weights)]


def _compress_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, index, constants, dispatcher = inputs
    ctx.num_weights, ctx.rest = len(weights), (constants, dispatcher)
    ctx.save_for_backward(x, *weights, *index)


def _compress_gradient(ctx: Any, dout: Tensor) -> Any:
    x, *others = ctx.saved_tensors
    weights, index = others[: ctx.num_weights], others[ctx.num_weights :]
    dx, *dweights = compress_backward(dout, x, weights, index, *ctx.rest)
    return dx, dweights, [None] * len(index), None, None


@custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(
    branch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    index: Tensors,
    constants: str,
    seq_k: int,
    scale: float,
    dispatcher: int,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of one branch: "cmp", "slc" (with blocks) or "win"."""
    call = make_call(q, index, constants, seq_k, scale, dispatcher)
    with exactly(q):
        return launches.launch_attention(branch, q, k, v, blocks, call)


@attend.register_fake
def _(branch: str, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=softmax_dtype(q))


@custom_op(f"{NAMESPACE}::attend_backward", mutates_args=())
def attend_backward(
    branch: str,
    saved: Tensors,
    do: Tensor | None,
    dlse: Tensor | None,
    blocks: Tensor | None,
    needs: Sequence[bool],
    index: Tensors,
    constants: str,
    seq_k: int,
    scale: float,
    dispatcher: int,
) -> list[Tensor]:
    """Gradients of q, k, v; `saved` is q, k, v, o, lse."""
    call = make_call(saved[0], index, constants, seq_k, scale, dispatcher)
    with exactly(saved[0]):
        found = backward.branch_gradients(branch, call, blocks, saved[:3], saved[3:], (do, dlse), needs)
    return filled(found, saved[0])


@attend_backward.register_fake
def _(branch: str, saved: Tensors, do: Any, dlse: Any, blocks: Any, needs: Sequence[bool], *_rest: Any) -> list[Tensor]:
    keys = needs[1] or needs[2]
    return shapes(saved[:3], (needs[0], keys, keys))


def shapes(tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """Fake gradients of the tensors, empty where none is needed."""
    empty = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    return [e if need else e.new_empty(0) for e, need in zip(empty, needs, strict=True)]


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    branch, q, k, v, blocks, index, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.branch, ctx.rest, ctx.num_index = branch, rest, len(index)
    ctx.save_for_backward(q, k, v, *output, *index, *(() if blocks is None else (blocks,)))


def _attend_gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
    saved, others = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    index, blocks = list(others[: ctx.num_index]), (*others[ctx.num_index :], None)[0]
    needs = list(ctx.needs_input_grad[1:4])
    found = attend_backward(ctx.branch, saved, do, dlse, blocks, needs, index, *ctx.rest)
    return None, *wanted(found, needs), None, [None] * len(index), None, None, None, None


@custom_op(f"{NAMESPACE}::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, index: Tensors, constants: str, seq_k: int, scale: float, dispatcher: int
) -> Tensor:
    """Eq. 8-12; no gradient: q, k and lse get theirs from compressed attention."""
    call = make_call(q, index, constants, seq_k, scale, dispatcher)
    with exactly(q):
        return launches.launch_select(q, k, lse, call)


@select_blocks.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, index: Tensors, constants: str, *_rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-2], k.shape[-2], NSAConfig.from_text(constants).num_selected), dtype=torch.int32)


@custom_op(f"{NAMESPACE}::combine", mutates_args=())
def combine(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, dispatcher: int) -> Tensor:
    """Eq. 5."""
    with exactly(gates):
        served = serve.from_handle(dispatcher, gates)
        return launches.launch_combine(gates, o_cmp, o_slc, o_win, dispatcher=served)


@combine.register_fake
def _(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, dispatcher: int) -> Tensor:
    return torch.empty_like(o_cmp, memory_format=torch.contiguous_format)


@custom_op(f"{NAMESPACE}::combine_backward", mutates_args=())
def combine_backward(do: Tensor, gates: Tensor, outputs: Tensors, dispatcher: int) -> list[Tensor]:
    """Gradients of the gates and the three outputs."""
    served = serve.from_handle(dispatcher, do)
    with exactly(do):
        return backward.combine_gradients(do, gates, outputs, served)


@combine_backward.register_fake
def _(do: Tensor, gates: Tensor, outputs: Tensors, dispatcher: int) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gates, *outputs)]


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dispatcher = inputs
    ctx.save_for_backward(*tensors)


def _combine_gradient(ctx: Any, do: Tensor) -> Any:
    gates, *outputs = ctx.saved_tensors
    return *wanted(combine_backward(do, gates, outputs, ctx.dispatcher), ctx.needs_input_grad[:4]), None


for _operator, _gradient, _setup in (
    (compress, _compress_gradient, _compress_setup),
    (attend, _attend_gradient, _attend_setup),
    (combine, _combine_gradient, _combine_setup),
    (compress_backward, refuse, None),
    (attend_backward, refuse, None),
    (combine_backward, refuse, None),
):
    _operator.register_autograd(_gradient, setup_context=_setup)
