"""Inputs of trials: shapes, a valid causal selection of the wanted locality, the true lse, poison and guards."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from cpu.bench_fakes import NSA, PACKED, POOL, SELECT, SMALL, make_spec

from nsa_autotune import reference
from nsa_autotune.bench.fills import causal_lse, select_at_random
from nsa_autotune.bench.inputs import (
    GUARD_BYTES,
    make_inputs,
    make_layout,
    packed_offsets,
    query_positions,
    storage_bytes,
)
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidInput
from nsa_autotune.spec import Argument, Problem

CPU = torch.device("cpu")
ALL_SHAPES = make_spec(
    "fake_shapes",
    lambda *_: {},
    Argument("q", ("Q", "HQ", "D_QK")),
    Argument("w1", ("L_DQK", "HIDDEN"), fill="weight"),
    Argument("b1", ("HIDDEN",), "float32", fill="bias"),
    Argument("gates", ("Q", "HQ", 3), fill="gates"),
    Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks"),
    Argument("k_cmp", ("C", "H", "D_QK")),
    Argument("lse", ("Q", "HQ"), "float32", fill="lse"),
    Argument("o", ("Q", "H", "G", "D_V"), fill="out"),
    Argument("index", ("Q", "H"), "int32", fill="out"),
    *(Argument(name, (), "int32", fill=name) for name in ("q_pos", "k_start", "cmp_start", "cmp_source")),
)


def select(positions: torch.Tensor, config: NSAConfig, locality: float, heads: int = 2, batch: int = 1) -> torch.Tensor:
    """A random selection with seed 0."""
    return select_at_random(positions, batch, heads, config, locality, torch.Generator().manual_seed(0))


def test_shapes_and_dtypes_of_a_batched_problem() -> None:
    inputs = make_inputs(ALL_SHAPES, SMALL, CPU)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.tensors.items() if tensor is not None}
    assert shapes == {
        "q": (2, 63, 4, 16),
        "w1": (64, 128),
        "b1": (128,),
        "gates": (2, 63, 4, 3),
        "blocks": (2, 63, 2, 5),
        "k_cmp": (2, 30, 2, 16),
        "lse": (2, 63, 4),
        "o": (2, 63, 2, 2, 8),
        "index": (2, 63, 2),
    }
    assert [name for name, tensor in inputs.tensors.items() if tensor is None] == list(inputs.tensors)[-4:]
    assert inputs.tensors["q"].dtype == torch.float16
    assert inputs.tensors["b1"].dtype == torch.float32
    assert inputs.scale == 0.25


def test_packed_problem_brings_its_layout() -> None:
    inputs = make_inputs(ALL_SHAPES, PACKED, CPU)
    layout = inputs.layout
    assert inputs.tensors["q"].shape == (90, 4, 16)
    assert inputs.tensors["k_cmp"].shape[0] == layout.num_cmp_rows
    for name in ("q_pos", "k_start", "cmp_start", "cmp_source"):
        assert torch.equal(inputs.tensors[name], getattr(layout, name))
    unused = inputs.tensors["k_cmp"][layout.cmp_source < 0]
    assert len(unused) > 0 and (unused == 0).all()
    assert (inputs.tensors["k_cmp"][layout.cmp_source >= 0] != 0).any(-1).all()


@pytest.mark.parametrize(("batch", "total"), [(1, 5), (2, 64), (3, 100), (7, 1000)])
def test_packed_lengths_are_uneven_and_complete(batch: int, total: int) -> None:
    problem = SMALL.replace(batch=batch, seq_q=total // 2, seq_k=total, layout="packed")
    offsets_q, offsets_k = packed_offsets(problem, seed=3)
    lengths_q = [b - a for a, b in itertools.pairwise(offsets_q)]
    lengths_k = [b - a for a, b in itertools.pairwise(offsets_k)]
    assert (len(lengths_k), sum(lengths_k), sum(lengths_q)) == (batch, total, total // 2)
    assert all(0 <= q <= k for q, k in zip(lengths_q, lengths_k, strict=True))
    if batch >= 3:
        assert {0, 1} < set(lengths_k)
        assert packed_offsets(problem, seed=4) != (offsets_q, offsets_k)
    assert packed_offsets(problem, seed=3) == (offsets_q, offsets_k)


def test_equal_seeds_give_equal_inputs() -> None:
    first, again, other = (make_inputs(ALL_SHAPES, SMALL, CPU, seed=s).tensors for s in (1, 1, 2))
    for name in ("q", "w1", "b1", "gates", "blocks", "k_cmp", "lse"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["q"][..., 0], first["k_cmp"][:, :1, :1, 0].expand(2, 63, 4))


def test_spread_of_random_fills() -> None:
    tensors = make_inputs(ALL_SHAPES, SMALL.replace(seq_q=500, seq_k=500), CPU).tensors
    assert tensors["q"].float().std().item() == pytest.approx(1.0, abs=0.02)
    assert tensors["w1"].float().std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert tensors["b1"].abs().max() < 0.5
    assert tensors["gates"].min() > 0 and tensors["gates"].max() < 1 and tensors["gates"].float().std() > 0.1


def test_outputs_and_guards_are_poisoned() -> None:
    tensors = make_inputs(ALL_SHAPES, SMALL, CPU).tensors
    assert tensors["o"].isnan().all()
    assert (tensors["index"] == -7777).all()
    before, after = storage_bytes(tensors["q"])[:GUARD_BYTES], storage_bytes(tensors["q"])[-GUARD_BYTES:]
    assert before.view(torch.float16).isnan().all() and after.view(torch.float16).isnan().all()
    assert tensors["q"].is_contiguous() and tensors["q"].isfinite().all()


@pytest.mark.parametrize("seq_k", [1, 3])
def test_no_compressed_block_gives_no_rows(seq_k: int) -> None:
    tensors = make_inputs(ALL_SHAPES, SMALL.replace(seq_q=1, seq_k=seq_k), CPU).tensors
    assert tensors["k_cmp"].shape == (2, 0, 2, 16)
    assert (tensors["lse"] == -math.inf).all()


@pytest.mark.parametrize("locality", [0.0, 0.9])
@pytest.mark.parametrize(
    "config",
    [NSA, NSAConfig(), NSAConfig(32, 16, 64, 3, 1, 2, 64), NSAConfig(32, 16, 64, 7, 0, 1, 64)],
    ids=["small", "default", "all_forced", "no_initial"],
)
@pytest.mark.parametrize("span", [(0, 1), (0, 700), (1000, 2500)], ids=["one", "start", "late"])
def test_selection_is_valid(config: NSAConfig, locality: float, span: tuple[int, int]) -> None:
    positions = torch.arange(*span)
    blocks = select(positions, config, locality)
    for t, position in enumerate(positions.tolist()):
        own = position // config.select_block_size
        forced = {j for j in range(config.num_initial) if j <= own}
        forced |= {j for j in range(own - config.num_local + 1, own + 1) if j >= 0}
        for row in blocks[0, t].tolist():
            count = min(config.num_selected, own + 1)
            chosen = row[:count]
            assert chosen == sorted(set(chosen)) and row[count:] == [-1] * (config.num_selected - count)
            assert forced <= set(chosen) and chosen[0] >= 0 and chosen[-1] == own


def test_selection_restarts_in_every_packed_sequence() -> None:
    layout = make_layout(PACKED.replace(seq_q=600, seq_k=600), CPU, seed=0)
    blocks = select(layout.q_pos, NSA, locality=0.99)
    own = layout.q_pos // NSA.select_block_size
    assert (blocks.amax(-1)[0] == own[:, None]).all()
    assert ((blocks >= 0).sum(-1)[0] == (own + 1).clamp(max=5)[:, None]).all()


@pytest.mark.parametrize("locality", [0.0, 0.5, 0.8])
def test_locality_is_the_share_of_kept_free_blocks(locality: float) -> None:
    config = NSAConfig()
    blocks = select(torch.arange(28_000, 30_000), config, locality).long()  # about 450 blocks to choose from
    own = (torch.arange(28_000, 30_000) // 64)[:, None, None]
    free = (blocks >= 1) & (blocks <= own - 2)
    kept = (blocks[0, 1:, :, :, None] == blocks[0, :-1, :, None, :]).any(-1)
    share = kept[free[0, 1:]].float().mean().item()
    chance = (1 - locality) * 13 / 450  # a newly drawn block may be an old one
    assert share == pytest.approx(locality + chance, abs=0.015)


def test_free_blocks_are_spread_evenly() -> None:
    blocks = select(torch.full((4000,), 41 * 64), NSAConfig(), locality=0.0)  # 3 blocks for each of 13 slots
    counts = torch.bincount(blocks.flatten(), minlength=42)[1:40].float()
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.25 * counts.mean()


def test_a_long_selection_is_quick() -> None:
    started = time.perf_counter()
    assert select(torch.arange(65_536), NSAConfig(), 0.8, heads=4).shape == (1, 65_536, 4, 16)
    assert time.perf_counter() - started < 10  # on two busy cores; well below a second on a GPU


@pytest.mark.parametrize("problem", [SMALL, SMALL.replace(seq_q=5), PACKED], ids=["batched", "short_q", "packed"])
def test_lse_is_that_of_compressed_attention(problem: Problem) -> None:
    inputs = make_inputs(SELECT, problem, CPU)
    q, k = inputs.tensors["q"].float(), inputs.tensors["k"].float()
    _, lse = reference.compressed_attention(q, k, k, NSA, seq_k=problem.seq_k, layout=inputs.layout)
    torch.testing.assert_close(inputs.tensors["lse"], lse, rtol=1e-5, atol=1e-5)
    assert lse.isinf().any() and lse.isfinite().any() if problem.seq_q > 5 else lse.isfinite().all()


def test_lse_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 63, 4, 16), torch.randn(2, 30, 2, 16)
    positions = query_positions(SMALL, None, CPU)
    at_once = causal_lse(q, k, positions, NSA, 0.25)
    monkeypatch.setattr("nsa_autotune.bench.fills.SCORE_ELEMENTS", 5 * 2 * 4 * 30)
    torch.testing.assert_close(causal_lse(q, k, positions, NSA, 0.25), at_once)


@pytest.mark.parametrize(
    "argument",
    [Argument("x", ("Z",)), Argument("x", ("Q",), "float99"), Argument("x", ("Q",), fill="magic")],
    ids=["symbol", "dtype", "fill"],
)
def test_an_unknown_word_is_named(argument: Argument) -> None:
    with pytest.raises(InvalidInput, match="must be"):
        make_inputs(make_spec("bad", lambda *_: {}, argument), SMALL, CPU)


def test_lse_without_keys_is_told() -> None:
    spec = make_spec("bad", lambda *_: {}, Argument("lse", ("Q", "HQ"), "float32", fill="lse"))
    with pytest.raises(InvalidInput, match="bad"):
        make_inputs(spec, SMALL, CPU)


def test_pool_of_a_packed_problem_has_only_its_index() -> None:
    assert set(make_inputs(POOL, PACKED, CPU).tensors) == {"x", "out", "cmp_source"}
