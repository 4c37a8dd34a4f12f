"""Gradients on the device where they are easily lost: beyond int32, between packed sequences, at float16's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equations import gradients
from gpu.cases import MODULE_PROBLEMS, problem_name
from gpu.test_module import cast, make_tensors
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher

DEVICE = "cuda"
HALF_MAX = 65504.0
Tensors = dict[str, Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Drawn without a copy in float32."""
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


# more elements than an int32 can count


LONG = 270_336  # tokens of each of two sequences: 32 heads of 128 make 2.2e9 elements
HEADS, KV_HEADS, DIM = 32, 2, 128
SAMPLED = 64


def long_tensors(batch: int) -> Tensors:
    """Arguments of nsa_attention; one pair of keys and values serves every branch."""
    found = {"q": normal(batch, LONG, HEADS, DIM), "gates": normal(batch, LONG, HEADS, 3).sigmoid_()}
    return found | {name: normal(batch, LONG, KV_HEADS, DIM) for name in ("k", "v")}


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_gradients_reach_beyond_int32(dispatcher: Dispatcher) -> None:
    """The second sequence of a batch has the bits that it has alone, where no index passes 2^31."""
    given, do = long_tensors(2), normal(2, LONG, HEADS, DIM)
    assert given["q"].numel() > 2**31 > given["q"][1:].numel()
    how: dict[str, Any] = {"config": NSAConfig(), "dispatcher": dispatcher}
    together = {name: x[1:].clone() for name, x in gradients(given, do, **how).items()}
    alone = gradients({name: x[1:].clone() for name, x in given.items()}, do[1:].clone(), **how)
    for name, want in alone.items():
        assert torch.equal(together[name], want), name
        assert want[:, -SAMPLED:].isfinite().all() and want[:, -SAMPLED:].any(), name


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_window_gradients_beyond_int32_are_those_of_the_equations(dispatcher: Dispatcher) -> None:
    """The last tokens' queries, keys and values: only tokens of the last window have to do with them."""
    config, given = NSAConfig(), long_tensors(2)
    del given["gates"]
    leaves = [x.requires_grad_() for x in given.values()]
    o, _ = ops.window_attention(*leaves, config, dispatcher=dispatcher)
    do = normal(*o.shape)
    found = torch.autograd.grad(o, leaves, do)
    keys = slice(-config.window_size - SAMPLED, None)
    parts = (slice(-SAMPLED, None), keys, keys)
    near = [x.detach()[1:, part].float().requires_grad_() for x, part in zip(leaves, parts, strict=True)]
    wide, _ = reference.window_attention(*near, config)
    for name, got, want in zip("qkv", found, torch.autograd.grad(wide, near, do[1:, -SAMPLED:].float()), strict=True):
        error = (got[1:, -SAMPLED:].float() - want[:, -SAMPLED:]).norm() / want[:, -SAMPLED:].norm()
        assert error < 0.02, (name, float(error))


# packed sequences


PACKED = [p for p in MODULE_PROBLEMS if p.layout == "packed" and p.seq_k >= 1000 and p.d_qk <= 192]


@pytest.mark.parametrize("problem", PACKED, ids=problem_name)
def test_a_change_in_one_sequence_reaches_no_other(problem: Any, dispatcher: Dispatcher) -> None:
    tensors, cu = make_tensors(problem)
    given = cast(tensors, problem)
    do = normal(*given["q"].shape[:-1], problem.d_v, dtype=given["q"].dtype)
    how: dict[str, Any] = {"config": problem.nsa, "dispatcher": dispatcher, **cu}
    before = gradients(given, do, **how)
    lengths = cu["cu_seqlens_k"].diff().tolist()
    for sequence in sorted(range(len(lengths)), key=lambda i: lengths[i])[-2:]:  # the real ones
        start, stop = (cu["cu_seqlens_k"][sequence + i].item() for i in (0, 1))
        start_q, stop_q = (cu["cu_seqlens"][sequence + i].item() for i in (0, 1))
        rows = {name: slice(start_q, stop_q) if name in ("q", "gates") else slice(start, stop) for name in given}
        changed = {name: x.clone() for name, x in given.items()}
        for name, part in rows.items():
            changed[name][part] = torch.rand_like(changed[name][part])
        new_do = do.clone()
        new_do[start_q:stop_q].neg_()
        after = gradients(changed, new_do, **how)
        assert stop_q > start_q
        for name, part in rows.items():
            outside = torch.ones(len(after[name]), dtype=torch.bool, device=DEVICE)
            outside[part] = False
            assert torch.equal(after[name][outside], before[name][outside]), (name, sequence)
            assert not torch.equal(after[name][part], before[name][part]), (name, sequence)


# the end of float16


def crowded_first_key(tokens: int) -> Tensors:
    """q, k, v, do in float16 whose gradients pass 65504 while every product on the way to them stays below.

    All tokens attend to the first key about as much as to others. Its value makes ds large; the gradient of that key
    sums ds over tokens times q's first dims, that of early queries is ds times its second dims, and neither of these
    dims has a share in the scores. All gradients of the output have one sign, so that values' gradients add up.
    """
    q, k = normal(1, tokens, HEADS, DIM), normal(1, tokens, KV_HEADS, DIM)
    v, do = torch.zeros_like(k), torch.full_like(q, 2e3)
    q[..., :32], k[..., :32] = 30.0, 0.0
    q[..., 32:64], k[..., 32:64] = 0.0, 0.0
    k[:, 0, :, 32:64] = 4e3
    v[:, 0] = 1.2e-2
    return {name: x.half() for name, x in (("q", q), ("k", k), ("v", v), ("do", do))}


