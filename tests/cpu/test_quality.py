"""What a sparse pattern keeps of dense attention, against loops in float64; and facts that hold whatever the values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cpu import brute_force
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_autotune import dense as dense_module
from nsa_autotune.bench.activations import Activations
from nsa_autotune.bench.quality import (
    Dense,
    Quality,
    dense_attention,
    measure_quality,
    selection_locality,
    spread_positions,
    visible_keys,
)
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidConfig

SMALL = NSAConfig(
    compress_block_size=4, compress_stride=2, select_block_size=8, num_selected=3, num_local=1, window_size=5
)


def random_activations(
    tokens: int, q_heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64
) -> Activations:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, h, dim, generator=generator) * 2 for h in (q_heads, kv_heads, kv_heads))
    return Activations(*(x.to(dtype) for x in (q, k, v)), origin={})


def quality_of(given: Activations, config: NSAConfig, group_size: int | None = None) -> Quality:
    return measure_quality(dense_attention(given, torch.arange(given.tokens)), config, group_size)


def by_loops(given: Activations, config: NSAConfig, pooled: int = 1) -> tuple[list[float], float, Tensor]:
    """Mass kept by each query and head, the output's error, and the blocks, token by token."""
    q, k, v = (x[0].double() for x in (given.q, given.k, given.v))
    few_k, few_v = (x.unflatten(1, (-1, pooled)).mean(2) for x in (k, v))
    gates, k_cmp = torch.zeros(*q.shape[:2], 3), brute_force.compress(few_k.tolist(), config)
    answer = brute_force.nsa(q, k_cmp, k_cmp, few_k, few_v, few_k, few_v, gates, config)
    masses, wrong, whole = [], 0.0, 0.0
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            few = head * few_k.shape[1] // q.shape[1]
            own = head * k.shape[1] // q.shape[1]
            chosen = answer.blocks[t][few]
            seen = [s for s in range(t + 1) if s // config.select_block_size in chosen or t - s < config.window_size]
            p = (k[: t + 1, own] @ q[t, head] / math.sqrt(q.shape[-1])).softmax(0)
            masses.append(sum(float(p[s]) for s in seen))
            exact = p @ v[: t + 1, own]
            sparse = (few_k[seen, few] @ q[t, head] / math.sqrt(q.shape[-1])).softmax(0) @ few_v[seen, few]
            wrong, whole = wrong + float(((sparse - exact) ** 2).sum()), whole + float((exact**2).sum())
    return masses, math.sqrt(wrong / whole), torch.tensor(answer.blocks)


@pytest.mark.parametrize("pooled", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 61])
def test_quality_is_that_of_loops(tokens: int, pooled: int) -> None:
    given = random_activations(tokens)
    masses, error, blocks = by_loops(given, SMALL, pooled)
    found = quality_of(given, SMALL, 2 * pooled)
    assert found.mass_kept == pytest.approx(sum(masses) / len(masses), rel=1e-12)
    assert found.mass_kept_p10 == pytest.approx(sorted(masses)[(len(masses) - 1) // 10], rel=1e-12)
    assert found.output_error == pytest.approx(error, rel=1e-9, abs=1e-12)
    if tokens == 61:
        assert found.mass_kept < 0.99 and found.output_error > 0.01
        assert found.locality == pytest.approx(loop_locality(blocks, SMALL), rel=1e-12)


def test_each_head_is_judged_by_the_blocks_of_its_own_group() -> None:
    given = random_activations(40, q_heads=8, kv_heads=4)
    masses, error, _ = by_loops(given, SMALL, pooled=2)
    found = quality_of(given, SMALL, 4)
    assert found.mass_kept == pytest.approx(sum(masses) / len(masses), rel=1e-12)
    assert found.output_error == pytest.approx(error, rel=1e-9)


def loop_locality(blocks: Tensor, config: NSAConfig) -> float:
    """Of the free blocks of each token and head, the share that the token before chose."""
    kept = []
    for t in range(1, blocks.shape[0]):
        own = t // config.select_block_size
        for before, after in zip(blocks[t - 1].tolist(), blocks[t].tolist(), strict=True):
            kept += [b in before for b in after if config.num_initial <= b <= own - config.num_local]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("change", [{"num_selected": 8}, {"window_size": 61}])
def test_a_pattern_that_sees_everything_loses_nothing(change: dict[str, int]) -> None:
    found = quality_of(random_activations(61), replace(SMALL, **change))
    assert found.mass_kept == pytest.approx(1.0, abs=1e-12) and found.mass_kept_p10 == pytest.approx(1.0, abs=1e-12)
    assert found.output_error < 1e-12


@pytest.mark.parametrize(("name", "values"), [("window_size", (1, 4, 16, 40)), ("num_selected", (2, 3, 5, 7))])
def test_more_visible_keys_keep_more_mass(name: str, values: tuple[int, ...]) -> None:
    dense = dense_attention(random_activations(61), torch.arange(61))
    masses = [measure_quality(dense, replace(SMALL, **{name: value})).mass_kept for value in values]
    assert masses == sorted(masses) and masses[0] < masses[-1] - 0.01


def test_a_needle_is_kept_by_selection_alone() -> None:
    """All mass lies on block 3, which nobody forces; its compressed keys stand out, so it is chosen."""
    given = random_activations(64)
    given.k[:] = 0.0
    given.k[:, 24:32] = given.q[:, -1:].mean(2, keepdim=True) * 50
    given.q[:] = given.q[:, -1:].mean(2, keepdim=True)
    last = dense_attention(given, torch.tensor([63]))
    assert measure_quality(last, SMALL).mass_kept > 0.999
    blind = replace(SMALL, num_selected=2)  # the forced ones
    assert measure_quality(last, blind).mass_kept < 0.001


def test_some_queries_are_judged_as_among_all() -> None:
    given = random_activations(61)
    masses, _, _ = by_loops(given, SMALL)
    where = torch.tensor([5, 6, 40, 60])
    found = measure_quality(dense_attention(given, where), SMALL)
    kept = [masses[4 * t + head] for t in where.tolist() for head in range(4)]
    assert found.mass_kept == pytest.approx(sum(kept) / len(kept), rel=1e-12)


def test_half_precision_is_summed_in_float32() -> None:
    given = random_activations(200, dtype=torch.bfloat16)
    wide = Activations(given.q.double(), given.k.double(), given.v.double(), origin={})
    half, exact = quality_of(given, SMALL), quality_of(wide, SMALL)
    assert half.mass_kept == pytest.approx(exact.mass_kept, abs=1e-4)
    assert half.output_error == pytest.approx(exact.output_error, abs=1e-3)


@pytest.mark.parametrize(("tokens", "count"), [(10, 10), (10, 99), (1, 2), (100, 10), (101, 12), (8192, 1024), (3, 2)])
def test_positions_are_spread_in_pairs(tokens: int, count: int) -> None:
    found = spread_positions(tokens, count).tolist()
    assert found == sorted(set(found)) and found[-1] == tokens - 1 and found[0] >= 0
    if count >= tokens:
        assert found == list(range(tokens))
        return
    assert len(found) == count and all(b == a + 1 for a, b in zip(found[::2], found[1::2], strict=True))
    gaps = [b - a for a, b in zip(found[::2], found[2::2], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_without_free_blocks_there_is_no_locality() -> None:
    assert quality_of(random_activations(61), replace(SMALL, num_selected=2)).locality is None
    given = random_activations(61)
    apart = dense_attention(given, torch.tensor([30, 40, 60]))
    assert measure_quality(apart, SMALL).locality is None, "no query follows another"
    assert selection_locality(torch.tensor([[[[0, 2, 6]], [[0, 2, 6]]]]), SMALL, with_positions(54, 55)) == 1.0
    assert selection_locality(torch.tensor([[[[0, 1, 6]], [[0, 2, 6]]]]), SMALL, with_positions(54, 55)) == 0.0


def with_positions(*positions: int) -> Dense:
    return dense_attention(random_activations(61), torch.tensor(positions))


def test_unused_slots_show_nothing() -> None:
    blocks = torch.tensor([[[[1, -1]]]])
    seen = visible_keys(blocks, SMALL, 32)(slice(0, 1), torch.tensor([[20]]), torch.arange(32))
    assert seen[0, 0, 0, 0].nonzero()[:, 0].tolist() == list(range(8, 21))  # block 1, and 16..20 by the window


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_group_size_that_the_activations_do_not_hold_is_refused(size: int) -> None:
    with pytest.raises(InvalidConfig, match="averaged, not invented"):
        quality_of(random_activations(8), SMALL, size)


class Largest(TorchDispatchMode):
    """Remembers the most bytes of a tensor that an operator returned."""

    most_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor):
                self.most_bytes = max(self.most_bytes, item.numel() * item.element_size())
        return out


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    given, config = random_activations(1024, dtype=torch.float32), NSAConfig(num_selected=4, window_size=64)
    with Largest() as whole:
        expected = quality_of(given, config)
    monkeypatch.setattr(dense_module, "CHUNK_BYTES", 256 << 10)
    with Largest() as chunked:
        found = quality_of(given, config)
    assert whole.most_bytes >= 1024 * 1024 * 4 * 4, "all scores at once"
    assert chunked.most_bytes <= 512 << 10
    assert found.mass_kept == pytest.approx(expected.mass_kept, abs=1e-6)
    assert found.output_error == pytest.approx(expected.output_error, abs=1e-6)
