"""NativeSparseAttention on the CPU: against a composition by hand, its gradients, state and sentences for bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune import NativeSparseAttention, NSAConfig, ops, reference
from nsa_autotune.errors import InvalidConfig, InvalidInput
from nsa_autotune.layout import packed_layout
from nsa_autotune.reference import PhiWeights

HIDDEN = 20
CONFIG = NSAConfig(8, 4, 16, num_selected=4, window_size=10)
LENGTHS = [37, 0, 1, 50, 12]
TOKENS = sum(LENGTHS)

VARIANTS = [
    pytest.param({}, id="mlp"),
    pytest.param({"compression": "mean", "share_kv": True}, id="mean-shared-kv"),
    pytest.param({"share_kv": True, "bias": True, "d_v": None}, id="mlp-shared-kv-bias"),
    pytest.param({"compression": "mean", "rope_theta": None}, id="mean-no-rotary"),
    pytest.param({"num_q_heads": 5, "num_kv_heads": 1, "rope_theta": 500.0}, id="group-of-5"),
]


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> NativeSparseAttention:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "d_qk": 6, "d_v": 4, "phi_hidden": 7, "config": CONFIG}
    return NativeSparseAttention(HIDDEN, **{**sizes, **changes}).to(dtype)


def tokens(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*lead, HIDDEN, dtype=dtype)


def cu_seqlens(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def turn(x: Tensor, positions: list[int], theta: float | None) -> Tensor:
    """Rotary as a product of complex numbers whose parts are the two halves of a head."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    angle = torch.tensor([[p * theta ** (-i / half) for i in range(half)] for p in positions], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def by_hand(module: NativeSparseAttention, x: Tensor, lengths: list[int] | None = None) -> Tensor:
    """The module from its state and the equations of the reference alone."""
    state = module.state_dict()

    def linear(name: str, dim: int) -> Tensor:
        y = x @ state[f"{name}.weight"].T
        return (y + state[f"{name}.bias"] if f"{name}.bias" in state else y).unflatten(-1, (-1, dim))

    layout = None
    if lengths is not None:
        cu = cu_seqlens(lengths)
        layout = packed_layout(cu, cu, x.shape[0], x.shape[0], module.config)
    where = [t for n in ([x.shape[-2]] if lengths is None else lengths) for t in range(n)]
    own = {b: "cmp" if module.share_kv else b for b in ("cmp", "slc", "win")}
    q = turn(linear("q_proj", module.d_qk), where, module.rope_theta)
    k = {b: turn(linear(f"k_proj.{own[b]}", module.d_qk), where, module.rope_theta) for b in own}
    v = {b: linear(f"v_proj.{own[b]}", module.d_v) for b in own}
    gates = 1 / (1 + torch.exp(-linear("gate_proj", 3)))
    cmp = []
    for name, raw in (("phi_k", k["cmp"]), ("phi_v", v["cmp"])):
        if module.compression == "mean":
            cmp.append(reference.compress_mean(raw, module.config, layout=layout))
        else:
            phi = PhiWeights(**{w: state[f"{name}.{w}"] for w in ("position", "w1", "b1", "w2", "b2")})
            cmp.append(reference.compress_mlp(raw, phi, module.config, layout=layout))
    o = reference.nsa_attention(q, *cmp, k["slc"], v["slc"], k["win"], v["win"], gates, module.config, layout=layout)
    out = o.flatten(-2) @ state["out_proj.weight"].T
    return out + state["out_proj.bias"] if "out_proj.bias" in state else out


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("seq", [1, 7, 100])
def test_equals_the_composition_by_hand(changes: dict[str, Any], seq: int) -> None:
    module, x = build(**changes), tokens(2, seq)
    got = module(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    close(got, by_hand(module, x))


@pytest.mark.parametrize("changes", VARIANTS)
def test_packed_equals_the_composition_by_hand_and_separate_sequences(changes: dict[str, Any]) -> None:
    module, x = build(**changes), tokens(TOKENS)
    got = module(x, cu_seqlens())
    close(got, by_hand(module, x, LENGTHS))
    start = 0
    for length in LENGTHS:
        if length:
            close(got[start : start + length], module(x[None, start : start + length])[0])
        start += length


def test_is_causal() -> None:
    module, x = build(), tokens(1, 60)
    changed = x.clone()
    changed[:, 41:] += 1.0
    before, after = module(x), module(changed)
    close(after[:, :41], before[:, :41])
    assert not torch.isclose(after[:, 41:], before[:, 41:]).all(-1).any()


def test_rotary_sees_distances_only() -> None:
    """Tokens moved to other positions answer alike, as long as their whole window moves with them."""
    module = build(config=NSAConfig(8, 4, 16, num_selected=4, window_size=5), bias=True)
    with torch.no_grad():
        module.gate_proj.weight.zero_()
        module.gate_proj.bias.copy_(torch.tensor([-1e4, -1e4, 0.0] * 4))  # only the window is open
    x = tokens(1, 30)
    close(module(x)[:, 14:], module(x[:, 10:])[:, 4:])
    assert not torch.isclose(module(x)[:, 10], module(x[:, 10:])[:, 0]).any()


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_gradient_reaches_every_parameter(changes: dict[str, Any], packed: bool) -> None:
    module = build(**changes)
    x = (tokens(TOKENS) if packed else tokens(1, 100)).requires_grad_()
    module(x, cu_seqlens() if packed else None).square().sum().backward()
    for name, parameter in [("x", x), *module.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name == "phi_k.b2":  # the same shift of all compressed keys leaves the softmax as it is
            assert parameter.grad.abs().max() < 1e-9
        else:
            assert parameter.grad.abs().max() > 1e-9, name


def test_gradient_of_a_sequence_shorter_than_a_block() -> None:
    module = build()
    module(tokens(1, 5)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert module.k_proj["win"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("changes", VARIANTS)
def test_state_dict_round_trip(changes: dict[str, Any]) -> None:
    module, other, x = build(**changes), build(**changes), tokens(1, 40)
    assert not torch.allclose(module(x), other(x))
    assert other.load_state_dict(module.state_dict(), strict=True).missing_keys == []
    assert torch.equal(module(x), other(x))


def test_shared_kv_has_one_pair_of_projections() -> None:
    def names(**changes: Any) -> set[str]:
        return {name for name in build(**changes).state_dict() if name.startswith(("k_proj", "v_proj", "phi"))}

    shared = names(share_kv=True, compression="mean")
    assert shared == {"k_proj.cmp.weight", "v_proj.cmp.weight"}
    branches = {f"{x}_proj.{b}.weight" for x in "kv" for b in ("cmp", "slc", "win")}
    assert names() == branches | {f"phi_{x}.{w}" for x in "kv" for w in ("position", "w1", "b1", "w2", "b2")}


def test_low_precision_and_autocast_keep_near_float64() -> None:
    exact, x = build(num_q_heads=2, num_kv_heads=2), tokens(1, 9)  # so short that every block is chosen
    want = exact(x)
    single = build(num_q_heads=2, num_kv_heads=2, dtype=torch.float32)
    single.load_state_dict(exact.state_dict())
    torch.testing.assert_close(single(x.float()).double(), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = single(x.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
    half = single.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("x", "cu", "sentence"),
    [
        pytest.param(tokens(9), None, r"x must be \[B, T, hidden\].*Pass cu_seqlens", id="packed-without-cu_seqlens"),
        pytest.param(tokens(1, 1, 9), None, r"x must be \[B, T, hidden\]; got shape=\(1, 1, 9, 20\)", id="four-dims"),
        pytest.param(tokens(1, 9), cu_seqlens([9]), "x must be packed.*Flatten x", id="batched-with-cu_seqlens"),
        pytest.param(tokens(1, 9)[..., :7], None, "hidden_size; got.*7.*hidden_size=20", id="hidden-size"),
        pytest.param(tokens(1, 0), None, "at least one token", id="no-token"),
        pytest.param(tokens(1, 9).float(), None, "dtype of the module.*float32.*float64.*autocast", id="dtype"),
        pytest.param(tokens(1, 9).to("meta"), None, "device of the module.*meta.*cpu", id="device"),
        pytest.param(tokens(9), cu_seqlens([9]).long(), r"int32.*int64.*cu_seqlens\.int\(\)", id="cu_seqlens-int64"),
        pytest.param(tokens(9), cu_seqlens([9])[None], r"int32 \[S \+ 1\].*shape=\(1, 2\)", id="cu_seqlens-2d"),
        pytest.param(tokens(9), cu_seqlens([])[:1], r"S >= 1", id="cu_seqlens-too-short"),
        pytest.param(tokens(9), cu_seqlens([9]).to("meta"), r"cu_seqlens\.to\('cpu'\)", id="cu_seqlens-device"),
        pytest.param(tokens(9), cu_seqlens([4, 4]), r"\[0, 4, 8\], tokens=9.*cumulative", id="cu_seqlens-too-few"),
        pytest.param(tokens(9), cu_seqlens([12, -3]), "rise from 0", id="cu_seqlens-falls"),
        pytest.param(tokens(9), cu_seqlens([9]) + 1, "rise from 0", id="cu_seqlens-not-from-0"),
    ],
)
def test_bad_input_raises_a_sentence_with_remedy(x: Tensor, cu: Tensor | None, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence) as caught:
        build()(x, cu)
    assert caught.value.remedy and caught.value.values


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_q_heads": 5}, "multiple of num_kv_heads; got num_q_heads=5, num_kv_heads=2"),
        ({"d_qk": 7}, "even d_qk.*d_qk=7.*rope_theta=None"),
        ({"rope_theta": -1.0}, "positive theta.*-1.0"),
        ({"rope_theta": "1e4"}, "positive theta.*rope_theta='1e4'"),
        ({"rope_theta": True}, "positive theta.*rope_theta=True"),
        ({"rope_theta": float("inf")}, "positive theta.*rope_theta=inf"),
        ({"dispatcher": 5}, "dispatcher must be a Dispatcher; got dispatcher='int'"),
        ({"d_qk": 0}, "d_qk must be a positive int"),
        ({"compression": "max"}, "compression.*'max'.*'mlp' or 'mean'"),
        ({"d_v": 0}, "d_v must be a positive int; got d_v=0"),
        ({"phi_hidden": 1.5}, "phi_hidden must be a positive int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_sizes_raise(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        build(**changes)


def test_repr_tells_the_constants() -> None:
    text = repr(build(share_kv=True))
    assert "kv shared" in text and "compression=mlp" in text and "window_size=10" in text


def test_the_module_hands_strict_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real = ops.nsa_attention
    monkeypatch.setattr(ops, "nsa_attention", lambda *a, **k: (seen.append(k["strict"]), real(*a, **k))[1])
    for strict in (False, True):
        module = NativeSparseAttention(16, 2, 1, 8, config=NSAConfig(8, 4, 16, num_selected=4), strict=strict)
        module(torch.randn(1, 9, 16))
    assert seen == [False, True]


@pytest.mark.parametrize("x", [[1, 2], None])
def test_what_is_no_tensor_is_refused(x: object) -> None:
    module = NativeSparseAttention(16, 2, 1, 8)
    with pytest.raises(InvalidInput, match=r"torch\.Tensor"):
        module(x)


def test_a_config_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="NSAConfig"):
        NativeSparseAttention(16, 2, 1, 8, config={"window_size": 3})  # type: ignore[arg-type]
