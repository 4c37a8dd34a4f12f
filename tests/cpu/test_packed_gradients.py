"""Packed sequences do not see one another's gradients, and rows that see no block have none: exactly, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equations import gradients
from torch import Tensor

from nsa_autotune import ops
from nsa_autotune.config import NSAConfig
from nsa_autotune.reference import PhiWeights

CONFIG = NSAConfig(8, 4, 16, num_selected=3, num_initial=1, num_local=1, window_size=10)
HQ, H, D_QK, D_V, HIDDEN = 4, 2, 6, 5, 7
LENGTHS = (0, 70, 1, 20, 65, 5)  # keys; the long ones leave blocks out
QUERIES = (0, 70, 1, 20, 9, 2)
Tensors = dict[str, Tensor]


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def arguments(lead_q: tuple[int, ...], lead_k: tuple[int, ...]) -> Tensors:
    """Of nsa_attention, keys and values of every branch."""
    found = {"q": normal(*lead_q, HQ, D_QK), "gates": normal(*lead_q, HQ, 3).sigmoid()}
    for branch in ("", "_slc", "_win"):
        found |= {f"k{branch}": normal(*lead_k, H, D_QK), f"v{branch}": normal(*lead_k, H, D_V)}
    return found


def make_phi(width: int) -> PhiWeights:
    fan_in = CONFIG.compress_block_size * width
    shapes = [(CONFIG.compress_block_size, width), (fan_in, HIDDEN), (HIDDEN,), (HIDDEN, width), (width,)]
    return PhiWeights(*(normal(*shape) / shape[0] ** 0.5 for shape in shapes))


@pytest.mark.parametrize("queries", [LENGTHS, QUERIES], ids=["all", "short_q"])
@pytest.mark.parametrize("learned", [False, True], ids=["mean", "mlp"])
def test_a_change_in_one_sequence_reaches_no_other(learned: bool, queries: tuple[int, ...]) -> None:
    cu_q, cu_k = offsets(queries), offsets(LENGTHS)
    given = arguments((sum(queries),), (sum(LENGTHS),))
    how: dict[str, Any] = {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k}
    how |= {"phi_k": make_phi(D_QK), "phi_v": make_phi(D_V)} if learned else {}
    do = normal(sum(queries), HQ, D_V)
    before = gradients(given, do, config=CONFIG, **how)
    for sequence in (1, 3, 4):
        changed = {name: x.clone() for name, x in given.items()}
        changed["do"] = do.clone()
        inside = {
            name: slice(*(cu_q if name in ("q", "gates", "do") else cu_k)[sequence : sequence + 2].tolist())
            for name in changed
        }
        for name, x in changed.items():
            x[inside[name]] = torch.rand_like(x[inside[name]])
        new_do = changed.pop("do")
        after = gradients(changed, new_do, config=CONFIG, **how)
        for name, old in before.items():
            rows = torch.ones(len(old), dtype=torch.bool)
            rows[inside[name]] = False
            assert torch.equal(after[name][rows], old[rows]), (name, sequence)
            assert not torch.equal(after[name][~rows], old[~rows]), (name, sequence)


@pytest.mark.parametrize("learned", [False, True], ids=["mean", "mlp"])
def test_a_packed_sequence_has_the_gradients_of_a_batch(learned: bool) -> None:
    given, cu = arguments((sum(LENGTHS),), (sum(LENGTHS),)), offsets(LENGTHS)
    how: dict[str, Any] = {"phi_k": make_phi(D_QK), "phi_v": make_phi(D_V)} if learned else {}
    do = normal(sum(LENGTHS), HQ, D_V)
    whole = gradients(given, do, config=CONFIG, cu_seqlens=cu, **how)
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if stop > start:
            batch = {name: x[None, start:stop] for name, x in given.items()}
            alone = gradients(batch, do[None, start:stop], config=CONFIG, **how)
            for name, want in alone.items():
                torch.testing.assert_close(whole[name][start:stop], want[0], rtol=1e-10, atol=1e-12)


BLIND = CONFIG.compress_block_size - 1  # tokens before the first whole block


def only_compressed(lead: tuple[int, ...]) -> Tensors:
    """The other branches are gated off."""
    given = arguments(lead, lead)
    given["gates"] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(*lead, HQ, 3).clone()
    return given


def test_rows_that_see_no_block_have_no_gradient() -> None:
    found = gradients(only_compressed((2, 30)), normal(2, 30, HQ, D_V), config=CONFIG)
    assert all(x.isfinite().all() for x in found.values())
    assert not found["q"][:, :BLIND].any() and not found["gates"][:, :BLIND, :, 0].any()
    assert found["q"][:, BLIND + CONFIG.compress_stride :].any(-1).all() and found["v"].any()
    assert not any(found[f"{name}_{branch}"].any() for name in "kv" for branch in ("slc", "win"))


def test_sequences_too_short_for_a_block_have_no_gradient() -> None:
    lengths = (5, 30, 7, 1)
    cu = offsets(lengths)
    found = gradients(only_compressed((sum(lengths),)), normal(sum(lengths), HQ, D_V), config=CONFIG, cu_seqlens=cu)
    seen = slice(int(cu[1]), int(cu[2]))
    for name in ("q", "k", "v"):
        assert found[name].isfinite().all() and found[name][seen].any()
        found[name][seen] = 0.0
        assert not found[name].any()


def test_the_branch_alone_has_none_either() -> None:
    q, k_cmp, v_cmp = normal(1, 12, HQ, D_QK), normal(1, 2, H, D_QK), normal(1, 2, H, D_V)
    leaves = [x.requires_grad_() for x in (q, k_cmp, v_cmp)]
    o, lse = ops.compressed_attention(*leaves, CONFIG, seq_k=12)
    found = torch.autograd.grad([o, lse], leaves, [normal(*o.shape), normal(*lse.shape)])
    assert (lse[:, :BLIND] == -torch.inf).all() and all(x.isfinite().all() for x in found)
    assert not found[0][:, :BLIND].any() and found[0][:, BLIND:].any(-1).all()
