"""The cache's sequences and pages against lists of Python, its promises to a captured graph, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu.cache_fakes import fill_with_nan, int32, used_cells
from torch import Tensor

from nsa_autotune import KVCache, NSAConfig, reference
from nsa_autotune.errors import CacheFull, InvalidConfig, InvalidInput
from nsa_autotune.nn import page_table
from nsa_autotune.paged import FP8, Pages, read_rows, read_tokens

CONFIG = NSAConfig(8, 4, 16)
SIZES: dict[str, Any] = {"num_kv_heads": 1, "d_qk": 32, "d_v": 16, "config": CONFIG, "dtype": torch.float32}


def paged(**changes: Any) -> KVCache:
    room = {"num_pages": 12, "page_size": 16, "max_batch": 3, "max_tokens": 96}
    cache = KVCache.paged(**{**room, **SIZES, **changes})
    fill_with_nan(cache.pools)
    return cache


def contiguous(**changes: Any) -> KVCache:
    cache = KVCache.contiguous(**{"page_size": 16, "max_batch": 3, "max_tokens": 96, **SIZES, **changes})
    fill_with_nan(cache.pools)
    return cache


def give(cache: KVCache, count: int, sequences: list[int] | None = None, **more: Any) -> Tensor:
    """Appends random tokens to all, or to some; returns their keys `[B, count, 1, 32]`."""
    rows = cache.max_batch if sequences is None else len(sequences)
    k = torch.randn(rows, count, 1, 32)
    cache.append(k, k[..., :16] * 2, sequences=sequences, **more)
    return k


def holds(cache: KVCache, sequence: int, k: Tensor) -> None:
    """The sequence has exactly these keys, their values, and their compressed rows."""
    table, length = cache.block_table[sequence], k.shape[0]
    assert cache.host_lengths[sequence] == length == int(cache.lengths[sequence])
    assert torch.equal(read_tokens(cache.pools.k_raw, table, length), k)
    assert torch.equal(read_tokens(cache.pools.v_raw, table, length), k[..., :16] * 2)
    got = read_rows(cache.pools.k_cmp, table, used_cells(length, CONFIG))
    torch.testing.assert_close(got, reference.compress_mean(k[None], CONFIG)[0])


@pytest.mark.parametrize("make", [paged, contiguous])
@pytest.mark.parametrize("seed", range(4))
def test_random_acts_leave_what_lists_would(make: Any, seed: int) -> None:
    """Append, fork, truncate, free and reserve in any order; two layers; a full cache changes nothing."""
    pick, first = random.Random(seed), make(**({"num_pages": 8} if make is paged else {"max_tokens": 48}))
    caches = [first, first.another_layer()]
    want = [torch.zeros(0, 1, 32) for _ in range(3)]
    active, full = [True] * 3, 0
    for _ in range(150):
        act, b = pick.choice(["append", "append", "name", "fork", "truncate", "free", "reserve"]), pick.randrange(3)
        before = (first.host_lengths, first.pages.num_free, first.block_table.clone(), first.lengths.clone())
        try:
            if act in ("append", "name"):
                names = None if act == "append" else [b]
                k = torch.randn(3 if names is None else 1, pick.choice([1, 1, 3, 20]), 1, 32)
                for cache in caches:
                    cache.append(k, k[..., :16] * 2, sequences=names)
                if names is not None:
                    active[b] = True
                for row in range(3) if names is None else [b]:
                    if active[row]:
                        want[row] = torch.cat([want[row], k[row if names is None else 0]])
            elif act == "fork":
                other = (b + 1) % 3
                first.free(other)
                want[other], active[other] = torch.zeros(0, 1, 32), False
                before = (first.host_lengths, first.pages.num_free, first.block_table.clone(), first.lengths.clone())
                first.fork(b, other)
                want[other], active[other] = want[b], True
            elif act == "truncate":
                length = pick.randint(0, len(want[b]))
                first.truncate(b, length)
                want[b] = want[b][:length]
            elif act == "free":
                first.free(b)
                want[b], active[b] = torch.zeros(0, 1, 32), False
            elif pick.random() < 0.2:
                first.reserve(pick.choice([10, 40]))
        except CacheFull:
            full += 1
            assert (first.host_lengths, first.pages.num_free) == before[:2]
            assert torch.equal(first.block_table, before[2]) and torch.equal(first.lengths, before[3])
        for cache in caches:
            for row in range(3):
                holds(cache, row, want[row])
    assert full > 0
    for row in range(3):
        first.free(row)
    assert first.pages.num_free == (8 if make is paged else 0)


def test_forks_share_full_pages_and_copy_the_partial_one() -> None:
    cache = paged()
    k = give(cache, 40, [0])
    cache.fork(0, 1)
    assert cache.block_table[0, :2].tolist() == cache.block_table[1, :2].tolist()
    assert cache.block_table[0, 2] != cache.block_table[1, 2]
    assert cache.pages.num_free == 12 - 4
    cache.truncate(1, 20)  # into a page that both hold: the next token has to copy it
    more = give(cache, 1, [1])
    holds(cache, 0, k[0])
    holds(cache, 1, torch.cat([k[0, :20], more[0]]))
    cache.free(0)
    holds(cache, 1, torch.cat([k[0, :20], more[0]]))


def test_reserved_pages_leave_the_table_as_it_is() -> None:
    cache = paged()
    give(cache, 5)
    cache.reserve(50)
    table, free = cache.block_table.clone(), cache.pages.num_free
    assert free == 12 - 3 * 4
    for _ in range(45):
        give(cache, 1)
    cache.truncate(1, 7)
    give(cache, 10, [1])
    assert torch.equal(cache.block_table, table) and cache.pages.num_free == free
    with pytest.raises(CacheFull, match="free page"):
        give(cache, 20)
    with pytest.raises(CacheFull, match="free page"):
        cache.reserve(96)
    give(cache, 1, [1])  # the old promise still holds
    cache.free(2)  # what was reserved for it is free as well
    assert cache.pages.num_free == 4
    with pytest.raises(CacheFull, match="outgrow its cache; got tokens=97, max_tokens=96"):
        cache.reserve(97)


def test_what_is_reserved_is_a_sequence_of_its_own() -> None:
    cache = paged()
    k = give(cache, 33, [0])
    cache.fork(0, 1)
    cache.reserve(48)
    assert cache.pages.num_free == 12 - 3 - 1 - 3
    cache.truncate(1, 5)  # of its three pages two are those of the other one
    more = give(cache, 30, [1])
    holds(cache, 0, k[0])
    holds(cache, 1, torch.cat([k[0, :5], more[0]]))
    cache.truncate(2, 0)
    cache.fork(0, 2)  # which has reserved pages that it does not need now
    for row in range(3):
        cache.free(row)
    assert cache.pages.num_free == 12


def test_a_captured_step_counts_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a captured step runs at once, as its replay would: the host hears of it by `advance`."""
    cache = paged(max_batch=2)
    k = give(cache, 14)
    monkeypatch.setattr(page_table, "_capturing", lambda x: True)
    with pytest.raises(InvalidInput, match=r"no page can be taken.*reserve"):
        give(cache, 3)
    with pytest.raises(InvalidInput, match="named sequences cannot be captured"):
        give(cache, 1, [0])
    monkeypatch.undo()
    cache.reserve(20)
    monkeypatch.setattr(page_table, "_capturing", lambda x: True)
    more = give(cache, 3)
    assert cache.host_lengths == (14, 14) and cache.lengths.tolist() == [17, 17]
    monkeypatch.undo()
    cache.advance(3)
    holds(cache, 1, torch.cat([k[1], more[1]]))
    with pytest.raises(CacheFull, match="outgrow"):
        cache.advance(80)
    assert cache.host_lengths == (17, 17)


