"""The module's decode step on the device: equal to its forward, in a graph, and without waiting or allocating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cpu.cache_fakes import fill_with_nan
from cpu.test_docs import blocks
from gpu.decode_cases import GRAPH_CASE, HEADS, MODULE_CASES, ModuleCase
from gpu.judging import SharedBlocks, close, equations
from torch import Tensor

from nsa_autotune import KVCache, NativeSparseAttention
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.ops import decode
from nsa_autotune.paged import FP8

DEVICE = "cuda"
FP8_ERROR = 0.08  # of outputs, relative to their size: e4m3 keeps three bits of keys and values
SKEW = (0, 37)  # tokens by which prompts are shorter
PATCH = pytest.MonkeyPatch


def build(case: ModuleCase, dispatcher: Dispatcher) -> NativeSparseAttention:
    """The case's module, its weights representable in the case's dtype."""
    module = NativeSparseAttention(
        *(case.hidden, HEADS * case.group, HEADS, *case.dims),
        config=case.config,
        compression=case.compression,
        phi_hidden=case.phi_hidden,
        share_kv=case.share_kv,
        dispatcher=dispatcher,
    ).to(DEVICE)
    for parameter in module.parameters():
        parameter.data = parameter.to(getattr(torch, case.dtype)).float()
    return module.requires_grad_(False)


def cache_of(case: ModuleCase, module: NativeSparseAttention) -> KVCache:
    """Two sequences with pages reserved, all of NaN."""
    sizes = module.cache_sizes()
    sizes |= {"dtype": FP8} if case.cache_dtype != "problem" else {}
    pages = 2 * -(-case.capacity // case.page_size)
    room: dict[str, Any] = {"num_pages": pages, "max_batch": 2, "max_tokens": case.capacity}
    cache = KVCache.paged(**room, page_size=case.page_size, **sizes)
    fill_with_nan(cache.pools)
    cache.reserve(case.capacity)
    return cache


@contextmanager
def selecting(blocks: Tensor, start: int) -> Iterator[None]:
    """Within it, decode steps from position `start` on attend to `blocks` `[B, T, H, n]`."""
    real, at = decode._compressed, start

    def compressed(step: Any) -> tuple[Tensor, Tensor]:
        nonlocal at
        o_cmp, chosen = real(step)
        given = blocks[:, at : at + chosen.shape[1]].contiguous()
        at += chosen.shape[1]
        return o_cmp, given

    with PATCH.context() as patch:
        patch.setattr(decode, "_compressed", compressed)
        yield


@pytest.mark.parametrize("case", MODULE_CASES, ids=[case.name for case in MODULE_CASES])
@torch.no_grad()
def test_decode_equals_the_forward_at_every_position(case: ModuleCase, dispatcher: Dispatcher) -> None:
    check_decode(case, dispatcher)


def check_decode(case: ModuleCase, dispatcher: Dispatcher) -> None:
    """A prompt in two chunks, in which every block is selected, then token by token, or a few at a time."""
    dtype, module = getattr(torch, case.dtype), build(case, dispatcher)
    x = torch.randn(2, case.tokens, case.hidden, device=DEVICE).to(dtype)
    assert case.prompt <= case.config.num_selected * case.config.select_block_size
    blocks = SharedBlocks()
    with blocks.shared(), equations():
        wide, base = module(x.float()), module.to(dtype)(x)
    assert blocks.blocks is not None and blocks.reused == 1
    cache = cache_of(case, module)
    got = [module.prefill(part, cache) for part in x[:, : case.prompt].split(max(1, case.prompt * 2 // 5), dim=1)]
    with selecting(blocks.blocks, case.prompt):
        rest = x[:, case.prompt :]
        whole = rest.shape[1] - rest.shape[1] % case.new_tokens
        got += [module.decode_step(part, cache) for part in rest[:, :whole].split(case.new_tokens, dim=1)]
    out = torch.cat(got, dim=1)
    assert cache.host_lengths == (out.shape[1],) * 2 and cache.lengths.tolist() == [out.shape[1]] * 2
    assert not cache.counters.any()
    wide, base = wide[:, : out.shape[1]], base[:, : out.shape[1]]
    if case.cache_dtype == "problem":
        close("out", out, wide, base)
        return
    error = (out.float() - wide).square().mean(-1).sqrt() / wide.square().mean(-1).sqrt()
    assert float(error.mean()) < FP8_ERROR, f"mean error {float(error.mean()):.3f} of the outputs' size"


def ragged(case: ModuleCase, module: NativeSparseAttention) -> KVCache:
    """A cache whose sequences hold prompts of different lengths."""
    cache = cache_of(case, module)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for sequence, shorter in enumerate(SKEW):
        how: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, case.dtype), "generator": generator}
        module.prefill(torch.randn(1, case.prompt - shorter, case.hidden, **how), cache, [sequence])
    return cache


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays a graph of `step`, and where it writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


@torch.no_grad()
def test_a_graph_gives_the_uncaptured_bits_while_lengths_grow(dispatcher: Dispatcher) -> None:
    check_graph(GRAPH_CASE, dispatcher)


def check_graph(case: ModuleCase, dispatcher: Dispatcher) -> None:
    """`case.tokens` tokens are appended by replays of one graph, and by as many ordinary steps."""
    module = build(case, dispatcher).to(getattr(torch, case.dtype))
    x = torch.randn(2, case.tokens + 1, case.hidden, device=DEVICE).to(getattr(torch, case.dtype))
    plain, graphed = ragged(case, module), ragged(case, module)
    want = [module.decode_step(token.contiguous(), plain) for token in x.split(1, dim=1)]
    token = x[:, :1].clone()
    assert torch.equal(module.decode_step(token, graphed), want[0])  # compiles, which no capture may
    replay, out = captured(lambda: module.decode_step(token, graphed))
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for place in range(1, case.tokens + 1):
        token.copy_(x[:, place : place + 1])
        graphed.advance(1)
        replay()
        wrong += (out != want[place]).sum()
    assert int(wrong) == 0
    lengths = [case.prompt - shorter + case.tokens + 1 for shorter in SKEW]
    assert graphed.lengths.tolist() == plain.lengths.tolist() == lengths == list(graphed.host_lengths)
    assert not graphed.counters.any() and not plain.counters.any()
    assert not torch.equal(want[1], want[2])


@torch.no_grad()
def test_a_steady_step_neither_waits_nor_allocates(dispatcher: Dispatcher) -> None:
    case = GRAPH_CASE
    module = build(case, dispatcher).to(getattr(torch, case.dtype))
    token = torch.randn(2, 1, case.hidden, device=DEVICE).to(getattr(torch, case.dtype))
    cache = ragged(case, module)
    for _ in range(3):
        module.decode_step(token, cache)
    torch.cuda.synchronize()
    before = allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * case.page_size):
            module.decode_step(token, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert allocations() == before
    assert not cache.counters.any()


def allocations() -> dict[str, int]:
    """What counts calls of cudaMalloc and cudaFree."""
    stats, names = torch.cuda.memory_stats(), ("num_alloc_retries", "num_device_alloc", "num_device_free")
    return {name: int(stats.get(name, 0)) for name in (*names, "segment.all.allocated", "segment.all.freed")}


@torch.no_grad()
def test_pages_are_taken_without_waiting(dispatcher: Dispatcher) -> None:
    case = MODULE_CASES[1]
    module = build(case, dispatcher).to(getattr(torch, case.dtype))
    sizes = module.cache_sizes()
    cache = KVCache.paged(num_pages=200, max_batch=2, max_tokens=case.capacity, page_size=case.page_size, **sizes)
    token = torch.randn(2, 1, case.hidden, device=DEVICE).to(getattr(torch, case.dtype))
    module.decode_step(token, cache)
    free = cache.pages.num_free
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3 * case.page_size):
            module.decode_step(token, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.pages.num_free == free - 6


def test_the_block_of_the_docs_about_graphs_runs() -> None:
    found: dict[str, Any] = {}
    (block,) = blocks("inference.md", "python gpu")
    exec(block, found)
    assert found["out"].isfinite().all()
    assert found["cache"].lengths.tolist() == list(found["cache"].host_lengths) == [321]
