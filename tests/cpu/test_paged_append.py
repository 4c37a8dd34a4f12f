"""Appending to pages: however tokens come, the pages are the same, and what they hold is right."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cpu.cache_fakes import e4m3_step, int32, nan_pages, raw_and_compressed, rows_and_scales, shuffled_table, used_cells
from torch import Tensor

from nsa_autotune import reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.paged import FP8, Pages, power_of_two_scale, read_compressed, read_tokens
from nsa_autotune.paged_append import write_compressed, write_tokens
from nsa_autotune.reference import PhiWeights

HEADS, DIM = 2, 3
CONFIGS = {1: NSAConfig(16, 16, 32), 2: NSAConfig(16, 8, 32), 4: NSAConfig(32, 8, 32)}  # by l/d
DTYPES = [torch.float32, torch.float16, torch.bfloat16, FP8]


class Store:
    """Raw and compressed pages with a table; sequences of `lengths` tokens in all, 0 for inactive ones."""

    def __init__(self, lengths: list[int], page_size: int, config: NSAConfig, dtype: torch.dtype) -> None:
        self.config, self.done = config, [0] * len(lengths)
        pages_each = -(-max(lengths) // page_size) + 1
        self.table = shuffled_table(len(lengths), pages_each)
        self.raw, self.cmp = raw_and_compressed(self.table.numel(), page_size, HEADS, DIM, config, dtype)
        for sequence, length in enumerate(lengths):
            if length == 0:
                self.table[sequence] = 1 << 30  # what an inactive sequence names is never looked at

    def append(self, x: Tensor, phi: PhiWeights | None = None) -> None:
        """The same number of tokens for every active sequence."""
        num_new = x.shape[1]
        self.done = [n + num_new if self.table[b, 0] < 1 << 30 else 0 for b, n in enumerate(self.done)]
        write_tokens(self.raw, self.table, int32(self.done), x)
        write_compressed(self.raw, self.cmp, self.table, int32(self.done), num_new, self.config, phi)

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Values and scales of all tokens and compressed rows of each sequence."""
        found = []
        for b, length in enumerate(self.done):
            if length:
                found.append(rows_and_scales(self.raw, self.table[b], torch.arange(length)))
                found.append(rows_and_scales(self.cmp, self.table[b], used_cells(length, self.config)))
        return found


def random_chunks(total: int, seed: int) -> list[int]:
    pick, parts = random.Random(seed), list[int]()
    while sum(parts) < total:
        parts.append(min(pick.choice([1, 2, 7, 30, 70]), total - sum(parts)))
    return parts


def fill(store: Store, x: Tensor, chunks: list[int], phi: PhiWeights | None = None) -> None:
    for part in x.split(chunks, dim=1):
        store.append(part, phi)


def growing(batch: int, tokens: int) -> Tensor:
    """Tokens whose sizes wander over many powers of two, the first one zero."""
    size = torch.exp2(torch.randn(batch, tokens, HEADS, 1) * 4)
    x = torch.randn(batch, tokens, HEADS, DIM) * size
    x[:, 0] = 0
    return x


def agree(got: Store, want: Store, steps: float = 1.0) -> None:
    """Bit for bit. For fp8 within a step; compressed rows may also have seen tokens before the scale of these rose.

    Then each was up to 2^-9 of the later scale nearer to the truth.
    """
    coarse = torch.zeros(())
    for number, ((a, scale_a), (b, scale_b)) in enumerate(zip(got.rows(), want.rows(), strict=True)):
        assert a.isfinite().all() and b.isfinite().all()
        if want.raw.scale is None:
            assert torch.equal(a, b)
            continue
        scale = torch.maximum(scale_a, scale_b)
        of_tokens = reference.compress_mean(coarse[None], want.config)[0] / 512 if number % 2 else 0.0
        assert ((a - b).abs() <= steps * e4m3_step(b, scale) + of_tokens).all()
        coarse = scale