def test_numbers_of_other_kinds_count_as_ints() -> None:
    cache = paged()
    k = give(cache, 5, torch.tensor([0, 2]))
    cache.truncate(torch.tensor(2), torch.tensor(3))
    assert cache.host_lengths == (5, 0, 3) and type(cache.host_lengths[2]) is int
    holds(cache, 2, k[1, :3])


def test_a_reservation_that_a_capture_refuses_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged()
    give(cache, 5)
    monkeypatch.setattr(page_table, "_capturing", lambda x: True)
    with pytest.raises(InvalidInput, match="no page can be taken"):
        cache.reserve(50)
    give(cache, 1)  # which has room


def test_a_graph_is_not_replayed_beyond_what_it_was_captured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels look at no more tokens than were reserved, rounded up to a power of two from 1024 on."""
    cache = paged(max_batch=1, max_tokens=4096, num_pages=16, page_size=256)
    give(cache, 1)
    monkeypatch.setattr(page_table, "_capturing", lambda x: True)
    give(cache, 1)
    monkeypatch.undo()
    cache.advance(1023)
    with pytest.raises(CacheFull, match=r"outgrow the graph.*tokens=1025, captured for=1024.*capture again"):
        cache.advance(1)
    assert cache.host_lengths == (1024,)
    cache.reserve(1100)
    monkeypatch.setattr(page_table, "_capturing", lambda x: True)
    with cache.step(1) as rows:
        assert rows.max_length == 2048
    monkeypatch.undo()
    cache.advance(1)
    assert cache.host_lengths == (1025,)


def test_advance_takes_the_pages_that_a_replay_needs() -> None:
    cache = paged(max_batch=1)
    give(cache, 16)
    cache.advance(1)
    assert cache.pages.num_free == 12 - 2 and cache.block_table[0, 1] == 1 and cache.host_lengths == (17,)


def test_layers_take_each_step_once() -> None:
    first = paged()
    second = first.another_layer()
    give(first, 4)
    assert first.host_lengths == (4, 4, 4)
    for act in (
        lambda: give(first, 4),
        lambda: first.truncate(0, 1),
        lambda: first.reserve(9),
        lambda: first.advance(1),
    ):
        with pytest.raises(InvalidInput, match=r"all layers must have appended.*\[1\].*undo"):
            act()
    with pytest.raises(InvalidInput, match="the same tokens in a step; got tokens=5"):
        give(second, 5)
    with pytest.raises(InvalidInput, match="the same tokens in a step"):
        give(second, 4, [0])
    k = give(second, 4)
    holds(second, 2, k[2])
    give(first, 20)
    first.undo()  # say the model failed between its layers
    assert first.host_lengths == (4, 4, 4) and first.pages.num_free == 12 - 3
    holds(second, 2, k[2])
    second.undo()  # nothing is unfinished
    assert first.lengths.tolist() == [4, 4, 4]
    with pytest.raises(InvalidInput, match="before the first token"):
        first.another_layer()


def test_a_layer_that_fails_can_try_again() -> None:
    first = paged()
    second = first.another_layer()
    give(first, 4)
    with pytest.raises(InvalidInput, match="v must be"):
        second.append(torch.randn(3, 4, 1, 32), torch.randn(3, 4, 1, 9))
    assert first.host_lengths == (4, 4, 4)  # the first layer has them
    holds(second, 0, give(second, 4)[0])
    with pytest.raises(InvalidInput, match="v must be"):
        first.append(torch.randn(3, 4, 1, 32), torch.randn(3, 4, 1, 9))
    assert first.host_lengths == (4, 4, 4) and first.lengths.tolist() == [4, 4, 4]


def test_a_failed_first_token_of_a_freed_sequence_leaves_it_freed() -> None:
    cache = paged()
    cache.free(1)
    with pytest.raises(InvalidInput, match="v must be"):
        cache.append(torch.randn(1, 4, 1, 32), torch.randn(1, 4, 1, 9), sequences=[1])
    give(cache, 2)
    assert cache.host_lengths == (2, 0, 2) and cache.lengths.tolist() == [2, 0, 2]


def test_contiguous_sequences_lie_side_by_side() -> None:
    cache = contiguous()
    assert cache.block_table.tolist() == [[6 * b + slot for slot in range(6)] for b in range(3)]
    k = give(cache, 33)
    flat = cache.pools.k_raw.data.reshape(3, 96, 1, 32)
    assert torch.equal(flat[:, :33], k)


def test_fp8_pages_keep_their_scales_through_a_fork() -> None:
    cache = paged(dtype=FP8)
    k = give(cache, 20, [0]) * 1
    cache.fork(0, 1)
    one, other = (read_tokens(cache.pools.k_raw, cache.block_table[b], 20, torch.float32) for b in (0, 1))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, k[0], rtol=0.07, atol=0.01)


@pytest.mark.parametrize(
    ("act", "error", "sentence"),
    [
        (lambda c: give(c, 1, [3]), InvalidInput, r"below max_batch; got sequences=\[3\]"),
        (lambda c: give(c, 1, [0, 0]), InvalidInput, "named once each"),
        (
            lambda c: c.append(torch.randn(0, 1, 1, 32), torch.randn(0, 1, 1, 16), sequences=[]),
            InvalidInput,
            "once each",
        ),
        (lambda c: c.append(torch.randn(3, 0, 1, 32), torch.randn(3, 0, 1, 16)), InvalidInput, "at least one token"),
        (lambda c: c.append(torch.randn(3, 1, 2), torch.randn(3, 1, 1)), InvalidInput, "k must be a tensor"),
        (lambda c: c.append(None, None), InvalidInput, "k must be a tensor.*NoneType"),
        (
            lambda c: c.append(torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 16)),
            InvalidInput,
            r"block_table must be int32 \[B, MP\].*B = 2",
        ),
        (
            lambda c: c.append(torch.randn(3, 1, 1, 32).half(), torch.randn(3, 1, 1, 16)),
            InvalidInput,
            "v must have the tokens, dtype and device of k",
        ),
        (
            lambda c: c.append(torch.randn(3, 2, 1, 32), torch.randn(3, 1, 1, 16)),
            InvalidInput,
            "v must have the tokens",
        ),
        (lambda c: give(c, 1, k_win=torch.randn(3, 1, 1, 32)), InvalidInput, "k_win must be given if, and only if"),
        (
            lambda c: c.append(torch.randn(3, 1, 1, 32).half(), torch.randn(3, 1, 1, 16).half()),
            InvalidInput,
            "k_cmp must be",
        ),
        (lambda c: c.truncate(0, 6), InvalidInput, "a length that it has passed; got length=6, tokens=5"),
        (lambda c: c.truncate(0, -1), InvalidInput, "a length that it has passed"),
        (lambda c: c.fork(0, 1), InvalidInput, r"empty one.*free\(target\)"),
        (lambda c: c.fork(0, 7), InvalidInput, "below max_batch"),
        (lambda c: c.advance(0), InvalidInput, "at least one token"),
        (lambda c: c.advance(1.5), InvalidInput, r"tokens must be an int; got tokens=1\.5"),
        (lambda c: c.advance(True), InvalidInput, "tokens must be an int; got tokens=True"),
        (lambda c: c.reserve(30.5), InvalidInput, r"tokens must be an int of at least 0; got tokens=30\.5"),
        (lambda c: c.reserve(-5), InvalidInput, "tokens must be an int of at least 0; got tokens=-5"),
        (lambda c: c.reserve(True), InvalidInput, "tokens must be an int of at least 0"),
        (lambda c: c.truncate(0, 2.5), InvalidInput, r"length must be an int; got length=2\.5"),
        (lambda c: c.truncate(0, 2.0), InvalidInput, r"length must be an int; got length=2\.0"),
        (lambda c: c.truncate(0, "2"), InvalidInput, "length must be an int; got length='2'"),
        (lambda c: c.truncate(False, 2), InvalidInput, "sequence must be an int"),
        (lambda c: c.fork(0.0, 1.0), InvalidInput, "sequence must be an int"),
        (lambda c: c.free("a"), InvalidInput, "sequence must be an int"),
        (lambda c: c.pages.begin(0, 1.5), InvalidInput, "tokens must be an int"),
        (lambda c: c.pages.begin(0, 1, 1), InvalidInput, "sequences must be a list of ints; got sequences=1"),
        (lambda c: c.pages.begin(0, 1, "a"), InvalidInput, "sequence must be an int"),
        (lambda c: c.pages.begin(0, 1, [0.7]), InvalidInput, r"sequence must be an int.*0\.7"),
        (lambda c: give(c, 92), CacheFull, "outgrow"),
        (lambda c: give(c, 70), CacheFull, "pages needed=12, free=9, of=12"),
    ],
)
def test_bad_acts_are_refused_and_change_nothing(act: Any, error: type[Exception], sentence: str) -> None:
    cache = paged()
    k = give(cache, 5)
    with pytest.raises(error, match=sentence):
        act(cache)
    assert cache.pages.num_free == 9 and cache.pages._book.reserved == 0
    assert cache.host_lengths == (5, 5, 5) and cache.lengths.tolist() == [5, 5, 5]
    more = give(cache, 20)
    for row in range(3):
        holds(cache, row, torch.cat([k[row], more[row]]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"page_size": 48}, "power of two from 16 to 256; got page_size=48"),
        ({"page_size": 512}, "power of two"),
        (
            {"page_size": 16, "config": NSAConfig(32, 32, 32)},
            r"multiple of compress_stride \(d\); got page_size=16, d=32",
        ),
        ({"config": NSAConfig(24, 12, 24)}, "multiple of compress_stride"),
        ({"dtype": torch.float64}, "that pages can have.*float64.*float8"),
        ({"num_pages": 0}, "num_pages must be a positive int"),
        ({"max_batch": 2.0}, "max_batch must be a positive int"),
        ({"d_v": 0}, "d_v must be a positive int"),
        ({"config": None}, "config must be an NSAConfig; got config='NoneType'"),
    ],
    ids=str,
)
def test_impossible_caches_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        paged(**changes)


def engine(table: list[list[int]], lengths: list[int], **changes: Any) -> KVCache:
    return KVCache.from_engine(paged().pools, int32(table), int32(lengths), **{"config": CONFIG, **changes})


@pytest.mark.parametrize(
    ("table", "lengths", "sentence"),
    [
        ([[0, 1], [2, 12]], [17, 17], "pages that exist; got sequence=1, page=12, pages=12"),
        ([[0, 1], [-2, 3]], [17, 17], "pages that exist; got sequence=1, page=-2"),
        ([[0, 1], [2, 3]], [17, 33], "between 0 and the capacity; got sequence=1, length=33, capacity=32"),
        ([[0, 1], [2, 3]], [-1, 3], "between 0 and the capacity"),
        ([[0, 1], [2, 1]], [17, 17], r"belong to one sequence; got page=1, sequences=\[0, 1\]"),
        ([[0, 1], [2, 0]], [17, 17], r"belong to one sequence; got page=0, sequences=\[0, 1\]"),  # the other reads it
        ([[4, 4], [2, 3]], [17, 1], "belong to one sequence"),
    ],
)
def test_a_wrong_block_table_is_refused_before_anything_is_written(
    table: list[list[int]], lengths: list[int], sentence: str
) -> None:
    cache = engine([[0, 1], [2, 3]], [1, 1])
    cache.block_table.copy_(int32(table))
    cache.lengths.copy_(int32(lengths))
    with pytest.raises(InvalidInput, match=sentence):
        cache.append(torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 16))
    assert cache.pools.k_raw.data.isnan().all()


@pytest.mark.parametrize(
    ("sequences", "sentence"),
    [
        ([-1], r"below max_batch; got sequences=\[-1\], max_batch=2.*from 0 to 1"),
        ([5], "below max_batch"),
        ([0, 0], "named once each"),
        ([0.7], "sequence must be an int"),
        (1, "sequences must be a list of ints"),
    ],
    ids=str,
)
def test_an_engine_names_sequences_that_exist(sequences: Any, sentence: str) -> None:
    cache = engine([[0, 1], [2, 3]], [1, 1])
    count = len(sequences) if isinstance(sequences, list) else 1
    with pytest.raises(InvalidInput, match=sentence):
        cache.append(torch.randn(count, 1, 1, 32), torch.randn(count, 1, 1, 16), sequences=sequences)
    assert cache.pools.k_raw.data.isnan().all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pools": None}, "pools must be CachePools; got pools='NoneType'"),
        ({"config": None}, "config must be an NSAConfig; got config='NoneType'"),
        ({"config": {}}, "config must be an NSAConfig; got config='dict'"),
        ({"block_table": [[0, 1]]}, "block_table must be an int32 tensor; got block_table='list'"),
        ({"block_table": int32(0)}, r"block_table must have a row for each sequence; got shape=\(\)"),
        ({"lengths": [1]}, "lengths must be an int32 tensor; got lengths='list'"),
        ({"max_length": 0}, "max_length must be an int of at least 1; got max_length=0"),
        ({"max_length": -1}, "max_length must be an int of at least 1"),
        ({"max_length": "x"}, "max_length must be an int of at least 1"),
        ({"max_length": True}, "max_length must be an int of at least 1"),
    ],
    ids=str,
)
def test_what_no_engine_has_is_refused(changes: dict[str, Any], sentence: str) -> None:
    given = {"pools": paged().pools, "block_table": int32([[0, 1]]), "lengths": int32([1]), "config": CONFIG}
    with pytest.raises(InvalidInput, match=sentence):
        KVCache.from_engine(**{**given, **changes})


def test_pools_without_heads_are_refused() -> None:
    pools = replace(paged().pools, k_cmp=Pages(torch.zeros(12, 4, 0, 32)))
    with pytest.raises(InvalidInput, match=r"k_cmp must be \[P, 4, H, D\]"):
        KVCache.from_engine(pools, int32([[0, 1]]), int32([1]), config=CONFIG)


def test_an_engine_may_share_pages_that_nobody_writes() -> None:
    cache = engine([[0, 1, -1], [0, 3, 99]], [17, 20])
    cache.append(torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 16))
    assert cache.pools.k_raw.data.isfinite().all(-1).sum() == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k_cmp": Pages(torch.zeros(12, 16, 1, 32))}, r"k_cmp must be \[P, 4, H, D\]"),
        ({"v_win": Pages(torch.zeros(12, 8, 1, 16))}, r"v_win must be \[P, 16, H, D\]"),
        ({"v_win": Pages(torch.zeros(12, 16, 1, 32))}, "values of all branches must have one head dim"),
        ({"v_slc": Pages(torch.zeros(12, 16, 1, 16).half())}, "v_slc must be.*float16"),
        ({"v_raw": Pages(torch.zeros(12, 16, 1, 16), torch.ones(12, 1))}, "v_raw needs scales if it is fp8"),
        ({"k_slc": Pages(torch.zeros(12, 16, 1, 64)[..., ::2])}, "vectors of k_slc must be contiguous"),
    ],
)
def test_pools_that_do_not_fit_are_refused(changes: dict[str, Pages], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        KVCache.from_engine(replace(paged().pools, **changes), int32([0])[None], int32([1]), config=CONFIG)
    for table, lengths in (
        (torch.zeros(1, 2), int32([1])),
        (int32([1])[None], torch.ones(1)),
        (int32([1]), int32([1])),
    ):
        with pytest.raises(InvalidInput, match="must be int32"):
            KVCache.from_engine(paged().pools, table, lengths, config=CONFIG)
