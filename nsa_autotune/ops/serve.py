"""From tensors to a dispatched kernel, forward and backward; CPU tensors go to the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import StoreError
from ..layout import PackedLayout
from ..spec import DEFAULT_LOCALITY, KernelSpec, Problem

logger = logging.getLogger("nsa_autotune")


@cache
def default_dispatcher() -> Dispatcher:
    """The dispatcher that serves calls without one of their own: winners of the default database."""
    from ..db import open_for_lookup  # SQLAlchemy is needed on the first CUDA call only

    try:
        return Dispatcher(open_for_lookup())
    except StoreError as error:
        logger.warning("no tuned kernels: %s", error)
        return Dispatcher(None)


Gradient = Callable[..., Sequence[Tensor | None]]  # (inputs, outputs, gradients of the outputs, which are needed)


class _KernelBackward(torch.autograd.Function):
    """A kernel forward with a kernel backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], gradient: Gradient, *tensors: Tensor) -> Any:
        ctx.gradient, ctx.num_inputs = gradient, len(tensors)
        ctx.set_materialize_grads(False)
        outputs = kernel(*tensors)
        ctx.save_for_backward(*tensors, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        inputs, outputs = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        needs = ctx.needs_input_grad[2:]
        found = ctx.gradient(inputs, outputs, grads, needs)
        return None, None, *(g if need else None for g, need in zip(found, needs, strict=True))


def trains_on_kernels(tensors: Sequence[Tensor]) -> bool:
    """True if a call on these tensors runs kernels and will be asked for gradients."""
    return tensors[0].is_cuda and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def run(kernel: Callable[..., Any], equation: Callable[..., Any], tensors: Sequence[Tensor], gradient: Gradient) -> Any:
    """The kernel's result, differentiable through `gradient`; CPU tensors go to the equation itself."""
    if not tensors[0].is_cuda:
        return equation(*tensors)
    if trains_on_kernels(tensors):
        return _KernelBackward.apply(kernel, gradient, *tensors)  # type: ignore[no-untyped-call]
    return kernel(*tensors)


def describe(
    q: Tensor | None,
    x: Tensor,
    config: NSAConfig,
    layout: PackedLayout | None,
    *,
    seq_k: int,
    d_v: int,
    locality: float = DEFAULT_LOCALITY,
    phi_hidden: int = 128,
) -> Problem:
    """The problem behind a call; x is a key tensor [.., T, H, D_QK]."""
    return Problem(
        batch=x.shape[0] if layout is None else layout.cu_seqlens_k.numel() - 1,
        seq_q=seq_k if q is None else q.shape[-3],
        seq_k=seq_k,
        num_q_heads=x.shape[-2] if q is None else q.shape[-2],
        num_kv_heads=x.shape[-2],
        d_qk=x.shape[-1],
        d_v=d_v,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="batched" if layout is None else "packed",
        locality=locality,
        phi_hidden=phi_hidden,
        nsa=config,
    )


def launch(
    dispatcher: Dispatcher | None,
    spec: KernelSpec,
    shape: tuple[Any, ...],
    problem: Callable[[], Problem],
    tensors: dict[str, Any],
    device: torch.device,
) -> None:
    """Serve one kernel on `device`; `shape` tells calls apart that need different kernels."""
    chosen = dispatcher or default_dispatcher()
    with torch.cuda.device(device):
        chosen.launch(spec, (spec.family, device.index, *shape), problem, device, tensors)
