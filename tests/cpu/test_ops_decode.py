"""The operator of a decode step: its kernels (interpreted) against its equations, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from equations import take_the_kernels_way
from torch import Tensor

from nsa_autotune import paged, reference
from nsa_autotune.bench.paged import trial_table
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import InvalidInput
from nsa_autotune.ops import checks
from nsa_autotune.ops.decode import decode_attention, decode_counters, length_bound
from nsa_autotune.paged import CachePools, Pages
from nsa_autotune.spec import KernelSpec, Problem

CONFIG = NSAConfig(8, 4, 16, 4, 1, 2, 20)
LENGTHS = (150, 0, 2, 77)
PAGE = 16


class Interpreted(Dispatcher):
    """Launches default configs in the interpreter."""

    def __init__(self) -> None:
        super().__init__(None, fingerprint=for_target("cuda:90"))
        self.families: list[str] = []

    def launch(
        self, spec: KernelSpec, shape: Any, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        asked = problem()
        self.families.append(spec.family)
        load(render(spec, asked, spec.default_config(asked))).launch(**tensors)


def filled_pools(lengths: tuple[int, ...], heads: int, dtype: torch.dtype) -> tuple[CachePools, Tensor]:
    """Pools that hold random tokens and their means, NaN elsewhere, and the block table."""
    problem = Problem(
        batch=len(lengths),
        seq_q=1,
        seq_k=max(lengths),
        num_q_heads=heads,
        num_kv_heads=heads,
        layout="paged",
        page_size=PAGE,
    )
    each = -(-max(lengths) // PAGE)
    num_pages = len(lengths) * each + 2
    table = trial_table(problem, num_pages, each, 0)
    found = {}
    for name in ("k", "v"):
        tokens = torch.full((num_pages, PAGE, heads, 16), math.nan, dtype=dtype)
        cells = torch.full((num_pages, PAGE // CONFIG.compress_stride, heads, 16), math.nan, dtype=dtype)
        for index, length in enumerate(lengths):
            x = torch.randn(length, heads, 16, dtype=dtype)
            write(tokens, table[index], x, 0)
            write(cells, table[index], reference.compress_mean(x[None], CONFIG)[0], paged.first_cell(CONFIG))
        found[name] = Pages(tokens), Pages(cells)
    (k, k_cmp), (v, v_cmp) = found["k"], found["v"]
    return CachePools(k_cmp, v_cmp, k, v, k, v, k, v), table


def write(pages: Tensor, table_row: Tensor, x: Tensor, first: int) -> None:
    """Rows from `first` on."""
    for row, vector in enumerate(x, start=first):
        pages[table_row[row // pages.shape[1]], row % pages.shape[1]] = vector


@pytest.mark.parametrize("num_new", [1, 3])
def test_the_kernels_compute_the_equations(monkeypatch: pytest.MonkeyPatch, num_new: int) -> None:
    pools, table = filled_pools(LENGTHS, 2, torch.float32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    q, gates = torch.randn(4, num_new, 6, 16), torch.rand(4, num_new, 6, 3)
    counters = decode_counters(4, num_new, 2, "cpu")
    how: dict[str, Any] = {"config": CONFIG, "counters": counters}
    expected = decode_attention(q, gates, pools, table, lengths, **how)
    assert expected.isfinite().all() and (expected[1] == 0).all() and (expected[2, : num_new - 2] == 0).all()
    dispatcher = Interpreted()
    take_the_kernels_way(monkeypatch)
    for bound in (None, 150):
        found = decode_attention(q, gates, pools, table, lengths, max_length=bound, dispatcher=dispatcher, **how)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not counters.any(), "ready for the next step"
    assert dispatcher.families == ["cmp_decode_fwd", "slc_win_decode_fwd"] * 2


def test_a_sequence_beyond_the_bound_is_not_read_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device nobody looks at the lengths: the kernels must neither leave their tensors nor answer wrongly."""
    pools, table = filled_pools(LENGTHS, 2, torch.float32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    q, gates, counters = torch.randn(4, 1, 6, 16), torch.rand(4, 1, 6, 3), decode_counters(4, 1, 2, "cpu")
    how: dict[str, Any] = {"config": CONFIG, "counters": counters}
    expected = decode_attention(q, gates, pools, table, lengths, **how)
    take_the_kernels_way(monkeypatch)
    monkeypatch.setattr(checks, "values_are_known", lambda x: False)
    lengths[0] += 100_000
    found = decode_attention(q, gates, pools, table, lengths, dispatcher=Interpreted(), **how)
    assert found[0].isnan().all() and not counters.any()
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_a_step_is_the_last_rows_of_the_forward() -> None:
    pools, table = filled_pools((150,), 2, torch.float64)
    q, gates = torch.randn(1, 150, 6, 16, dtype=torch.float64), torch.rand(1, 150, 6, 3, dtype=torch.float64)
    k, v = (paged.read_tokens(x, table[0], 150)[None] for x in (pools.k_raw, pools.v_raw))
    k_cmp, v_cmp = reference.compress_mean(k, CONFIG), reference.compress_mean(v, CONFIG)
    whole = reference.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, CONFIG)
    for length in (1, 8, 63, 150):
        lengths, last = torch.tensor([length], dtype=torch.int32), slice(max(0, length - 2), length)
        how: dict[str, Any] = {"config": CONFIG, "counters": decode_counters(1, 2, 2, "cpu")}
        found = decode_attention(q[:, last], gates[:, last], pools, table, lengths, **how)
        torch.testing.assert_close(found, whole[:, last])


