"""Gradients through the operators as CUDA tensors take them; each launch is answered by its spec's own equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu.test_ops import CONFIG, D_QK, D_V, HQ, H, make_phi, make_tensors, offsets
from equations import Equations, reference_attention, take_the_kernels_way
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.errors import InvalidInput
from nsa_autotune.layout import packed_layout
from nsa_autotune.ops import backward, serve
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import KernelSpec

FORMS = ("batched", "short_q", "packed")
PATCH = pytest.MonkeyPatch


@pytest.fixture
def equations(monkeypatch: pytest.MonkeyPatch) -> Equations:
    """CPU tensors take the way of CUDA tensors and end here."""
    take_the_kernels_way(monkeypatch)
    return Equations()


def gradients(form: str, dispatcher: Equations | None, learned: bool = True) -> dict[str, Tensor]:
    """Gradients of everything that nsa_attention takes, through `dispatcher` or through the reference."""
    torch.manual_seed(0)
    tensors, cu = make_tensors(form)
    phi = {"phi_k": make_phi(D_QK, hidden=16), "phi_v": make_phi(D_V, hidden=16)} if learned else {}
    weights = {f"{name}.{field}": t for name, p in phi.items() for field, t in vars(p).items()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in {**tensors, **weights}.items()}
    given = {name: leaves[name] for name in tensors}
    phis = {n: PhiWeights(**{f: leaves[f"{n}.{f}"] for f in vars(p)}) for n, p in phi.items()}
    if dispatcher is not None:
        if cu:
            q, k = cu["cu_seqlens"], cu.get("cu_seqlens_k", cu["cu_seqlens"])
            dispatcher.layout = packed_layout(q, k, tensors["q"].shape[0], tensors["k"].shape[0], CONFIG)
        out = ops.nsa_attention(**given, config=CONFIG, dispatcher=dispatcher, **phis, **cu)
    else:
        out = reference_attention(**given, config=CONFIG, **phis, **cu)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("learned", [False, True], ids=["mean", "mlp"])
@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_is_the_references(form: str, learned: bool, equations: Equations) -> None:
    ours = gradients(form, equations, learned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "on_kernels", lambda x: False)
        wanted = gradients(form, None, learned)
    assert set(ours) == set(wanted)
    for name, want in wanted.items():
        torch.testing.assert_close(
            ours[name], want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_fused_window_and_sum_gives_the_same_gradients(form: str, equations: Equations, monkeypatch: PATCH) -> None:
    plain = gradients(form, equations)
    assert "win_sum_fwd" not in equations.families
    monkeypatch.setattr(Equations, "fuses", lambda *_: True)
    equations.families.clear()
    fused = gradients(form, equations)
    assert "win_sum_fwd" in equations.families and not {"win_attn_fwd", "gate_sum_fwd"} & set(equations.families)
    assert all(torch.equal(fused[name], want) for name, want in plain.items())


def test_a_training_step_launches_each_family_once(equations: Equations) -> None:
    gradients("batched", equations)
    back = equations.families[equations.families.index("gate_sum_bwd") :]
    assert back[:7] == [
        "gate_sum_bwd",
        *("win_attn_bwd_dq", "win_attn_bwd_dkv", "slc_attn_bwd_dq", "slc_attn_bwd_dkv"),
        *("cmp_attn_bwd_dq", "cmp_attn_bwd_dkv"),
    ]
    assert back[7:] == ["cmp_mlp_bwd"] * 2


def test_what_needs_no_gradient_is_not_computed(equations: Equations) -> None:
    tensors, _ = make_tensors()
    tensors["gates"].requires_grad_()
    ops.nsa_attention(**tensors, config=CONFIG, dispatcher=equations).sum().backward()
    assert equations.families[-1] == "gate_sum_bwd"
    tensors["q"].requires_grad_()
    ops.nsa_attention(**tensors, config=CONFIG, dispatcher=equations).sum().backward()
    assert equations.families[-3:] == ["win_attn_bwd_dq", "slc_attn_bwd_dq", "cmp_attn_bwd_dq"]


def qkv(tokens: int = 30) -> list[Tensor]:
    """Leaves."""
    torch.manual_seed(1)
    shapes = [(1, tokens, HQ, D_QK), (1, tokens, H, D_QK), (1, tokens, H, D_V)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("part", ["o", "lse", "both"])
def test_a_branch_alone_has_gradients_of_both_outputs(part: str, equations: Equations) -> None:
    def loss(o: Tensor, lse: Tensor) -> Tensor:
        parts = {"o": o.square().sum(), "lse": lse.cos().sum(), "both": o.square().sum() + lse.cos().sum()}
        return parts[part]

    tensors = qkv()
    loss(*ops.window_attention(*tensors, CONFIG, dispatcher=equations)).backward()
    wide = [t.detach().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(loss(*reference.window_attention(*wide, CONFIG)), wide, allow_unused=True)
    for t, want in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(t.grad, torch.zeros_like(t) if want is None else want)


def test_rows_that_see_nothing_get_gradients_of_zero(equations: Equations) -> None:
    q, k, v = torch.randn(1, 12, HQ, D_QK), torch.randn(1, 2, H, D_QK), torch.randn(1, 2, H, D_V)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o, lse = ops.compressed_attention(*leaves, CONFIG, seq_k=12, dispatcher=equations)
    assert (lse[:, :7] == -torch.inf).all()
    (o.sum() + lse[:, 7:].sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)
    assert q.grad is not None and not q.grad[:, :7].any() and q.grad[:, 8:].any()


def test_expanded_and_strided_gradients_of_the_output(equations: Equations) -> None:
    tensors, _ = make_tensors()
    leaf = tensors["q"].requires_grad_()
    ops.nsa_attention(**tensors, config=CONFIG, dispatcher=equations).sum().backward()  # an expanded gradient
    expanded = leaf.grad
    leaf.grad = None
    out = ops.nsa_attention(**tensors, config=CONFIG, dispatcher=equations)
    out.backward(torch.ones(out.transpose(1, 2).shape).transpose(1, 2))
    torch.testing.assert_close(expanded, leaf.grad)


def test_kernels_get_the_blocks_of_a_view_in_their_own_layout(equations: Equations, monkeypatch: PATCH) -> None:
    """Kernels count on contiguous blocks, forward and backward."""
    leaves, asked = qkv(), []
    blocks = torch.zeros(1, 30, CONFIG.num_selected, H, dtype=torch.int32).transpose(2, 3)
    assert not blocks.is_contiguous()
    real = equations.launch

    def launch(spec: KernelSpec, shape: Any, problem: Any, device: Any, tensors: dict[str, Any]) -> None:
        asked.append((spec.family, tensors["blocks"].is_contiguous()))
        real(spec, shape, problem, device, tensors)

    monkeypatch.setattr(equations, "launch", launch)
    ops.selected_attention(*leaves, blocks, CONFIG, dispatcher=equations)[0].sum().backward()
    assert asked == [(family, True) for family in ("slc_attn_fwd", "slc_attn_bwd_dq", "slc_attn_bwd_dkv")]


def test_a_second_derivative_is_refused_and_not_wrong(equations: Equations) -> None:
    tensors, _ = make_tensors()
    leaf = tensors["q"].requires_grad_()
    out = ops.nsa_attention(**tensors, config=CONFIG, dispatcher=equations)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(InvalidInput, match="no second derivative"):
        gradient.sum().backward()


def test_too_few_tokens_for_a_compressed_block(equations: Equations) -> None:
    tensors = [torch.randn(1, 5, HQ, D_QK), torch.randn(1, 5, H, D_QK), torch.randn(1, 5, H, D_V)]
    leaves = [t.requires_grad_() for t in tensors]
    ops.nsa_attention(*leaves, torch.ones(1, 5, HQ, 3), config=CONFIG, dispatcher=equations).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)
    assert not any(family.startswith("cmp") for family in equations.families)


def test_no_tokens_have_empty_gradients(equations: Equations) -> None:
    leaves = [torch.randn(0, heads, dim, requires_grad=True) for heads, dim in ((HQ, D_QK), (H, D_QK), (H, D_V))]
    cu = offsets(0)
    ops.nsa_attention(
        *leaves, torch.ones(0, HQ, 3), config=CONFIG, cu_seqlens=cu, dispatcher=equations
    ).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
    assert equations.families == []


def test_index_tensors_come_from_the_layout_by_name() -> None:
    spec = backward.kernels.get_spec("slc_attn_bwd_dkv")
    names = backward.index_tensors(spec, None)
    assert names and all(value is None for value in names.values())
