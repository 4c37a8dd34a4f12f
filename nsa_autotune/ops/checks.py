"""What must hold before a kernel sees a tensor; every failure is a sentence with the remedy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..config import NSAConfig
from ..dense import softmax_dtype
from ..errors import InvalidInput
from ..layout import PackedLayout

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT_BYTES = 16  # of rows and base pointers that tensor-memory access reads


def check_tensor(name: str, x: object) -> None:
    """x is a floating-point tensor without a tangent of forward-mode differentiation."""
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{name} must be a torch.Tensor", {name: type(x).__name__}, "Use torch.as_tensor().")
    if not x.is_floating_point():
        raise InvalidInput(
            f"{name} must be of a floating-point dtype", {name: str(x.dtype)}, "Use .to(torch.bfloat16)."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # PyTorch would drop it
        remedy = "Use torch.autograd.grad, or nsa_autotune.reference."
        raise InvalidInput("native sparse attention has no forward-mode derivative", {"tangent": name}, remedy)


def check_same(name: str, x: Tensor, q: Tensor) -> None:
    """x has the dtype and device of q."""
    check_tensor(name, x)
    if x.dtype != q.dtype:
        values = {"q": str(q.dtype), name: str(x.dtype)}
        raise InvalidInput(f"{name} must have the dtype of q", values, f"Use {name}.to(q.dtype).")
    check_device(name, x, q)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """x is on the device of q."""
    if x.device != q.device:
        values = {"q": str(q.device), name: str(x.device)}
        raise InvalidInput(f"{name} must be on the device of q", values, f"Use {name}.to(q.device).")


def check_form(q: Tensor, *, packed: bool) -> None:
    """q is a tensor of as many dimensions as its layout has."""
    check_tensor("q", q)
    if q.ndim != (3 if packed else 4):
        form = "[TQ, HQ, D_QK] with cu_seqlens" if packed else "[B, TQ, HQ, D_QK]"
        raise InvalidInput(f"q must be {form}", {"shape": tuple(q.shape)}, "Pass cu_seqlens only with packed tensors.")


def check_query(q: Tensor, layout: PackedLayout | None) -> None:
    """q is [B, TQ, HQ, D_QK], or packed [TQ, HQ, D_QK], of a dtype that kernels or the reference serve."""
    check_form(q, packed=layout is not None)
    if q.device.type not in ("cpu", "cuda"):
        raise InvalidInput("q must be on the CPU or a CUDA device", {"q": str(q.device)}, "Use .to('cuda').")
    if q.is_cuda and q.dtype not in KERNEL_DTYPES:
        known = "bfloat16, float16 or float32"
        raise InvalidInput(f"kernels serve {known}", {"q": str(q.dtype)}, "Cast, or call nsa_autotune.reference.")
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        raise InvalidInput("q must have heads and a head dim", {"shape": tuple(q.shape)})
    if layout is None and q.shape[1] < 1:
        raise InvalidInput("q must have at least one token", {"shape": tuple(q.shape)}, "Skip empty batches.")


def check_key(name: str, x: Tensor, q: Tensor, width: int | None = None) -> None:
    """x is [.., TK, H, D] beside q, H divides HQ, D is `width` if given."""
    check_same(name, x, q)
    if x.ndim != q.ndim or (q.ndim == 4 and x.shape[0] != q.shape[0]):
        values = {"q": tuple(q.shape), name: tuple(x.shape)}
        raise InvalidInput(f"{name} must be laid out like q: [B, TK, H, D], or packed [TK, H, D]", values)
    if x.shape[-2] < 1 or q.shape[-2] % x.shape[-2]:
        heads = {"query heads": q.shape[-2], f"heads of {name}": x.shape[-2]}
        remedy = "Every kv head serves the same number of query heads."
        raise InvalidInput(f"the heads of {name} must divide the query heads", heads, remedy)
    if width is not None and x.shape[-1] != width:
        values = {"q": tuple(q.shape), name: tuple(x.shape)}
        raise InvalidInput(f"{name} must have the head dim of q", values, "Only v may have its own (d_qk != d_v).")


def check_pair(k: Tensor, v: Tensor, branch: str) -> None:
    """k and v of one branch count the same tokens and heads."""
    if k.shape[:-1] != v.shape[:-1]:
        values = {"k": tuple(k.shape), "v": tuple(v.shape)}
        raise InvalidInput(f"k and v of the {branch} branch must have equal batch, tokens and heads", values)


def check_lengths(q: Tensor, seq_k: int, layout: PackedLayout | None) -> None:
    """Queries are aligned with the last keys, so there may not be more of them."""
    if layout is None and q.shape[1] > seq_k:
        values = {"TQ": q.shape[1], "TK": seq_k}
        raise InvalidInput(
            "queries are aligned with the last keys, so TQ <= TK must hold", values, "Pass all the keys."
        )


def check_blocks(blocks: Tensor, q: Tensor, num_kv_heads: int, config: NSAConfig) -> None:
    """blocks is int32 [.., TQ, H, n] on the device of q."""
    want = (*q.shape[:-2], num_kv_heads, config.num_selected)
    if tuple(blocks.shape) != want or blocks.dtype != torch.int32 or blocks.device != q.device:
        values = {"shape": tuple(blocks.shape), "dtype": str(blocks.dtype), "device": str(blocks.device)}
        raise InvalidInput(f"blocks must be int32 {want} on {q.device}", values, "Take them from select_blocks().")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """lse is float32 [.., TQ, HQ] on the device of q (float64 beside float64 queries)."""
    if lse.shape != q.shape[:-1] or lse.device != q.device or lse.dtype != softmax_dtype(q):
        values = {"shape": tuple(lse.shape), "dtype": str(lse.dtype), "device": str(lse.device)}
        rule = f"lse must be {str(softmax_dtype(q)).removeprefix('torch.')} {tuple(q.shape[:-1])} on {q.device}"
        raise InvalidInput(rule, values, "Take it from compressed_attention().")


def check_gates(gates: Tensor, q: Tensor) -> None:
    """gates is [.., TQ, HQ, 3] on the device of q, in the order cmp, slc, win."""
    check_tensor("gates", gates)
    if tuple(gates.shape) != (*q.shape[:-1], 3) or gates.device != q.device:
        values = {"q": tuple(q.shape), "gates": tuple(gates.shape), "device": str(gates.device)}
        raise InvalidInput("gates must be [.., TQ, HQ, 3] beside q (cmp, slc, win)", values, "Apply the sigmoid first.")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: Tensor) -> None:
    """int32 [S + 1] beside packed tokens; values are read only on the CPU, where that waits for nobody."""
    if not isinstance(cu_seqlens, Tensor):
        remedy = "Use torch.tensor(offsets, dtype=torch.int32)."
        raise InvalidInput(f"{name} must be a torch.Tensor", {name: type(cu_seqlens).__name__}, remedy)
    facts = {"dtype": str(cu_seqlens.dtype), "shape": tuple(cu_seqlens.shape), "device": str(cu_seqlens.device)}
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        is_int32 = cu_seqlens.dtype == torch.int32
        remedy = "It is the cumulative sum of the lengths, after a 0." if is_int32 else f"Use {name}.int()."
        raise InvalidInput(f"{name} must be int32 [S + 1] with S >= 1", facts, remedy)
    if cu_seqlens.device != tokens.device:
        remedy = f"Use {name}.to({str(tokens.device)!r})."
        raise InvalidInput(f"{name} must be on the device of the tokens", facts, remedy)
    if values_are_known(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tokens.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            values = {name: cu_seqlens.tolist(), "tokens": tokens.shape[0]}
            remedy = "It is the cumulative sum of the lengths, after a 0."
            raise InvalidInput(f"{name} must rise from 0 to the number of tokens", values, remedy)


def values_are_known(x: Tensor) -> bool:
    """True if reading x waits for no device and breaks no tracing."""
    return not x.is_cuda and not torch.compiler.is_compiling()


def readable(x: Tensor) -> Tensor:
    """x if kernels can read it in place: rows of whole heads, 16-byte aligned; else a copy."""
    *batches, _, heads, width = x.shape  # read once: each property of a tensor costs 0.1 us
    *batch_strides, token_stride, head_stride, last_stride = x.stride()
    in_place = (
        last_stride == 1
        and head_stride == width
        and token_stride >= width * heads
        and token_stride * x.element_size() % ALIGNMENT_BYTES == 0
        and x.data_ptr() % ALIGNMENT_BYTES == 0
        and (batches in ([], [1]) or (batch_strides[0] % token_stride == 0 and batch_strides[0] >= token_stride))
    )
    return x if in_place else x.clone(memory_format=torch.contiguous_format)  # contiguous() would keep a bad base
