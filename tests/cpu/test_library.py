"""The custom operators under PyTorch: opcheck, compilation, checkpointing, autocast, second derivatives."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cpu.test_ops import CONFIG, D_QK, D_V, HQ, H, layout_of, make_phi, make_tensors
from equations import reference_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_autotune import NativeSparseAttention, ops
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.dispatcher import Dispatcher, by_number
from nsa_autotune.errors import InvalidInput, NSAError, StoreError
from nsa_autotune.ops import library, whole

HIDDEN = 24
FORMS = ("batched", "packed")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(form: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator by name."""
    tensors, cu = make_tensors(form)
    layout = layout_of(tensors, cu)
    index = [] if layout is None else layout.tensors()
    q, k, v, gates = (tensors[name] for name in ("q", "k", "v", "gates"))
    text, seq_k = CONFIG.to_text(), k.shape[-3]
    rest = (index, text, seq_k, 0.3, 0)
    k_cmp, v_cmp = (ops.compress(x, CONFIG, layout=layout) for x in (k, v))
    o, lse = library.attend("cmp", q, k_cmp, v_cmp, None, *rest)
    blocks = library.select_blocks(q, k_cmp, lse, *rest)
    phi = list(vars(make_phi(D_QK)).values())

    def leaves(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_() for t in given)

    return {
        "compress": (*leaves(k), [], index, text, 0),
        "compress, learned": (*leaves(k), list(leaves(*phi)), index, text, 0),
        "attend": ("cmp", *leaves(q, k_cmp, v_cmp), None, *rest),
        "attend, selected": ("slc", *leaves(q, k, v), blocks, *rest),
        "attend, window": ("win", *leaves(q, k, v), None, *rest),
        "select_blocks": (q, k_cmp, lse, *rest),
        "combine": (*leaves(gates, o, o, o), 0),
        "gated_attention": (*leaves(gates, q, k_cmp, v_cmp, k, v, k, v), False, *rest),
        "gated_attention, again": (*leaves(gates, q, k_cmp, v_cmp, k, v, k, v), True, *rest),
    }


