"""Libraries measured beside our kernels: dense attention by cuDNN and FlashAttention-2, windows by FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnknownName
from ..spec import Problem
from .failure import is_sticky

Call = Callable[[], object]
Unavailable = tuple[None, str]
SDPA_BACKENDS = {"cudnn_sdpa": "CUDNN_ATTENTION", "flash_sdpa": "FLASH_ATTENTION"}
PROVIDERS = (*SDPA_BACKENDS, "flex_attention")


def library_call(
    provider: str, problem: Problem, device: torch.device | str, seed: int = 0
) -> tuple[Call, str] | Unavailable:
    """One call of a library on random q, k, v of the problem, tried once; or None and the reason why it cannot serve.

    `cudnn_sdpa` and `flash_sdpa` are dense causal attention, `flex_attention` attends to the window only.
    """
    if provider not in PROVIDERS:
        raise UnknownName("no such library", {"provider": provider}, f"Libraries: {', '.join(PROVIDERS)}.")
    device = torch.device(device)
    if problem.layout != "batched":
        return None, f"{provider} is measured on batched problems only"
    if problem.seq_q != problem.seq_k and provider in SDPA_BACKENDS:
        return None, f"{provider} aligns a causal mask with the first key, so seq_q = seq_k must hold"
    if device.type != "cuda":
        return None, f"{provider} is measured on CUDA devices only"
    q, k, v = _dense_inputs(problem, device, seed)
    if provider in SDPA_BACKENDS:
        return _dense(provider, q, k, v)
    return _flex_window(problem, q, k, v)


def _dense_inputs(problem: Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, HQ, TQ, D_QK]`, k `[B, H, TK, D_QK]`, v `[B, H, TK, D_V]`."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def draw(heads: int, tokens: int, width: int) -> Tensor:
        return torch.randn(problem.batch, heads, tokens, width, dtype=dtype, device=device, generator=generator)

    return (
        draw(problem.num_q_heads, problem.seq_q, problem.d_qk),
        draw(problem.num_kv_heads, problem.seq_k, problem.d_qk),
        draw(problem.num_kv_heads, problem.seq_k, problem.d_v),
    )


def _dense(provider: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Call, str] | Unavailable:
    """Grouped heads as the backend takes them, else with repeated keys (repeated once, before the clock starts)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = getattr(SDPBackend, SDPA_BACKENDS[provider])
    group = q.shape[1] // k.shape[1]
    reasons: list[str] = []
    for grouped in (True, False) if group > 1 else (False,):
        keys, values = (k, v) if grouped or group == 1 else (x.repeat_interleave(group, dim=1) for x in (k, v))

        def call(keys: Tensor = keys, values: Tensor = values, grouped: bool = grouped) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)

        if (reason := why_not(call)) is None:
            return call, ""
        reasons.append(reason)
    return None, f"{provider} cannot serve this problem: {reasons[-1]}"


def _flex_window(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Call, str] | Unavailable:
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        return None, f"flex_attention is not part of this torch: {error}"
    offset, width = problem.seq_k - problem.seq_q, problem.nsa.window_size

    def visible(_batch: Tensor, _head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        age = q_index + offset - k_index
        return (age >= 0) & (age < width)

    mask = create_block_mask(visible, None, None, problem.seq_q, problem.seq_k, device=str(q.device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> object:
        return compiled(q, k, v, block_mask=mask, enable_gqa=problem.group_size > 1)

    reason = why_not(call)
    return (call, "") if reason is None else (None, f"flex_attention cannot serve this problem: {reason}")


def why_not(call: Call) -> str | None:
    """Try a call: None if it works, else the library's reasons, which come as warnings and an exception."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # a library raises what it likes when it cannot serve
            if is_sticky(error):
                raise
            notes = [str(w.message).split(" (Triggered")[0] for w in caught]
            return " ".join([str(error).split("\n")[0], *dict.fromkeys(notes)])[:1000]
    return None
