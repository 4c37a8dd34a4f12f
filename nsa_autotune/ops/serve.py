"""From tensors to a dispatched kernel, and to the reference where no kernel exists yet (CPU tensors, backward)."""

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


@cache
def _say_reference_backward() -> None:
    logger.warning("backward runs through the PyTorch reference: correct, but slow; backward kernels do not exist yet")


class _ReferenceBackward(torch.autograd.Function):
    """A kernel forward whose gradients come from the paper's equation in float32."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], equation: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.equation = equation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _say_reference_backward()
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch.enable_grad():
            wide = [t.detach().float().requires_grad_(need) for t, need in zip(saved, needs, strict=True)]
            outputs = ctx.equation(*wide)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            [o for o, _ in used],
            [t for t in wide if t.requires_grad],
            [g.to(o.dtype) for o, g in used],
            allow_unused=True,
        )
        by_input = iter(found)
        return None, None, *(_narrow(next(by_input), t) if need else None for t, need in zip(saved, needs, strict=True))


def _narrow(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype)


def run(kernel: Callable[..., Any], equation: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """The kernel's result, differentiable through the equation; CPU tensors go to the equation itself."""
    if not tensors[0].is_cuda:
        return equation(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _ReferenceBackward.apply(kernel, equation, *tensors)  # type: ignore[no-untyped-call]
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
