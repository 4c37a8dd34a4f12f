"""What prefill gathers from the pages is what the forward kernels are made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu.cache_fakes import fill_with_nan, int32
from torch import Tensor

from nsa_autotune import KVCache, NSAConfig, ops, reference
from nsa_autotune.errors import InvalidInput
from nsa_autotune.layout import packed_layout
from nsa_autotune.ops import prefill

NEW = 3


def filled(lengths: list[int], config: NSAConfig, page_size: int) -> tuple[KVCache, list[Tensor], list[Tensor]]:
    """A cache of sequences with the given tokens, and their keys and values."""
    sizes: dict[str, Any] = {"num_kv_heads": 2, "d_qk": 8, "d_v": 4, "config": config, "dtype": torch.float32}
    room = {
        "max_batch": len(lengths),
        "max_tokens": max(lengths),
        "num_pages": sum(-(-n // page_size) for n in lengths),
    }
    cache = KVCache.paged(page_size=page_size, **room, **sizes)
    fill_with_nan(cache.pools)
    keys, values = ([torch.randn(n, 2, dim) for n in lengths] for dim in (8, 4))
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.append(k[None], v[None], sequences=[b])
    return cache, keys, values


@pytest.mark.parametrize(
    ("lengths", "config", "page_size"),
    [
        ([70, 3, 33, 5], NSAConfig(8, 4, 16, 4), 16),
        ([3, 9], NSAConfig(64, 16, 64), 16),  # the first compressed row would lie behind the block table
        ([40, 40], NSAConfig(16, 4, 16, 4), 32),
    ],
)
def test_the_forward_gets_its_own_layout(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], config: NSAConfig, page_size: int
) -> None:
    """Packed rows in their slots, zeros between them; and the result is that of the keys that were appended."""
    cache, keys, values = filled(lengths, config, page_size)
    seen: list[Tensor] = []
    real = prefill.whole.gated_attention
    monkeypatch.setattr(prefill.whole, "gated_attention", lambda *given: (seen.extend(given[2:8]), real(*given))[1])
    q, gates = torch.randn(len(lengths), NEW, 4, 8), torch.rand(len(lengths), NEW, 4, 3)
    got = prefill.prefill_attention(q, gates, cache.pools, cache.block_table, lengths, config=config)
    layout, how = None, {}
    if len(set(lengths)) == 1:
        k, v = torch.stack(keys), torch.stack(values)
    else:
        k, v, q, gates = torch.cat(keys), torch.cat(values), q.flatten(0, 1), gates.flatten(0, 1)
        cu_k = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
        cu_q = int32([NEW * b for b in range(len(lengths) + 1)])
        layout, how = packed_layout(cu_q, cu_k, len(q), len(k), config), {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k}
    for found, x in zip(seen[:2], (k, v), strict=True):
        torch.testing.assert_close(found, reference.compress_mean(x, config, layout=layout))
    assert all(torch.equal(found, x) for found, x in zip(seen[2:], (k, v, k, v), strict=True))
    want = ops.nsa_attention(q, k, v, gates, config=config, **how)
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-5, atol=1e-5)


def test_lengths_that_do_not_hold_the_chunk_are_refused() -> None:
    cache, *_ = filled([9, 2], NSAConfig(8, 4, 16, 4), 16)
    q, gates = torch.randn(2, NEW, 4, 8), torch.rand(2, NEW, 4, 3)
    for lengths in ([9, 2], [9]):
        with pytest.raises(InvalidInput, match=r"must hold the new tokens already.*Append before"):
            prefill.prefill_attention(q, gates, cache.pools, cache.block_table, lengths, config=cache.config)