def changed(pools: CachePools, **data: Tensor) -> CachePools:
    """Pools with other tensors in some places."""
    return replace(pools, **{name: Pages(x) for name, x in data.items()})


def test_what_does_not_fit_is_refused() -> None:
    pools, table = filled_pools(LENGTHS, 2, torch.float32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    q, gates = torch.randn(4, 1, 6, 16), torch.rand(4, 1, 6, 3)

    def step(
        pools: CachePools = pools, table: Tensor = table, lengths: Tensor = lengths, bound: Any = None, **how: Any
    ) -> Tensor:
        how = {"config": CONFIG, "counters": decode_counters(4, 1, 2, "cpu"), **how}
        return decode_attention(q, gates, pools, table, lengths, max_length=bound, **how)

    def longer(num_new: int) -> Tensor:
        many, some, counters = *(x.expand(-1, num_new, -1, -1) for x in (q, gates)), decode_counters(4, 9, 2, "cpu")
        return decode_attention(many, some, pools, table, lengths, config=CONFIG, counters=counters)

    k = pools.k_slc.data
    aliased = table.clone()
    aliased[3, 4] = table[0, 9]  # the pages that the next tokens of both go to
    outside = table.clone()
    outside[0, 1] = len(k)
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("of torch.float32 or", lambda: step(changed(pools, k_slc=k.half()))),
        (r"must be \[P, 16, H, D\]", lambda: step(changed(pools, k_slc=k[:, :8]))),
        ("equally many pages", lambda: step(changed(pools, k_slc=k[:-1]))),
        ("contiguous and aligned", lambda: step(changed(pools, k_slc=k.transpose(2, 3)))),
        ("needs scales", lambda: step(changed(pools, k_slc=k.to(paged.FP8)))),
        ("block_table must be int32", lambda: step(table=table.long())),
        ("block_table must be int32", lambda: step(table=table[:3])),
        ("lengths must be int32", lambda: step(lengths=lengths.long())),
        ("between 0 and the capacity", lambda: step(lengths=lengths + 1000)),
        ("between 0 and the capacity", lambda: step(bound=149)),
        ("pages that exist", lambda: step(table=outside)),
        ("must belong to one sequence", lambda: step(table=aliased)),
        ("at least the number of new tokens", lambda: step(bound=0)),
        ("max_length must be an int; got max_length='x'", lambda: step(bound="x")),
        ("max_length must be an int", lambda: step(bound=150.0)),
        ("up to 8 tokens; got new tokens=9.*prefill_attention", lambda: longer(9)),
        ("counters must be a tensor; got counters='NoneType'", lambda: step(counters=None)),
        ("int32 with at least 8 elements.*elements=7", lambda: step(counters=decode_counters(7, 1, 1, "cpu"))),
        ("counters must be int32", lambda: step(counters=torch.zeros(8))),
        ("config must be an NSAConfig", lambda: step(config=None)),
    ]
    for text, call in wrong:
        with pytest.raises(InvalidInput, match=text):
            call()
    step()
    longer(8)


def test_bounds_of_a_length_are_few() -> None:
    assert [length_bound(n, 100_000) for n in (0, 1, 1024, 1025, 65_536, 65_537)] == [
        1024,
        1024,
        1024,
        2048,
        65_536,
        100_000,
    ]
