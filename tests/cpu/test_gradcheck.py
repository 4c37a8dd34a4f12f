"""nsa_attention against finite differences in float64: mean and learned phi, packed, own keys, d_qk != d_v."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.reference import PhiWeights

CONFIG = NSAConfig(4, 2, 4, num_selected=3, num_initial=1, num_local=1, window_size=3)
HQ, H, D_QK, D_V, HIDDEN = 2, 1, 2, 3, 2
EPS = 1e-6  # of the finite differences
PHI = ("position", "w1", "b1", "w2", "b2")


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def leaves(tokens: int, lead: tuple[int, ...] = (1,), own: bool = False) -> dict[str, Tensor]:
    """Arguments of nsa_attention by name; `own`: keys and values of each branch."""
    found = {"q": leaf(*lead, tokens, HQ, D_QK), "gates": leaf(*lead, tokens, HQ, 3)}
    for branch in ("", "_slc", "_win") if own else ("",):
        found |= {f"k{branch}": leaf(*lead, tokens, H, D_QK), f"v{branch}": leaf(*lead, tokens, H, D_V)}
    return found


def check(
    given: dict[str, Tensor],
    phi: dict[str, Tensor] | None = None,
    spoil: dict[str, Callable[[Tensor], Tensor]] | None = None,
    **how: Any,
) -> None:
    """Assert that the gradients of all `given` tensors, and of phi's, are the finite differences."""
    names, weights = list(given), phi or {}

    def run(*tensors: Tensor) -> Tensor:
        found, learned = dict(zip(names, tensors, strict=False)), tensors[len(names) :]
        found |= {name: change(found[name]) for name, change in (spoil or {}).items()}
        phis = {}
        for name, start in (("phi_k", 0), ("phi_v", len(PHI))) if learned else ():
            phis[name] = PhiWeights(*learned[start : start + len(PHI)])
        out: Tensor = ops.nsa_attention(**found, **phis, config=CONFIG, **how)  # type: ignore[arg-type]
        return out

    assert torch.autograd.gradcheck(run, (*given.values(), *weights.values()), eps=EPS, atol=1e-7, rtol=1e-5)


def all_visible(tokens: int) -> bool:
    """Every block is selected, so that no finite step can change the selection."""
    return CONFIG.num_select_blocks(tokens) <= CONFIG.num_selected


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_mean_compression(own: bool) -> None:
    assert all_visible(7)
    check(leaves(7, own=own))


def test_learned_compression() -> None:
    size = CONFIG.compress_block_size
    phi = {}
    for name, width in (("k", D_QK), ("v", D_V)):
        shapes = [(size, width), (size * width, HIDDEN), (HIDDEN,), (HIDDEN, width), (width,)]
        phi |= {f"{name} {part}": leaf(*shape) for part, shape in zip(PHI, shapes, strict=True)}
    assert all_visible(7)
    check(leaves(7), phi)


def test_packed_sequences() -> None:
    """One too short for a compressed block, an empty one, one of a single token."""
    cu = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32)
    assert all_visible(6)
    check(leaves(10, lead=()), cu_seqlens=cu)


def test_fewer_queries_than_keys() -> None:
    given = leaves(7)
    given["q"], given["gates"] = leaf(1, 2, HQ, D_QK), leaf(1, 2, HQ, 3)
    check(given)


def smallest_gap(given: dict[str, Tensor]) -> float:
    """Least difference, over the tokens that choose, between the worst block taken freely and the best left out."""
    q, k, v = (given[name].detach() for name in ("q", "k", "v"))
    k_cmp, how = ops.compress(k, CONFIG), {"seq_k": k.shape[1]}
    _, lse = ops.compressed_attention(q, k_cmp, ops.compress(v, CONFIG), CONFIG, **how)
    scores = reference.importance(q, k_cmp, lse, CONFIG, **how)  # [1, T, H, NB]
    own = torch.arange(k.shape[1]).div(CONFIG.select_block_size, rounding_mode="floor")[:, None, None]
    index = torch.arange(scores.shape[-1])
    free = (index >= CONFIG.num_initial) & (index <= own - CONFIG.num_local)
    ranked = scores.masked_fill(~free, -torch.inf).sort(dim=-1, descending=True).values
    slots = CONFIG.num_selected - CONFIG.num_initial - CONFIG.num_local
    gaps = ranked[..., slots - 1] - ranked[..., slots]
    choosing = gaps[ranked[..., slots] > -torch.inf]
    assert choosing.numel() > 0
    return float(choosing.min())


def test_a_selection_that_leaves_blocks_out() -> None:
    given = next(made for made in iter(partial(leaves, 17), None) if smallest_gap(made) > 1000 * EPS)
    assert not all_visible(17)
    check(given)


@pytest.mark.parametrize("name", ["q", "k", "v", "gates"])
def test_a_gradient_a_thousandth_off_is_found(name: str) -> None:
    """The tolerances above can fail."""

    def slightly_off(x: Tensor) -> Tensor:
        return x.detach() + 0.999 * (x - x.detach())

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check(leaves(5), spoil={name: slightly_off})
