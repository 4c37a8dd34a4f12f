"""The module with a cache: prefill and decode equal its forward, however the tokens come."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cpu.cache_fakes import fill_with_nan, int32
from torch import Tensor

from nsa_autotune import KVCache, NativeSparseAttention, NSAConfig
from nsa_autotune.errors import CacheFull, InvalidConfig, InvalidInput
from nsa_autotune.paged import FP8

HIDDEN = 16
CONFIG = NSAConfig(8, 4, 16, num_selected=4, window_size=10)
DEFAULTS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "d_qk": 8, "d_v": 4, "phi_hidden": 5, "config": CONFIG}


def build(**changes: Any) -> NativeSparseAttention:
    return NativeSparseAttention(HIDDEN, **{**DEFAULTS, **changes}).eval()


def cache_for(module: NativeSparseAttention, batch: int = 1, tokens: int = 160, **changes: Any) -> KVCache:
    page_size = changes.get("page_size", 16)
    room = {"max_batch": batch, "max_tokens": tokens, "num_pages": batch * -(-tokens // page_size) + 2}
    cache = KVCache.paged(**{**room, **module.cache_sizes(), "page_size": page_size, **changes})
    fill_with_nan(cache.pools)
    return cache


def decode(module: NativeSparseAttention, cache: KVCache, x: Tensor, at_once: int = 1) -> Tensor:
    return torch.cat([module.decode_step(part, cache) for part in x.split(at_once, dim=1)], dim=1)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def shape(name: str, page_size: int, at_once: int, **changes: Any) -> Any:
    return pytest.param(changes, page_size, at_once, id=name)


SHAPES = [
    shape("d64-G1", 16, 1, d_qk=64, d_v=64, num_q_heads=1, num_kv_heads=1),
    shape("d128-G4-shared", 64, 2, d_qk=128, d_v=128, num_q_heads=4, num_kv_heads=1, share_kv=True),
    shape("d192-G8-mean", 256, 8, d_qk=192, d_v=128, num_q_heads=8, num_kv_heads=1, compression="mean"),
    shape("d256-G16-mean-shared", 16, 8, d_qk=256, d_v=256, num_q_heads=32, share_kv=True, compression="mean"),
    shape("no-rotary", 64, 1, rope_theta=None, bias=True),
    shape("l/d=4", 16, 2, config=NSAConfig(16, 4, 16, num_selected=3, window_size=40)),
    shape("l/d=1", 16, 1, config=NSAConfig(16, 16, 32, num_selected=3, window_size=5)),
]


@pytest.mark.parametrize(("changes", "page_size", "at_once"), SHAPES)
def test_decode_equals_the_forward_at_every_position(changes: dict[str, Any], page_size: int, at_once: int) -> None:
    module, x = build(**changes), torch.randn(2, 80, HIDDEN)
    cache = cache_for(module, 2, page_size=page_size)
    close(decode(module, cache, x, at_once), module(x))
    assert cache.host_lengths == (80, 80) and cache.lengths.tolist() == [80, 80]


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("share_kv", [False, True])
def test_ragged_sequences_decode_as_each_alone(page_size: int, share_kv: bool) -> None:
    """Prompts of other lengths, prefilled one by one, then decoded together, by one and by three tokens."""
    module, prompts, more = build(share_kv=share_kv), [1, 37, 16, 90], 12
    x = [torch.randn(1, n + more, HIDDEN) for n in prompts]
    cache = cache_for(module, len(prompts), page_size=page_size)
    got = [[module.prefill(mine[:, :n], cache, [b])[0]] for b, (mine, n) in enumerate(zip(x, prompts, strict=True))]
    start = 0
    for step in (1, 3, 1, 1, 3, 3):
        out = module.decode_step(
            torch.cat([mine[:, n + start : n + start + step] for mine, n in zip(x, prompts, strict=True)]), cache
        )
        start += step
        for mine, row in zip(got, out, strict=True):
            mine.append(row)
    for mine, parts in zip(x, got, strict=True):
        close(torch.cat(parts), module(mine)[0])


@pytest.mark.parametrize("chunks", [[80], [33, 47], [1, 2, 8, 31, 38]], ids=str)
@pytest.mark.parametrize("make", ["paged", "contiguous"])
def test_prefill_in_chunks_equals_the_forward(chunks: list[int], make: str) -> None:
    module, x = build(), torch.randn(2, 80, HIDDEN)
    cache = cache_for(module, 2)
    if make == "contiguous":
        cache = KVCache.contiguous(max_batch=2, max_tokens=80, page_size=32, **module.cache_sizes())
        fill_with_nan(cache.pools)
    got = torch.cat([module.prefill(part, cache) for part in x.split(chunks, dim=1)], dim=1)
    close(got, module(x))
    if len(chunks) == 1 and make == "paged":
        assert torch.equal(got, module(x))  # one shot over pages is the forward, bit for bit


def test_ragged_sequences_prefill_a_chunk_together() -> None:
    module, heads = build(config=NSAConfig(16, 4, 16, num_selected=3, window_size=12)), [5, 40, 16, 0]
    x = [torch.randn(1, n + 29, HIDDEN) for n in heads]
    cache = cache_for(module, 4)
    for b, n in enumerate(heads):
        if n:
            module.prefill(x[b][:, :n], cache, [b])
    out = module.prefill(torch.cat([mine[:, -29:] for mine in x]), cache)
    for mine, got in zip(x, out, strict=True):
        close(got, module(mine)[0, -29:])


def test_greedy_tokens_are_the_same_on_every_path() -> None:
    """Full forward, chunked prefill and decode, token by token, speculation with rollback."""
    module, embedding = build(), torch.randn(50, HIDDEN)

    def pick(y: Tensor) -> int:
        return int((y @ embedding.T).argmax())

    prompt, count = torch.randint(50, (21,)).tolist(), 30
    full = list(prompt)
    for _ in range(count):
        full.append(pick(module(embedding[full][None])[0, -1]))

    def generate(chunk: int) -> list[int]:
        cache, found = cache_for(module), list(prompt)
        for part in embedding[prompt].split(chunk):
            y = (module.prefill if chunk > 1 else module.decode_step)(part[None], cache)
        for _ in range(count):
            found.append(pick(y[0, -1]))
            y = module.decode_step(embedding[found[-1:]][None], cache)
        return found

    assert generate(8) == full and generate(1) == full
    assert speculate(module, embedding, prompt, full, pick) == full
    assert len(set(full[len(prompt) :])) > 3  # no constant answer


def speculate(
    module: NativeSparseAttention, embedding: Tensor, prompt: list[int], truth: list[int], pick: Any
) -> list[int]:
    """Drafts of four tokens, of which the first few are right; what is wrong is taken back."""
    cache, found = cache_for(module), list(prompt)
    found.append(pick(module.prefill(embedding[prompt][None], cache)[0, -1]))
    while len(found) < len(truth):
        good = len(found) % 4
        draft = [found[-1], *truth[len(found) : len(found) + good], *[7] * (3 - good)][:4]
        y = module.decode_step(embedding[draft][None], cache)[0]
        answers = [pick(row) for row in y]
        right = next((i for i, token in enumerate(draft[1:]) if token != answers[i]), len(draft) - 1)
        found += answers[: right + 1]
        cache.truncate(0, len(found) - 1)
    return found[: len(truth)]


def test_layers_share_one_table() -> None:
    layers, x = [build(), build()], torch.randn(2, 40, HIDDEN)
    first = cache_for(layers[0], 2)
    caches = [first, first.another_layer()]
    assert caches[1].lengths is first.lengths and caches[1].pools.k_raw.data is not first.pools.k_raw.data

    def model(part: Tensor, how: str) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            part = part + getattr(layer, how)(part, cache)
        return part

    y = [model(x[:, :25], "prefill"), *(model(x[:, t : t + 1], "decode_step") for t in range(25, 40))]
    want = x + layers[0](x)
    close(torch.cat(y, dim=1), want + layers[1](want))
    assert first.host_lengths == (40, 40)


def test_a_step_that_a_layer_failed_in_is_taken_back() -> None:
    layers, x = [build(), build()], torch.randn(2, 40, HIDDEN)
    first = cache_for(layers[0], 2, tokens=48, num_pages=6)
    caches = [first, first.another_layer()]
    first.free(1)

    def model(part: Tensor, how: str, last: NativeSparseAttention = layers[1]) -> Tensor:
        for layer, cache in zip([layers[0], last], caches, strict=True):
            part = part + getattr(layer, how)(part, cache)
        return part

    for how, tokens in (("prefill", 30), ("decode_step", 1), ("decode_step", 8)):
        at = first.host_lengths[0]
        before = (first.host_lengths, first.lengths.tolist(), first.pages.num_free)
        with pytest.raises(InvalidInput, match="the head dim of its pool"):
            model(x[:, at : at + tokens], how, build(d_v=8))
        with pytest.raises(InvalidInput, match=r"take the step back with undo\(\)"):
            first.truncate(0, 0)
        caches[1].undo()
        assert (first.host_lengths, first.lengths.tolist(), first.pages.num_free) == before
        got = model(x[:, at : at + tokens], how)
        want = x + layers[0](x)
        close(got[0], (want + layers[1](want))[0, at : at + tokens])


def test_a_fork_goes_on_by_itself() -> None:
    module, x = build(), torch.randn(3, 70, HIDDEN)
    prompt = x[:1, :43]
    for cache in (
        cache_for(module, 3),
        KVCache.contiguous(max_batch=3, max_tokens=96, page_size=16, **module.cache_sizes()),
    ):
        cache.free(1), cache.free(2)
        module.prefill(prompt, cache, [0])
        cache.fork(0, 2)
        cache.fork(2, 1)
        got = decode(module, cache, x[:, 43:], 3)
        close(got, module(torch.cat([prompt.expand(3, -1, -1), x[:, 43:]], dim=1))[:, 43:])


def test_a_freed_sequence_makes_room_for_the_next_and_leaks_nothing() -> None:
    module = build()
    cache = cache_for(module, 2, tokens=64, num_pages=5)
    module.prefill(torch.full((2, 32, HIDDEN), torch.nan), cache)
    cache.free(0)
    x, y = torch.randn(1, 48, HIDDEN), torch.randn(1, 16, HIDDEN)
    got = module.prefill(x, cache, [0])
    close(got, module(x))
    cache.truncate(1, 0)
    close(module.decode_step(torch.cat([y[:, :8], y[:, :8]]), cache)[1], module(y[:, :8])[0])


def test_rows_of_freed_sequences_are_ignored() -> None:
    module, x = build(), torch.randn(2, 20, HIDDEN)
    cache = cache_for(module, 2)
    cache.free(0)
    noise = torch.full_like(x, torch.nan)
    got = decode(module, cache, torch.cat([noise[:1], x[1:]]))
    close(got[1], module(x)[1])
    assert cache.host_lengths == (0, 20) and cache.lengths.tolist() == [0, 20]


def test_a_prefill_that_names_none_brings_freed_sequences_back() -> None:
    module, x = build(), torch.randn(2, 20, HIDDEN)
    cache = cache_for(module, 2)
    module.prefill(x[:, :9], cache)
    cache.free(0)
    got = module.prefill(torch.cat([x[:1, :5], x[1:, 9:14]]), cache)
    close(got[0], module(x)[0, :5])
    close(got[1], module(x)[1, 9:14])
    assert cache.host_lengths == (5, 14) and cache.lengths.tolist() == [5, 14]


def test_a_cache_is_of_no_mode() -> None:
    """One that was made under inference_mode serves outside of it, and the other way round."""
    module, x = build(), torch.randn(2, 40, HIDDEN)
    with torch.inference_mode():
        first = cache_for(module, 2)
        caches = [first, first.another_layer()]
    for cache in caches:
        module.prefill(x[:, :20], cache)
    with torch.inference_mode():
        for cache in caches:
            module.prefill(x[:, 20:29], cache)
    for t in range(29, 40):
        for cache in caches:
            close(module.decode_step(x[:, t : t + 1], cache), module(x)[:, t : t + 1])
    first.truncate(0, 3)
    first.free(1)
    assert not first.counters.is_inference() and first.lengths.tolist() == [3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_for_autocast_is_made_within_it(dtype: torch.dtype) -> None:
    module, x = build(d_v=8), torch.randn(1, 15, HIDDEN)
    assert module.cache_sizes()["dtype"] == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert build().double().cache_sizes()["dtype"] == torch.float64  # which autocast leaves alone
        with pytest.raises(InvalidInput, match=r"k_cmp must be.*cache_sizes\(\) within it"):
            module.prefill(x, cache_for(module, dtype=torch.float32))
        cache = cache_for(module)
        got = torch.cat([module.prefill(x[:, :9], cache), decode(module, cache, x[:, 9:])], dim=1)
        assert cache.pools.k_raw.data.dtype == got.dtype == dtype
    close(got.float(), module(x), 0.03)
    assert build().to("meta").cache_sizes()["dtype"] == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_decodes_near_its_forward(dtype: torch.dtype) -> None:
    module, x = build(d_v=8).to(dtype), torch.randn(1, 15, HIDDEN, dtype=dtype)  # so short that every block is chosen
    close(decode(module, cache_for(module), x), module(x), 0.03)


@pytest.mark.parametrize("how", ["decode", "prefill"])
def test_fp8_pages_answer_near_bfloat16(how: str) -> None:
    """e4m3 keeps three bits: keys and values are off by up to 1/16, outputs by a few per cent of their size."""
    module, x = build(d_qk=16, d_v=16).bfloat16(), torch.randn(2, 60, HIDDEN, dtype=torch.bfloat16)
    answers = []
    for dtype in (torch.bfloat16, FP8):
        cache = cache_for(module, 2, dtype=dtype)
        y = module.prefill(x[:, :40], cache)
        answers.append(torch.cat([y, decode(module, cache, x[:, 40:])], dim=1) if how == "decode" else y)
    error = (answers[1] - answers[0]).float().square().mean().sqrt() / answers[0].float().square().mean().sqrt()
    assert 1e-3 < error < 0.06


def test_folded_weights_follow_the_parameters() -> None:
    module, x = build(), torch.randn(1, 40, HIDDEN)
    assert module.phi_k is not None
    first = module.phi_k.folded(torch.float32)
    assert module.phi_k.folded(torch.float32) is first
    with torch.inference_mode():
        module.phi_v.folded(torch.float32)
        decode(module, cache_for(module), x)
    with torch.no_grad():
        module.phi_k.position.add_(1.0)
        module.phi_v.b2.add_(1.0)
    close(decode(module, cache_for(module), x), module(x))
    again = module.phi_k.folded(torch.float32)
    assert again is not first and again.b1 is first.b1  # a captured graph reads the new biases
    module.load_state_dict(build().state_dict())
    close(decode(copy.deepcopy(module), cache_for(module), x), module(x))
    close(decode(module, cache_for(module), x), module(x))


def test_an_engine_keeps_its_tensors() -> None:
    module, x = build(), torch.randn(2, 30, HIDDEN)
    pools = cache_for(module, 2).pools
    table, lengths = torch.tensor([[3, 9, -1], [5, 2, -1]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = KVCache.from_engine(pools, table, lengths, config=CONFIG)
    lengths += 20
    first = module.prefill(x[:, :20], cache)
    parts = []
    for t in range(20, 30):
        lengths += 1
        parts.append(module.decode_step(x[:, t : t + 1], cache))
    close(torch.cat([first, *parts], dim=1), module(x))
    lengths += 5  # beyond the entries that are filled
    with pytest.raises(InvalidInput, match=r"name pages that exist.*page=-1"):
        module.decode_step(x[:, :1], cache)
    with pytest.raises(InvalidInput, match="serving engine"):
        cache.fork(0, 1)


@pytest.mark.parametrize(
    ("how", "lengths", "max_length", "sentence"),
    [
        ("prefill", [5, 20], None, r"hold the new tokens already.*lengths=\[5, 20\]"),
        ("prefill", [0, 20], None, "hold the new tokens already"),
        ("prefill", [20, 20], 19, "max_length must be at least the number of new tokens; got max_length=19"),
        ("prefill", [20, 25], 24, "between 0 and the capacity; got length=25, capacity=24"),
        ("prefill", [20, 49], None, "between 0 and the capacity; got length=49, capacity=48"),
        ("decode_step", [20, 20], 10, "between 0 and the capacity; got sequence=0, length=20, capacity=10"),
        ("decode_step", [1, 1], 2, "max_length must be at least the number of new tokens"),
    ],
)
def test_an_engine_that_counts_wrongly_is_told_before_anything_is_written(
    how: str, lengths: list[int], max_length: int | None, sentence: str
) -> None:
    module = build()
    pools = cache_for(module, 2).pools
    table = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    cache = KVCache.from_engine(pools, table, int32(lengths), config=CONFIG, max_length=max_length)
    with pytest.raises(InvalidInput, match=sentence):
        getattr(module, how)(torch.randn(2, 20 if how == "prefill" else 3, HIDDEN), cache)
    assert all(pages.data.isnan().all() for pages in pools.distinct())


def test_bad_steps_are_refused_and_leave_the_cache_as_it_was() -> None:
    module, x = build(), torch.randn(1, 40, HIDDEN)
    cache = cache_for(module, tokens=40, num_pages=2)
    want = module(x)
    module.prefill(x[:, :20], cache)
    other = build(config=NSAConfig(8, 4, 16, num_selected=5, window_size=10))
    wide = build(d_v=8)
    free = cache.pages.num_free
    for act, error, sentence in (
        (lambda: module.decode_step(x[:, :9], cache), InvalidInput, "up to 8 tokens.*prefill"),
        (
            lambda: module.decode_step(x.expand(2, -1, -1)[:, :1], cache),
            InvalidInput,
            "a row for each sequence.*A step has",
        ),
        (
            lambda: module.prefill(x.expand(2, -1, -1)[:, :1], cache),
            InvalidInput,
            "a row for each sequence.*Name those",
        ),
        (lambda: module.decode_step(x[:, :1], None), InvalidInput, "cache must be a KVCache; got cache='NoneType'"),
        (lambda: module.prefill(x[:, :1], None), InvalidInput, "cache must be a KVCache"),
        (lambda: module.prefill(x[:, :1], cache, 1), InvalidInput, "sequences must be a list of ints"),
        (lambda: module.prefill(x[:, :1], cache, "a"), InvalidInput, "sequence must be an int"),
        (lambda: module.prefill(x[:, :1], cache, [0.7]), InvalidInput, "sequence must be an int"),
        (lambda: module.prefill(x[:, 20:38], cache), CacheFull, "free page"),
        (lambda: module.prefill(x[:, 20:], cache, [1]), InvalidInput, "below max_batch"),
        (lambda: module.prefill(x[:, :21], cache), CacheFull, "outgrow"),
        (lambda: other.decode_step(x[:, :1], cache), InvalidInput, "made for the module's NSA constants"),
        (lambda: wide.decode_step(x[:, :1], cache), InvalidInput, "v must be.*the head dim of its pool"),
        (lambda: build().double().decode_step(x[:, :1].double(), cache), InvalidInput, "must be on cpu and of"),
        (lambda: build(share_kv=True).decode_step(x[:, :1], cache), InvalidInput, "k_slc must be given"),
    ):
        with pytest.raises(error, match=sentence) as caught:
            act()
        assert caught.value.remedy or caught.value.values
        assert cache.host_lengths == (20,) and cache.lengths.tolist() == [20] and cache.pages.num_free == free
    close(decode(module, cache, x[:, 20:32]), want[:, 20:32])
    with pytest.raises(InvalidConfig, match="multiple of compress_stride"):
        cache_for(build(config=NSAConfig(32, 32, 64)), page_size=16)