@pytest.mark.parametrize("ratio", [1, 2, 4], ids=lambda r: f"l/d={r}")
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_by_one_in_chunks_and_at_once_give_the_same_pages(dtype: torch.dtype, page_size: int, ratio: int) -> None:
    config, total = CONFIGS[ratio], 265 if page_size == 256 else 75
    x = growing(3, total).clamp(-6e4, 6e4)
    lengths = [total, 0, total]
    ones = [1] * 70 if page_size < 256 else [1] * 5 + [total - 15] + [1] * 5
    stores = [Store(lengths, page_size, config, dtype) for _ in range(3)]
    for store, chunks in zip(stores, ([total], [*ones, 5], random_chunks(total, 5)), strict=True):
        fill(store, x.to(torch.float32 if dtype == FP8 else dtype), chunks)
    agree(stores[1], stores[0])
    agree(stores[2], stores[0])
    if dtype == FP8:
        for (_, one), (_, other) in zip(stores[0].rows()[::2], stores[1].rows()[::2], strict=True):
            assert torch.equal(one, other)  # the largest token of a page alone sets its scale


@pytest.mark.parametrize("ratio", [1, 2, 4], ids=lambda r: f"l/d={r}")
@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_what_is_read_back_is_what_was_given(page_size: int, ratio: int) -> None:
    """Ragged lengths: each sequence against its own tokens and the compression of the whole."""
    config, lengths, widest = CONFIGS[ratio], [131, 5, 64, 0, 17], 131
    x = torch.randn(len(lengths), widest, HEADS, DIM)
    phi = PhiWeights(*(torch.randn(*s) for s in _phi_shapes(config)))
    store = Store(lengths, page_size, config, torch.float32)
    last = torch.stack([torch.roll(x[b], widest - n, dims=0) for b, n in enumerate(lengths)])  # aligned with the end
    write_tokens(store.raw, store.table, int32(lengths), last)
    for weights in (None, phi):
        write_compressed(store.raw, store.cmp, store.table, int32(lengths), widest, config, weights)
        for b, n in enumerate(lengths):
            if n:
                mine = x[b : b + 1, :n]
                assert torch.equal(read_tokens(store.raw, store.table[b], n), mine[0])
                want = (
                    reference.compress_mean(mine, config)
                    if weights is None
                    else reference.compress_mlp(mine, weights, config)
                )[0]
                got = read_compressed(store.cmp, store.table[b], n, config)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)  # the order of float32 sums is the CPU's


def _phi_shapes(config: NSAConfig) -> list[tuple[int, ...]]:
    length, hidden = config.compress_block_size, 4
    return [(length, DIM), (length * DIM, hidden), (hidden,), (hidden, DIM), (DIM,)]


