"""The module with a cache on the device: near its forward, whatever the pages hold, and the same from a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune import KVCache, NativeSparseAttention
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.paged import FP8

HIDDEN = 128


def build(dispatcher: Dispatcher, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> NativeSparseAttention:
    module = NativeSparseAttention(HIDDEN, 16, 1, 64, dispatcher=dispatcher, **changes)
    return module.to("cuda", dtype).requires_grad_(False)


def cache_for(module: NativeSparseAttention, batch: int, tokens: int, **changes: Any) -> KVCache:
    sizes = {"max_batch": batch, "max_tokens": tokens, "num_pages": batch * -(-tokens // 64) + 8}
    return KVCache.paged(**{**sizes, **module.cache_sizes(), **changes})


def tokens(batch: int, count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(batch, count, HIDDEN, device="cuda", dtype=dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).float().norm() / want.float().norm())


@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("changes", [{}, {"share_kv": True, "compression": "mean"}], ids=["mlp", "mean-shared"])
def test_prefill_and_decode_are_near_the_forward(
    dispatcher: Dispatcher, page_dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """600 tokens: every block is selected, so that no near tie decides; a fork and a rollback on the way."""
    module, x = build(dispatcher, **changes), tokens(2, 600)
    x[1, :333] = x[0, :333]
    cache = cache_for(module, 2, 600, dtype=page_dtype, debug=True)
    module.prefill(x[:1, :200], cache, [0])
    parts = [module.prefill(x[:1, 200:333], cache, [0])]
    cache.fork(0, 1)
    assert relative_error(parts[0], module(x)[:1, 200:333]) < (0.02 if page_dtype != FP8 else 0.1)
    module.decode_step(tokens(2, 5), cache)  # wrong tokens, taken back
    for row in range(2):
        cache.truncate(row, 333)
    steps = [1, 8, 3, 1] * 20
    got = torch.cat([module.decode_step(part, cache) for part in x[:, 333:593].split(steps, dim=1)], dim=1)
    assert relative_error(got, module(x)[:, 333:593]) < (0.02 if page_dtype != FP8 else 0.1)


@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_a_captured_step_replays_while_lengths_grow(dispatcher: Dispatcher, compression: str) -> None:
    """4096 tokens a sequence by replays, beside the same steps without a graph."""
    module = build(dispatcher, compression=compression, share_kv=True)
    start, total, warm = 100, 4200, 3
    x, caches = tokens(3, total), [cache_for(module, 3, total) for _ in range(2)]
    for cache in caches:
        cache.reserve(total)
        module.prefill(x[:, :start], cache)
    eager, graphed = caches
    place, graph, stream = x[:, :1].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(start, start + warm):
            module.decode_step(place.copy_(x[:, t : t + 1]), graphed)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = module.decode_step(place, graphed)
    assert graphed.host_lengths == (start + warm,) * 3
    for t in range(start, total):
        want = module.decode_step(x[:, t : t + 1], eager)
        if t >= start + warm:
            place.copy_(x[:, t : t + 1])
            graphed.advance(1)
            graph.replay()
            if t % 64 < 2 or t == total - 1:
                torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
    assert graphed.lengths.tolist() == eager.lengths.tolist() == [total] * 3 == list(graphed.host_lengths)