def check_overflow(name: str, got: Tensor, exact: Tensor) -> int:
    """Never NaN; infinite where float64 is beyond float16, finite where it is not. Returns how many are infinite."""
    assert not got.isnan().any(), name
    size = exact.abs()
    beyond, within = size > 1.05 * HALF_MAX, size < 0.95 * HALF_MAX
    assert got[beyond].isinf().all() and torch.equal(got[beyond].sign(), exact[beyond].sign().half()), name
    assert got[within].isfinite().all(), name
    return int(beyond.sum())


BRANCHES = ("selected", "window")
CROWD = 300  # tokens, all within one window and in selected blocks


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_too_large_for_float16_are_infinite_and_never_nan(branch: str, dispatcher: Dispatcher) -> None:
    given, config = crowded_first_key(CROWD), NSAConfig()
    own = torch.arange(CROWD, device=DEVICE, dtype=torch.int32)[:, None] // config.select_block_size
    index = torch.arange(config.num_selected, device=DEVICE, dtype=torch.int32)
    blocks = torch.where(index <= own, index, -1)[None, :, None].expand(1, CROWD, KV_HEADS, -1).contiguous()

    def run(module: Any, dtype: torch.dtype, **how: Any) -> tuple[Tensor, ...]:
        leaves = [given[name].to(dtype).requires_grad_() for name in "qkv"]
        extra = (blocks,) if branch == "selected" else ()
        o, _ = getattr(module, f"{branch}_attention")(*leaves, *extra, config, **how)
        return torch.autograd.grad(o, leaves, given["do"].to(dtype))

    exact = run(reference, torch.float64)
    found = run(ops, torch.float16, dispatcher=dispatcher)
    for name, got, want in zip("qkv", found, exact, strict=True):
        assert 0 < check_overflow(f"d{name}", got, want) < want.numel(), name


def test_a_whole_call_that_overflows_has_no_nan(dispatcher: Dispatcher) -> None:
    """Branches with keys and values of their own; those that are compressed have gradients of one sign."""
    made, config = crowded_first_key(CROWD), NSAConfig()
    calm = {"k": made["k"].clone(), "v": normal(1, CROWD, KV_HEADS, DIM).half() * 1e-3}
    calm["k"][:, 0, :, 32:64] = 0.0
    given = {"q": made["q"], **calm, "gates": torch.ones(1, CROWD, HEADS, 3, dtype=torch.float16, device=DEVICE)}
    given |= {f"{name}_{branch}": made[name].clone() for name in "kv" for branch in ("slc", "win")}
    found = gradients(given, made["do"], config=config, dispatcher=dispatcher)
    assert config.num_select_blocks(CROWD) <= config.num_selected  # any way to select gives the same blocks
    wide = {name: x.double().requires_grad_() for name, x in given.items()}
    k_cmp, v_cmp = (reference.compress_mean(wide[name], config) for name in "kv")
    own = [wide[f"{name}_{branch}"] for branch in ("slc", "win") for name in "kv"]
    out = reference.nsa_attention(wide["q"], k_cmp, v_cmp, *own, wide["gates"], config)
    exact = dict(zip(wide, torch.autograd.grad(out, list(wide.values()), made["do"].double()), strict=True))
    for name, got in found.items():
        assert not got.isnan().any(), name
        if name not in calm:  # the gradient of what is compressed passes through float16 once more
            assert check_overflow(name, got, exact[name]) > 0 or name == "gates"


# rows that see no compressed block


@pytest.mark.parametrize("problem", [MODULE_PROBLEMS[6], MODULE_PROBLEMS[9], MODULE_PROBLEMS[13]], ids=problem_name)
def test_rows_that_see_no_block_have_no_gradient(problem: Any, dispatcher: Dispatcher) -> None:
    """Selected and window attention are gated off, so that the compressed branch alone could leave one."""
    tensors, cu = make_tensors(problem)
    given = cast(tensors, problem)
    gates = torch.zeros_like(given["gates"])
    gates[..., 0] = 1.0
    do = normal(*given["q"].shape[:-1], problem.d_v, dtype=gates.dtype)
    found = gradients({**given, "gates": gates}, do, config=problem.nsa, dispatcher=dispatcher, **cu)
    position = torch.arange(problem.seq_q, device=DEVICE)
    if cu:
        position = position - cu["cu_seqlens"][torch.bucketize(position, cu["cu_seqlens"][1:].long(), right=True)]
    blind = position < problem.nsa.compress_block_size - 1  # queries are as many as keys
    seeing = position >= problem.nsa.compress_block_size - 1 + problem.nsa.compress_stride
    dq, dgates = (found[name] if cu else found[name].movedim(0, 1) for name in ("q", "gates"))
    assert all(x.isfinite().all() for x in found.values())
    assert blind.any() and not dq[blind].any() and not dgates[blind][..., 0].any()
    assert dq[seeing].any(-1).all()
    assert not any(found[f"{name}_{branch}"].any() for name in "kv" for branch in ("slc", "win"))
