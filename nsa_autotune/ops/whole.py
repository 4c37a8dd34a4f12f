"""The whole attention after compression as one custom operator, so that the branches share one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..config import NSAConfig
from ..dense import softmax_dtype
from . import backward, launches
from .library import NAMESPACE, Tensors, exactly, filled, make_call, refuse, shapes, wanted

NUM_KEYS = 6  # k_cmp, v_cmp, k_slc, v_slc, k_win, v_win
BRANCHES = ("cmp", "slc", "win")


@custom_op(f"{NAMESPACE}::gated_attention", mutates_args=())
def gated_attention(
    gates: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    recompute: bool,
    index: Tensors,
    constants: str,
    seq_k: int,
    scale: float,
    dispatcher: int,
) -> list[Tensor]:
    """[out, blocks, lse_cmp, lse_slc, lse_win], and unless `recompute` also o_cmp, o_slc, o_win."""
    call = make_call(q, index, constants, seq_k, scale, dispatcher)
    with exactly(q):
        o_cmp, lse_cmp = launches.launch_attention("cmp", q, k_cmp, v_cmp, None, call)
        blocks = launches.launch_select(q, k_cmp, lse_cmp, call)
        o_slc, lse_slc = launches.launch_attention("slc", q, k_slc, v_slc, blocks, call)
        o_win, lse_win, out = launches.launch_window_and_sum(gates, q, k_win, v_win, o_cmp, o_slc, call)
    return [out, blocks, lse_cmp, lse_slc, lse_win, *([] if recompute else [o_cmp, o_slc, o_win])]


@gated_attention.register_fake
def _(gates: Tensor, q: Tensor, *others: Any) -> list[Tensor]:
    keys, recompute, constants = others[:NUM_KEYS], others[NUM_KEYS], others[NUM_KEYS + 2]
    shape = (*q.shape[:-2], keys[0].shape[-2], NSAConfig.from_text(constants).num_selected)
    outputs = [q.new_empty((*q.shape[:-1], keys[1].shape[-1])) for _ in range(1 if recompute else 4)]
    lses = [q.new_empty(q.shape[:-1], dtype=softmax_dtype(q)) for _ in BRANCHES]
    return [outputs[0], q.new_empty(shape, dtype=torch.int32), *lses, *outputs[1:]]


@custom_op(f"{NAMESPACE}::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    do: Tensor,
    gates: Tensor,
    q: Tensor,
    keys: Tensors,
    blocks: Tensor,
    lses: Tensors,
    outputs: Tensors,
    needs: Sequence[bool],
    index: Tensors,
    constants: str,
    seq_k: int,
    scale: float,
    dispatcher: int,
) -> list[Tensor]:
    """Gradients of gates, q and the keys and values; without `outputs` the branches are computed again."""
    call = make_call(q, index, constants, seq_k, scale, dispatcher)
    with exactly(q):
        found = backward.gated_attention_gradients(do, gates, q, keys, blocks, outputs, lses, needs, call)
    return filled(found, q)


@gated_attention_backward.register_fake
def _(
    do: Tensor, gates: Tensor, q: Tensor, keys: Tensors, blocks: Tensor, lses: Tensors, outputs: Tensors, *rest: Any
) -> list[Tensor]:
    needs = rest[0]
    both = [needs[n] or needs[n ^ 1] for n in range(2, 2 + NUM_KEYS)]  # a kernel writes dk and dv
    return shapes([gates, q, *keys], [True, needs[1], *both])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    tensors, (_, index, *rest) = inputs[: 2 + NUM_KEYS], inputs[2 + NUM_KEYS :]
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.num_index = rest, len(index)
    ctx.save_for_backward(*tensors, *index, *output[1:])


def _gradient(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    nothing = (None, [None] * ctx.num_index, None, None, None, None)  # recompute, index, and what is no tensor
    if grads[0] is None:
        return *[None] * (2 + NUM_KEYS), *nothing
    gates, q, *saved = ctx.saved_tensors
    keys, saved = saved[:NUM_KEYS], saved[NUM_KEYS:]
    index, (blocks, *others) = saved[: ctx.num_index], saved[ctx.num_index :]
    needs = list(ctx.needs_input_grad[: 2 + NUM_KEYS])
    found = gated_attention_backward(grads[0], gates, q, keys, blocks, others[:3], others[3:], needs, index, *ctx.rest)
    return *wanted(found, needs), *nothing


gated_attention.register_autograd(_gradient, setup_context=_setup)
gated_attention_backward.register_autograd(refuse)