def test_a_learned_phi_is_applied_the_same_in_chunks() -> None:
    config = CONFIGS[4]
    phi = PhiWeights(*(torch.randn(*s) / 4 for s in _phi_shapes(config)))
    x, whole, parts = torch.randn(2, 100, HEADS, DIM), *(Store([100, 100], 16, config, torch.float32) for _ in "ab")
    fill(whole, x, [100], phi)
    fill(parts, x, random_chunks(100, 1), phi)
    for (a, _), (b, _) in zip(parts.rows(), whole.rows(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [64, 70, 47, 3])
def test_taking_tokens_back_and_writing_again_is_never_having_written(dtype: torch.dtype, kept: int) -> None:
    config, x, wrong = CONFIGS[2], torch.randn(2, 120, HEADS, DIM), torch.randn(2, 50, HEADS, DIM)
    x, wrong = (t.to(torch.float32 if dtype == FP8 else dtype) for t in (x, wrong))
    plain, rolled = (Store([120, 120], 32, config, dtype) for _ in "ab")
    fill(plain, x, [kept, 120 - kept])
    fill(rolled, x[:, :kept], [kept])
    fill(rolled, wrong, [20, 30])
    rolled.done = [kept, kept]
    fill(rolled, x[:, kept:], [1, 119 - kept])
    agree(rolled, plain, steps=2.0)  # fp8: the scale of the page may stay higher than it need be


def test_nothing_else_is_written() -> None:
    config = CONFIGS[2]
    for dtype in (torch.float32, FP8):
        store = Store([40, 0], 16, config, dtype)
        fill(store, torch.randn(2, 40, HEADS, DIM), [33, 7])
        raw, cells = store.raw.data.float(), store.cmp.data.float()
        assert raw.isfinite().all(-1).all(-1).sum() == 40
        assert cells.isfinite().all(-1).all(-1).sum() == config.num_compressed(40)
    pages, cells = raw_and_compressed(2, 16, HEADS, DIM, config, torch.float32)
    table, lengths = int32([0, 1])[None], int32([45])  # positions 20..44, the table ends at 32
    write_tokens(pages, table, lengths, torch.randn(1, 25, HEADS, DIM))
    write_compressed(pages, cells, table, lengths, 25, config, None)
    assert pages.data.isfinite().all(-1).all(-1).sum() == 12
    assert (~cells.data.isnan()).sum() == 0  # the two rows that new tokens complete hold older ones, which are NaN


def test_scales_are_the_smallest_power_of_two_that_holds_the_page() -> None:
    largest = torch.tensor([448.0, 448.1, 1.0, 2.0**-120, 3e38, 7.0, 896.0])
    for value, scale in zip(largest.tolist(), power_of_two_scale(largest).tolist(), strict=True):
        want = next(e for e in range(-149, 128) if value <= 448 * 2.0**e)
        assert math.log2(scale) == max(want, -126)
    x = torch.randn(1, 16, HEADS, DIM)
    pages = nan_pages(1, 16, HEADS, DIM, FP8)
    write_tokens(pages, int32([0])[None], int32([16]), x)
    got, scale = rows_and_scales(pages, int32([0]), torch.arange(16))
    assert torch.equal(scale[0, :, 0], power_of_two_scale(x[0].abs().amax((0, 2))))
    assert ((got - x[0]).abs() <= e4m3_step(x[0], scale) / 2).all()


def test_a_page_used_again_forgets_its_scale() -> None:
    pages, table = nan_pages(1, 16, HEADS, DIM, FP8), int32([0])[None]
    write_tokens(pages, table, int32([16]), torch.full((1, 16, HEADS, DIM), 1e5))
    write_tokens(pages, table, int32([3]), torch.full((1, 3, HEADS, DIM), 1e-3))
    assert (read_tokens(pages, table[0], 3, torch.float32) - 1e-3).abs().max() < 1e-4


def test_what_is_not_finite_spoils_its_own_token_only() -> None:
    x = torch.randn(1, 4, HEADS, DIM)
    x[0, 1], x[0, 2] = -math.inf, math.nan
    pages = nan_pages(1, 16, HEADS, DIM, FP8)
    write_tokens(pages, int32([0])[None], int32([4]), x)
    got = read_tokens(pages, int32([0]), 4, torch.float32)
    assert pages.scale is not None
    assert torch.equal(got[1], -448 * pages.scale[0, :, None].expand(HEADS, DIM)) and got[2].isnan().all()
    torch.testing.assert_close(got[[0, 3]], x[0, [0, 3]], rtol=0.07, atol=0.01)


def test_pages_may_be_strided_views() -> None:
    """A serving engine may keep keys and values side by side in one tensor."""
    both = torch.zeros(4, 16, HEADS, 2 * DIM)
    keys, x = Pages(both[..., :DIM]), torch.randn(1, 30, HEADS, DIM)
    write_tokens(keys, int32([2, 1])[None], int32([30]), x)
    assert torch.equal(read_tokens(keys, int32([2, 1]), 30), x[0])
    assert both[..., DIM:].abs().max() == 0
