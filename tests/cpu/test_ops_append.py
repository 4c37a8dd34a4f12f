"""The operator that appends a step's tokens: its kernels (interpreted) against its equations, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu.cache_fakes import int32, raw_and_compressed, shuffled_table
from equations import take_the_kernels_way
from torch import Tensor

from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import InvalidInput
from nsa_autotune.ops.append import append
from nsa_autotune.ops.phi import fold
from nsa_autotune.paged import FP8, CachePools, read_compressed, read_tokens
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import KernelSpec, Problem

CONFIG = NSAConfig(8, 4, 16, 4, 1, 2, 20)
HEADS, D_QK, D_V, PAGE, EACH = 2, 32, 16, 16, 3


class Interpreted(Dispatcher):
    """Launches default configs in the interpreter."""

    def __init__(self) -> None:
        super().__init__(None, fingerprint=for_target("cuda:90"))
        self.families: list[str] = []
        self.modules: dict[Any, Any] = {}

    def launch(
        self, spec: KernelSpec, shape: Any, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        self.families.append(spec.family)
        if shape not in self.modules:
            asked = problem()
            self.modules[shape] = load(render(spec, asked, spec.default_config(asked)))
        self.modules[shape].launch(**tensors)


def empty_pools(batch: int, dtype: torch.dtype, *, share: bool = True) -> CachePools:
    """Pools of NaN."""
    made = {}
    for name, dim in (("k", D_QK), ("v", D_V)):
        raw, cells = raw_and_compressed(batch * EACH, PAGE, HEADS, dim, CONFIG, dtype)
        made |= {f"{name}_raw": raw, f"{name}_cmp": cells}
        for branch in ("slc", "win"):
            own = raw_and_compressed(batch * EACH, PAGE, HEADS, dim, CONFIG, dtype)[0]
            made[f"{name}_{branch}"] = raw if share else own
    return CachePools(**made)


def phi_of(dim: int, seed: int, hidden: int = 16) -> PhiWeights:
    """Random weights, position encoding and biases included."""
    generator, length = torch.Generator().manual_seed(seed), CONFIG.compress_block_size
    sizes = {
        "position": (length, dim),
        "w1": (length * dim, hidden),
        "b1": (hidden,),
        "w2": (hidden, dim),
        "b2": (dim,),
    }
    return PhiWeights(**{name: torch.randn(size, generator=generator) * 0.2 for name, size in sizes.items()})


def same_values(found: CachePools, wanted: CachePools, table: Tensor, lengths: list[int], tolerance: float) -> None:
    """All tokens and all compressed rows of every sequence."""
    for side in ("k", "v"):
        for index, length in enumerate(lengths):
            if not length:
                continue
            for branch in ("raw", "slc", "win"):
                a, b = (
                    read_tokens(getattr(x, f"{side}_{branch}"), table[index], length, torch.float32)
                    for x in (found, wanted)
                )
                assert torch.equal(a, b)
            a, b = (
                read_compressed(getattr(x, f"{side}_cmp"), table[index], length, CONFIG, torch.float32)
                for x in (found, wanted)
            )
            assert a.isfinite().all() and len(a) == CONFIG.num_compressed(length)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 4)


def grow(patch: pytest.MonkeyPatch, dtype: torch.dtype, steps: list[list[int]], share: bool, phi: bool) -> list[str]:
    """Append by kernels what every step adds to each sequence, and by the equations as well; the families launched."""
    num_new = max(max(step) for step in steps)
    batch = len(steps[0])
    table = shuffled_table(batch, EACH)
    by_kernels, by_equations = empty_pools(batch, dtype, share=share), empty_pools(batch, dtype, share=share)
    weights: dict[str, Any] = {"phi_k": phi_of(D_QK, 1), "phi_v": phi_of(D_V, 2)} if phi else {}
    folded = {name: fold(found) for name, found in weights.items()}
    dispatcher, generator = Interpreted(), torch.Generator().manual_seed(3)
    lengths = [0] * batch
    for number, step in enumerate(steps):
        lengths = [length + new for length, new in zip(lengths, step, strict=True)]
        branches = ("", "_slc", "_win") if not share else ("",)
        news = {}
        for name, dim in (("k", D_QK), ("v", D_V)):
            for branch in branches:
                size = (batch, num_new, HEADS, dim)
                news[f"{name}{branch}"] = torch.randn(size, generator=generator) * 2.0 ** (number % 3)
        append(pools=by_equations, block_table=table, lengths=int32(lengths), config=CONFIG, **news, **weights)
        with patch.context() as inside:
            take_the_kernels_way(inside)
            how: dict[str, Any] = {"config": CONFIG, "dispatcher": dispatcher}
            append(pools=by_kernels, block_table=table, lengths=int32(lengths), **how, **news, **folded)
    tolerance = 0.15 if dtype == FP8 else 8e-5  # float32 sums of phi, in an order of each CPU's own
    same_values(by_kernels, by_equations, table, lengths, tolerance)
    return dispatcher.families


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_steps_of_one_token_fill_the_shared_pools(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    families = grow(monkeypatch, dtype, [[1, 1]] * 20, share=True, phi=False)
    assert families == ["cmp_pool_append_fwd"] * 20


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_every_branch_gets_its_tokens_and_phi_makes_the_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    families = grow(monkeypatch, dtype, [[5, 5]] * 4, share=False, phi=True)
    assert families == [*["kv_append_fwd"] * 3, "cmp_mlp_append_fwd"] * 4


def test_many_tokens_at_once_are_written_by_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grow(monkeypatch, torch.float32, [[20, 20], [20, 20]], share=True, phi=True) == []


def test_folded_weights_are_the_weights() -> None:
    phi = phi_of(D_QK, 4)
    x = torch.randn(1, 8, HEADS, D_QK)
    table, made = int32([0, 1, 2])[None], []
    for weights in (phi, fold(phi)):
        pools = empty_pools(1, torch.float32)
        how: dict[str, Any] = {"config": CONFIG, "phi_k": weights, "phi_v": phi_of(D_V, 5)}
        append(x, x[..., :D_V], pools, table, int32([8]), **how)
        made.append(read_compressed(pools.k_cmp, table[0], 8, CONFIG))
    torch.testing.assert_close(made[0], made[1])


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    shared, apart = empty_pools(2, torch.float32), empty_pools(2, torch.float32, share=False)
    table, lengths = shuffled_table(2, EACH), int32([3, 9])
    k, v = torch.randn(2, 1, HEADS, D_QK), torch.randn(2, 1, HEADS, D_V)
    own = {"k_slc": k, "v_slc": v, "k_win": k, "v_win": v}
    phi_k, phi_v = phi_of(D_QK, 1), phi_of(D_V, 2)

    def step(
        k: Any = k,
        v: Any = v,
        pools: CachePools = shared,
        table: Tensor = table,
        lengths: Tensor = lengths,
        **more: Any,
    ) -> None:
        append(k, v, pools, table, lengths, config=CONFIG, **more)

    aliased = table.clone()
    aliased[1, 0] = table[0, 0]
    wrong: list[tuple[str, Callable[[], None]]] = [
        ("k must be a torch.Tensor", lambda: step(k=3)),
        ("v must be given", lambda: step(v=None)),
        ("k_slc must be given if", lambda: step(pools=apart)),
        ("k_win must be given if", lambda: step(k_win=k, v_win=v)),
        (r"k must be \[B, Q, H, D\]", lambda: step(k=k[0])),
        (r"v must be \[B, Q, H, D\]", lambda: step(v=k)),
        ("v must have the tokens, dtype and device of k", lambda: step(v=v.double())),
        (
            "v_win must have the tokens",
            lambda: step(pools=apart, **{**own, "v_win": v.repeat(1, 2, 1, 1)}),
        ),
        ("of torch.float16 or", lambda: step(k=k.half(), v=v.half())),
        ("phi_k and phi_v come together", lambda: step(phi_k=phi_k)),
        ("the weights of phi_v must fit", lambda: step(phi_k=phi_k, phi_v=phi_k)),
        ("phi_v.w2 must have the dtype of q", lambda: step(phi_k=phi_k, phi_v=replace(phi_v, w2=phi_v.w2.half()))),
        ("phi_k.b2 must be on the device", lambda: step(phi_k=replace(phi_k, b2=phi_k.b2.to("meta")), phi_v=phi_v)),
        (
            "phi_k.b2 must be contiguous and float32",
            lambda: step(phi_k=replace(fold(phi_k), b2=phi_k.b2.half()), phi_v=fold(phi_v)),
        ),
        (
            "phi_k.b1 must be contiguous and float32",
            lambda: step(phi_k=replace(fold(phi_k), b1=phi_k.b1.repeat_interleave(2)[::2]), phi_v=fold(phi_v)),
        ),
        (
            "phi_v.w1 must be contiguous",
            lambda: step(phi_k=fold(phi_k), phi_v=replace(fold(phi_v), w1=phi_v.w1.t().contiguous().t())),
        ),
        ("hidden layers of one width", lambda: step(phi_k=phi_k, phi_v=phi_of(D_V, 2, 32))),
        ("block_table must be int32", lambda: step(table=table.long())),
        ("lengths must be int32", lambda: step(lengths=lengths[:1])),
        ("between 0 and the capacity", lambda: step(lengths=int32([3, 1000]))),
        ("pages that exist", lambda: step(table=table + 100)),
        ("must belong to one sequence", lambda: step(table=aliased)),
    ]
    for text, call in wrong:
        with pytest.raises(InvalidInput, match=text):
            call()
    for pools in (shared, apart):
        for pages in pools.distinct():
            assert bool(pages.data.isnan().all())
    step(pools=apart, **own, phi_k=phi_k, phi_v=fold(phi_v))
    assert math.isfinite(float(apart.k_win.data[table[0, 0], 2].sum()))