OPERATORS = tuple(arguments("batched"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_passes(name: str, form: str) -> None:
    operator = getattr(whole if name.startswith("gated") else library, name.partition(",")[0])
    torch.library.opcheck(operator, arguments(form)[name], test_utils=CHECKS)


def module(**options: Any) -> NativeSparseAttention:
    """A small one with keys of each branch, and equal weights each time."""
    torch.manual_seed(0)
    return NativeSparseAttention(HIDDEN, HQ, H, D_QK, D_V, config=CONFIG, phi_hidden=16, **options)


def given(form: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """x and its offsets."""
    torch.manual_seed(1)
    if form == "batched":
        return torch.randn(2, 50, HIDDEN, dtype=dtype), None
    return torch.randn(61, HIDDEN, dtype=dtype), torch.tensor([0, 1, 1, 40, 61], dtype=torch.int32)


def gradients(layer: nn.Module, x: Tensor, *others: Any) -> list[Tensor]:
    """Output, and gradients of x and of every parameter."""
    leaf = x.detach().clone().requires_grad_()
    out = layer(leaf, *others)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = [leaf.grad, *(p.grad for p in layer.parameters())]
    assert all(g is not None and g.abs().max() > 0 for g in found)
    result = [out.detach(), *(g.clone() for g in found if g is not None)]
    layer.zero_grad(set_to_none=True)
    return result


def same(ours: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    """Every tensor is."""
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_a_module_compiles_without_graph_breaks(form: str) -> None:
    layer, (x, cu) = module(), given(form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, x, cu), gradients(layer, x, cu))


def test_a_compiled_module_takes_other_lengths() -> None:
    layer = module()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (50, 33, 7):
        x = torch.randn(1, tokens, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def test_a_compiled_call_keeps_its_dispatcher() -> None:
    layer = module(dispatcher=Dispatcher(None), strict=True)  # never asked on a CPU
    x, cu = given("batched")
    same(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, cu), gradients(layer, x, cu))


def test_a_dispatcher_that_is_gone_is_named() -> None:
    q, k_cmp, lse, *rest = arguments("batched")["select_blocks"]
    with pytest.raises(InvalidInput, match="Keep a reference"):
        library.select_blocks(q, k_cmp, lse, *rest[:-1], 2 * 10**9)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_no_bit(form: str) -> None:
    layer, (x, cu) = module(), given(form)

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, cu: Tensor | None) -> Tensor:
            out: Tensor = checkpoint(self.layer, x, cu, use_reentrant=False)
            return out

    same(gradients(Saved(), x, cu), gradients(layer, x, cu), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_computed_again_change_no_bit(form: str) -> None:
    x, cu = given(form)
    same(gradients(module(recompute=True), x, cu), gradients(module(), x, cu), rtol=0, atol=0)


def test_outputs_computed_again_are_not_saved() -> None:
    tensors, _ = make_tensors()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def saved(recompute: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            ops.nsa_attention(**leaves, config=CONFIG, recompute=recompute)
        return sum(sizes)

    batch, tokens = leaves["q"].shape[:2]
    assert saved(False) - saved(True) == 3 * batch * tokens * HQ * D_V


def test_autocast_trains_in_bfloat16() -> None:
    layer, (x, cu) = module(), given("batched")
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(layer, x, cu)
    assert rough[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in rough[1:])
    for got, want in zip(rough, gradients(layer, x, cu), strict=True):
        assert (got.float() - want).norm() < 0.05 * want.norm() + 0.01  # a key's bias moves no softmax: near 0


def test_operators_keep_their_dtype_under_autocast() -> None:
    tensors, _ = make_tensors()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def run() -> list[Tensor]:
        out = ops.nsa_attention(**leaves, config=CONFIG)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    same(inside, run(), rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    tensors, _ = make_tensors()
    leaf = tensors["q"].requires_grad_()
    out = ops.nsa_attention(**tensors, config=CONFIG)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(InvalidInput, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("name", ("q", "k", "v", "gates"))
def test_forward_mode_is_refused_where_pytorch_would_drop_the_tangent(name: str) -> None:
    tensors, _ = make_tensors()

    def attend(x: Tensor) -> Tensor:
        return ops.nsa_attention(**{**tensors, name: x}, config=CONFIG)

    with pytest.raises(InvalidInput, match=f"no forward-mode derivative; got tangent='{name}'"):
        torch.func.jvp(attend, (tensors[name],), (torch.ones_like(tensors[name]),))
    with torch.autograd.forward_ad.dual_level():  # a level alone is no tangent
        same([attend(tensors[name])], [attend(tensors[name])], rtol=0, atol=0)


def test_forward_mode_is_refused_by_the_gated_sum_alone() -> None:
    branches = [torch.rand(1, 5, 2, 4) for _ in range(3)]
    for at in range(3):
        with pytest.raises(InvalidInput, match="no forward-mode derivative"):
            torch.func.jvp(
                lambda x, at=at: ops.combine(torch.rand(1, 5, 2, 3), *branches[:at], x, *branches[at + 1 :]),
                (branches[at],),
                (torch.ones_like(branches[at]),),
            )


@pytest.mark.parametrize("form", ("batched", "short_q", "packed", "packed_short_q"))
def test_gradients_of_views_are_those_of_copies(form: str) -> None:
    tensors, cu = make_tensors(form, torch.float64)
    wide = {name: torch.cat([t, torch.full_like(t, torch.nan)], dim=-3) for name, t in tensors.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in wide.items()}
    views = {name: leaf.narrow(-3, 0, tensors[name].shape[-3]) for name, leaf in leaves.items()}
    ops.nsa_attention(**views, config=CONFIG, **cu).square().sum().backward()
    again = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    reference_attention(**again, config=CONFIG, **cu).square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and not leaf.grad.isnan().any()
        got = leaf.grad.narrow(-3, 0, tensors[name].shape[-3])
        torch.testing.assert_close(got, again[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_copied_module_shares_its_dispatcher() -> None:
    """deepcopy (of an EMA model, say) keeps a dispatcher that can be found."""
    first = module(dispatcher=Dispatcher(None))
    second = copy.deepcopy(first)
    assert second.dispatcher is first.dispatcher
    second(given("batched")[0]).sum().backward()


def test_a_saved_module_has_a_dispatcher_of_its_own() -> None:
    """Its number is one of the process that loads it, and what it launched before is no hindrance."""
    first = module(dispatcher=Dispatcher(None, locality=0.5))
    wanted = first(given("batched")[0])
    wanted.sum().backward()
    saved = io.BytesIO()
    torch.save(first, saved)
    saved.seek(0)
    second = torch.load(saved, weights_only=False)
    assert second.dispatcher is by_number(second.dispatcher.number) is not first.dispatcher
    assert second.dispatcher.locality == 0.5 and not second.dispatcher.strict
    assert torch.equal(second(given("batched")[0]), wanted)


def test_a_database_is_not_saved_with_a_module() -> None:
    """Its URL may hold a password, and its file is another machine's."""
    with TuningStore("sqlite://", import_shipped=False) as store:
        first = module(dispatcher=Dispatcher(store))
        with pytest.raises(StoreError, match=r"cannot be pickled.*state_dict\(\)"):
            torch.save(first, io.BytesIO())


@pytest.mark.parametrize(
    ("wrong", "words"), [({"policy": "grph-cold"}, "graph-cold"), ({"locality": 7}, "locality is a probability")]
)
def test_a_dispatcher_is_made_for_what_there_is(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(NSAError, match=words):
        Dispatcher(None, **wrong)
