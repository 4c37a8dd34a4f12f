"""What operators are compared with: the reference under autograd; a dispatcher that computes its specs' equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import one_dtype
import pytest
import torch
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.codegen.shapes import INDEX_FILLS
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.layout import PackedLayout, packed_layout
from nsa_autotune.ops import launches, serve
from nsa_autotune.ops.serve import Call
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import KernelSpec, Problem


class Equations(Dispatcher):
    """Runs the spec's reference instead of its kernel, and keeps the families' names."""

    def __init__(self) -> None:
        super().__init__(None, fingerprint=for_target("cuda:90"))
        self.families: list[str] = []
        self.layout: PackedLayout | None = None

    def launch(
        self, spec: KernelSpec, shape: Any, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        self.families.append(spec.family)
        outputs = {a.name for a in spec.arguments if a.is_output}
        names = {a.name for a in spec.arguments if a.fill not in INDEX_FILLS} - outputs
        asked = problem()
        given = {name: tensors[name] for name in names}
        if "layout" not in spec.problem_fields and given[min(names)].ndim == 3:
            found = spec.reference(asked, given)
        else:
            found = spec.reference(asked, given, self.layout, None)
        for name in outputs:
            old = tensors[name].clone() if tensors.get("accumulate") else 0.0
            tensors[name].copy_(found[name] + old)


def take_the_kernels_way(patch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of CUDA tensors, and end in the dispatcher's launch."""

    def launch(dispatcher: Dispatcher, spec: KernelSpec, shape: Any, problem: Any, tensors: Any, device: Any) -> None:
        one_dtype.note(spec.family, shape, tensors)
        dispatcher.launch(spec, (spec.family, *shape), problem, device, tensors)

    patch.setattr(serve, "on_kernels", lambda x: True)
    patch.setattr(serve, "launch", launch)


def gradients(given: dict[str, Tensor], do: Tensor, **how: Any) -> dict[str, Tensor]:
    """Of every argument of ops.nsa_attention, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = ops.nsa_attention(**leaves, **how)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), do), strict=True))


def reference_attention(
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
    **_unused: Any,
) -> Tensor:
    """ops.nsa_attention from the reference alone, so that PyTorch's autograd finds the gradients."""
    layout = None
    if cu_seqlens is not None:
        other = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        layout = packed_layout(cu_seqlens, other, q.shape[0], k.shape[0], config)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def compress(x: Tensor, phi: PhiWeights | None) -> Tensor:
        if phi is None:
            return reference.compress_mean(x, config, layout=layout)
        return reference.compress_mlp(x, phi, config, layout=layout)

    k_cmp, v_cmp = compress(k, phi_k), compress(v, phi_v)
    how: dict[str, Any] = {"scale": scale, "layout": layout}
    o_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, config, seq_k=k.shape[-3], **how)
    with torch.no_grad():  # by the operators' function, so that a test can fix the selection
        blocks = launches.launch_select(q, k_cmp, lse, Call(config, k.shape[-3], scale, layout, None))
    own = [k if k_slc is None else k_slc, v if v_slc is None else v_slc]
    o_slc, _ = reference.selected_attention(q, *own, blocks, config, **how)
    own = [k if k_win is None else k_win, v if v_win is None else v_win]
    o_win, _ = reference.window_attention(q, *own, config, **how)
    return reference.combine(gates, o_cmp, o_slc, o_win)
