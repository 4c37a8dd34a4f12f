"""Kernels that append to a paged cache, in the interpreter, against the equations of paged_append.

All that nothing has written is NaN, in the pages, their scales and the tokens that no kernel may read.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from cpu.cache_fakes import int32, nan_pages, shuffled_table
from cpu.watcher import watched
from torch import Tensor

from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import get_spec
from nsa_autotune.paged import FP8, Pages
from nsa_autotune.paged_append import write_compressed, write_tokens
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import Problem

FLOAT8 = "float8_e4m3fn"
CONFIGS = {1: NSAConfig(8, 8, 16), 2: NSAConfig(8, 4, 16), 4: NSAConfig(16, 4, 16)}  # by l/d
KINDS = [("problem", "float16"), ("problem", "float32"), (FLOAT8, "float16")]  # of the cache, and of the problem
HEADS, D_QK, D_V, HIDDEN = 2, 48, 32, 16
BASE = Problem(
    seq_q=1,
    seq_k=64,
    num_q_heads=HEADS,
    num_kv_heads=HEADS,
    d_qk=D_QK,
    d_v=D_V,
    dtype="float16",
    layout="paged",
    page_size=16,
    phi_hidden=HIDDEN,
    nsa=CONFIGS[2],
)


def module_of(family: str, problem: Problem, **config: Any) -> ModuleType:
    """The rendered kernel of a problem, by its default config with changes."""
    spec = get_spec(family)
    return load(render(spec, problem, {**spec.default_config(problem), **config}))


def dtype_of(problem: Problem) -> torch.dtype:
    """Of the cache."""
    found: torch.dtype = getattr(torch, problem.dtype if problem.cache_dtype == "problem" else problem.cache_dtype)
    return found


def copied(pages: Pages) -> Pages:
    """Pages of their own."""
    return Pages(pages.data.clone(), None if pages.scale is None else pages.scale.clone())


def bits(x: Tensor) -> Tensor:
    """As bytes: NaN equals itself."""
    return x.contiguous().view(torch.uint8)


def same(found: Pages, wanted: Pages) -> None:
    """Every byte of the pages and of their scales."""
    assert torch.equal(bits(found.data), bits(wanted.data))
    if wanted.scale is not None and found.scale is not None:
        assert torch.equal(bits(found.scale), bits(wanted.scale))


def given(name: str, pages: Pages) -> dict[str, Tensor]:
    """Launch arguments of pages."""
    return {name: pages.data, **({} if pages.scale is None else {f"{name}_scale": pages.scale})}


def history(
    problem: Problem, lengths: list[int], seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Pages], dict[str, Tensor]]:
    """Block table, lengths, pages with all tokens but the last Q, and these: "k" and "v" `[B, Q, H, D]`.

    Old tokens are smaller than new ones, so that fp8 scales grow in the middle of a page.
    """
    generator = torch.Generator().manual_seed(seed)
    each = -(-problem.seq_k // problem.page_size)
    table = shuffled_table(len(lengths), each, seed)
    caches, news = {}, {}
    for name, dim in (("k", D_QK), ("v", D_V)):
        pages = nan_pages(table.numel() + 2, problem.page_size, HEADS, dim, dtype_of(problem))
        old = torch.randn(len(lengths), problem.seq_k, HEADS, dim, generator=generator) * 0.3
        for index, length in enumerate(lengths):
            count = max(0, min(length, problem.seq_k) - problem.seq_q)
            write_tokens(pages, table[index : index + 1], int32([count]), old[index : index + 1, :count])
        new = torch.randn(len(lengths), problem.seq_q, HEADS, dim, generator=generator)
        caches[name], news[name] = pages, new.to(getattr(torch, problem.dtype))
    return table, int32(lengths), caches, news


def ragged(problem: Problem) -> list[int]:
    """Lengths: at and beside a page's border, new and unused sequences, fewer tokens than Q, one beyond the table."""
    size, most = problem.page_size, problem.seq_k
    return [size - 1, size, size + 1, size + problem.seq_q // 2 + 1, 0, 1, problem.seq_q, most, most + 2]


def check_tokens(problem: Problem, lengths: list[int]) -> None:
    """kv_append_fwd changes what the equations change, byte by byte."""
    table, tokens, caches, news = history(problem, lengths)
    for index, length in enumerate(lengths):  # tokens of no position
        for new in news.values():
            new[index, : max(0, problem.seq_q - length)] = math.nan
    wanted = {name: copied(pages) for name, pages in caches.items()}
    for name, pages in wanted.items():
        write_tokens(pages, table, tokens, news[name])
    with watched(module_of("kv_append_fwd", problem)) as (watcher, launch):
        arguments = {**given("k", caches["k"]), **given("v", caches["v"])}
        launch(k_new=news["k"], v_new=news["v"], table=table, lengths=tokens, **arguments)
        assert watcher.checked > 0
    for name, pages in caches.items():
        same(pages, wanted[name])


# rounding to e4m3


def test_every_float16_and_every_tie_is_rounded_as_torch_does() -> None:
    """A value of 448 in each token makes the scale 1."""
    halves = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.float16).float()
    codes = torch.arange(0x7E, dtype=torch.uint8)
    ties = (codes.view(FP8).float() + (codes + 1).view(FP8).float()) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(math.inf))])
    values = torch.cat([halves[halves.abs() <= 448], near, -near, torch.tensor([1e-20, -0.0, 1e-45])])
    width, num_new = HEADS * (D_QK - 1), 8
    values = torch.nn.functional.pad(values, (0, -len(values) % (width * num_new)))
    x = torch.full((len(values) // (width * num_new), num_new, HEADS, D_QK), 448.0)
    x[..., 1:] = values.view(-1, num_new, HEADS, D_QK - 1)
    problem = BASE.replace(seq_q=num_new, seq_k=16, dtype="float32", cache_dtype=FLOAT8)
    table = shuffled_table(len(x), 1)
    pages = {name: nan_pages(len(x), 16, HEADS, dim, FP8) for name, dim in (("k", D_QK), ("v", D_V))}
    arguments = {**given("k", pages["k"]), **given("v", pages["v"])}
    launch = module_of("kv_append_fwd", problem).launch
    launch(k_new=x, v_new=x[..., :D_V], table=table, lengths=int32([num_new] * len(x)), **arguments)
    assert pages["k"].scale is not None and bool((pages["k"].scale == 1).all())
    found = pages["k"].data[table[:, 0].long(), :num_new]
    assert torch.equal(bits(found), bits(x.to(FP8)))


@pytest.mark.parametrize("steps", [1, 3, 9, 30])
def test_every_code_is_rescaled_as_torch_does(steps: int) -> None:
    """A page of all codes, whose scale grows by 2^steps because of one more token."""
    problem = BASE.replace(page_size=256, seq_k=256, dtype="float32", cache_dtype=FLOAT8)
    pages = {name: nan_pages(1, 256, HEADS, dim, FP8) for name, dim in (("k", D_QK), ("v", D_V))}
    for cache in pages.values():
        codes = torch.arange(255, dtype=torch.int64).to(torch.uint8)[None, :, None, None]
        cache.data.view(torch.uint8)[:, :255] = codes
        assert cache.scale is not None
        cache.scale.fill_(2.0**-5)
    wanted = {name: copied(cache) for name, cache in pages.items()}
    news = {"k": torch.full((1, 1, HEADS, D_QK), 448.0 * 2.0 ** (steps - 5)), "v": torch.zeros(1, 1, HEADS, D_V)}
    for name, cache in wanted.items():
        write_tokens(cache, int32([0])[None], int32([256]), news[name])
    arguments = {**given("k", pages["k"]), **given("v", pages["v"])}
    launch = module_of("kv_append_fwd", problem).launch
    launch(k_new=news["k"], v_new=news["v"], table=int32([0])[None], lengths=int32([256]), **arguments)
    for name, cache in pages.items():
        found, exact = cache.data.float(), wanted[name].data.float()
        assert torch.equal(found.isnan(), exact.isnan())
        assert torch.equal(found.nan_to_num(), exact.nan_to_num())
        assert cache.scale is not None and wanted[name].scale is not None
        assert torch.equal(cache.scale, wanted[name].scale)


# tokens


@pytest.mark.parametrize(("num_new", "page_size"), [(1, 16), (3, 16), (8, 16), (1, 64), (8, 64), (3, 256)])
@pytest.mark.parametrize(("cache", "dtype"), KINDS)
def test_new_tokens_go_to_their_pages_and_nowhere_else(cache: str, dtype: str, num_new: int, page_size: int) -> None:
    problem = BASE.replace(seq_q=num_new, page_size=page_size, seq_k=3 * page_size, dtype=dtype, cache_dtype=cache)
    check_tokens(problem, ragged(problem))


def test_wrong_pages_of_a_table_are_never_touched() -> None:
    """Entries outside of the pools: their tokens are left out, the others written."""
    for cache in ("problem", FLOAT8):
        problem = BASE.replace(seq_q=3, cache_dtype=cache)
        table, tokens, caches, news = history(problem, [18, 18, 18])
        table[0, 1], table[1, 1] = -5, 1 << 20
        check = {name: copied(pages) for name, pages in caches.items()}
        for name, pages in check.items():
            write_tokens(pages, table[2:], tokens[2:], news[name][2:])
            for row in (0, 1):  # the token in the first page, the last of its rows
                write_tokens(pages, table[row : row + 1, :1], int32([16]), news[name][row : row + 1, :1])
        with watched(module_of("kv_append_fwd", problem)) as (_, launch):
            arguments = {**given("k", caches["k"]), **given("v", caches["v"])}
            launch(k_new=news["k"], v_new=news["v"], table=table, lengths=tokens, **arguments)
        for name, pages in caches.items():
            same(pages, check[name])


def test_tokens_and_pages_may_be_views() -> None:
    """Slices of a fused projection, heads before tokens, pages of one allocation, a table with room."""
    problem = BASE.replace(seq_q=3)
    table, tokens, caches, news = history(problem, ragged(problem))
    wanted = {name: copied(pages) for name, pages in caches.items()}
    for name, pages in wanted.items():
        write_tokens(pages, table, tokens, news[name])
    fused = torch.full((len(table), 3, 3 * HEADS, D_QK), math.nan, dtype=torch.float16)
    fused[:, :, HEADS : 2 * HEADS] = news["k"]
    heads_first = news["v"].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.full((len(caches["k"].data), 2, *caches["k"].data.shape[1:]), math.nan, dtype=torch.float16)
    both[:, 0] = caches["k"].data
    wide = torch.full((len(table), table.shape[1] + 3), -1, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    how = {"table": wide[:, : table.shape[1]], "lengths": tokens}
    launch = module_of("kv_append_fwd", problem).launch
    launch(k_new=fused[:, :, HEADS : 2 * HEADS], v_new=heads_first, k=both[:, 0], v=caches["v"].data, **how)
    same(Pages(both[:, 0]), wanted["k"])
    same(caches["v"], wanted["v"])
    assert bool(both[:, 1].isnan().all())


# compressed rows


def cells_before(problem: Problem, raw: Pages, table: Tensor, lengths: Tensor, phi: PhiWeights | None) -> Pages:
    """Cells that hold what was complete before the last Q tokens; all others are NaN."""
    rows, dim = problem.page_size // problem.nsa.compress_stride, raw.data.shape[-1]
    cells = nan_pages(len(raw.data), rows, HEADS, dim, dtype_of(problem))
    before = (lengths.clamp(max=problem.seq_k) - problem.seq_q).clamp(min=0)
    for index, length in enumerate(before.tolist()):
        if length:
            where = (table[index : index + 1], before[index : index + 1])
            write_compressed(raw, cells, *where, length, problem.nsa, phi)
    if cells.scale is not None:  # as if the rows before had been smaller: the new ones make the scale grow
        cells.scale.mul_(2.0**-4).nan_to_num_(2.0**30)  # that of a page which is used for the second time
    return cells


def check_cells(found: Pages, wanted: Pages, before: Pages, roundoff: float) -> None:
    """Equal scales, and bytes where nothing is written; values within `roundoff` and one step of fp8."""
    value, exact = (x.data.float() * (1 if x.scale is None else x.scale[:, None, :, None]) for x in (found, wanted))
    assert torch.equal(value.isnan(), exact.isnan())
    step = 0.0 if wanted.scale is None else 2.0**-3
    torch.testing.assert_close(value.nan_to_num(), exact.nan_to_num(), rtol=step + roundoff, atol=step / 64 + roundoff)
    untouched = exact.isnan()
    assert torch.equal(bits(found.data)[bits_mask(untouched, found)], bits(before.data)[bits_mask(untouched, found)])
    if wanted.scale is not None and found.scale is not None:
        assert torch.equal(bits(found.scale), bits(wanted.scale))


def bits_mask(mask: Tensor, pages: Pages) -> Tensor:
    """The bytes of the elements in a mask."""
    return mask.repeat_interleave(pages.data.element_size(), dim=-1)


def lengths_that_complete(problem: Problem) -> list[int]:
    """Lengths that complete rows, that completed one before and that complete none; the first row and a full cache."""
    length, stride = problem.nsa.compress_block_size, problem.nsa.compress_stride
    size = problem.page_size
    near = [length - 1, length, length + 1, length + stride, size, size + stride - 1, size + stride, size + stride + 1]
    return [*near, 0, 1, problem.seq_k, problem.seq_k + 1, 2 * size + problem.seq_q // 2, problem.seq_k + stride]


@pytest.mark.parametrize(
    ("num_new", "page_size", "ratio"),
    [(1, 16, 1), (1, 16, 2), (1, 16, 4), (8, 16, 1), (8, 16, 4), (3, 64, 2), (8, 256, 2)],
)
@pytest.mark.parametrize(("cache", "dtype"), KINDS)
def test_tokens_are_written_and_the_rows_they_complete_are_means(
    cache: str, dtype: str, num_new: int, page_size: int, ratio: int
) -> None:
    nsa = CONFIGS[ratio]
    problem = BASE.replace(
        seq_q=num_new, page_size=page_size, seq_k=3 * page_size, dtype=dtype, cache_dtype=cache, nsa=nsa
    )
    table, lengths, raw, news = history(problem, lengths_that_complete(problem))
    cells, wanted, before, tokens = {}, {}, {}, {}
    for name, pages in raw.items():
        cells[name] = cells_before(problem, pages, table, lengths, None)
        tokens[name], wanted[name], before[name] = copied(pages), copied(cells[name]), copied(cells[name])
        write_tokens(tokens[name], table, lengths, news[name])
        write_compressed(tokens[name], wanted[name], table, lengths, num_new, nsa, None)
    with watched(module_of("cmp_pool_append_fwd", problem)) as (watcher, launch):
        arguments = {**given("k", raw["k"]), **given("v", raw["v"])}
        arguments |= {**given("k_cmp", cells["k"]), **given("v_cmp", cells["v"])}
        launch(k_new=news["k"], v_new=news["v"], table=table, lengths=lengths, **arguments)
        assert watcher.checked > 0
    for name in raw:
        same(raw[name], tokens[name])
        assert not torch.equal(bits(wanted[name].data), bits(before[name].data))
        check_cells(cells[name], wanted[name], before[name], torch.finfo(getattr(torch, dtype)).eps / 16)


@pytest.mark.parametrize(
    ("num_new", "page_size", "splits", "ratio"),
    [(1, 16, 8, 1), (1, 16, 2, 4), (3, 16, 1, 2), (8, 16, 4, 4), (8, 16, 1, 1), (8, 64, 32, 2)],
)
@pytest.mark.parametrize(("cache", "dtype"), KINDS)
def test_completed_rows_are_phi_of_their_tokens(
    cache: str, dtype: str, num_new: int, page_size: int, splits: int, ratio: int
) -> None:
    nsa, kind = CONFIGS[ratio], getattr(torch, dtype)
    problem = BASE.replace(
        seq_q=num_new, page_size=page_size, seq_k=3 * page_size, dtype=dtype, cache_dtype=cache, nsa=nsa
    )
    table, lengths, raw, news = history(problem, lengths_that_complete(problem))
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Tensor] = {}
    cells, wanted, before = {}, {}, {}
    for name, pages in raw.items():
        dim, fan_in = pages.data.shape[-1], nsa.compress_block_size * pages.data.shape[-1]
        write_tokens(pages, table, lengths, news[name])
        w1 = (torch.randn(fan_in, HIDDEN, generator=generator) * fan_in**-0.5).to(kind)
        w2 = (torch.randn(HIDDEN, dim, generator=generator) * HIDDEN**-0.5).to(kind)
        b1, b2 = (torch.randn(size, generator=generator) * 0.1 for size in (HIDDEN, dim))
        position = torch.zeros(nsa.compress_block_size, dim, dtype=torch.float64)
        phi = PhiWeights(position, w1.double(), b1.double(), w2.double(), b2.double())
        cells[name] = cells_before(problem, pages, table, lengths, phi)
        wanted[name], before[name] = copied(cells[name]), copied(cells[name])
        write_compressed(pages, wanted[name], table, lengths, num_new, nsa, phi)
        arguments |= {**given(name, pages), **given(f"{name}_cmp", cells[name])}
        arguments |= {f"{name}_w1": w1, f"{name}_b1": b1, f"{name}_w2": w2, f"{name}_b2": b2}
    with watched(module_of("cmp_mlp_append_fwd", problem, num_splits=splits)) as (watcher, launch):
        launch(table=table, lengths=lengths, num_new=num_new, **arguments)
        assert watcher.checked > 0
    for name in raw:
        assert not torch.equal(bits(wanted[name].data), bits(before[name].data))
        check_cells(cells[name], wanted[name], before[name], 4 * torch.finfo(kind).eps)
