"""The inverse of a selection: lists of tokens, work items and the sums of several items, in the interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune.bench.inputs import TrialInputs, make_inputs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidProblem
from nsa_autotune.gradients import attention_gradients
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

SPEC = get_spec("slc_attn_bwd_dkv")
SMALL = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected=5, window_size=16)
LONG = Problem(
    batch=2,
    seq_q=661,
    seq_k=703,
    num_q_heads=2,
    num_kv_heads=1,
    d_qk=16,
    d_v=16,
    dtype="float32",
    locality=0.5,
    nsa=SMALL,
)
PACKED = LONG.replace(batch=3, layout="packed", seq_q=689, seq_k=689)
CHUNK = 512


def rendered(problem: Problem) -> ModuleType:
    """The family's module with short items."""
    config = {**SPEC.default_config(problem), "CHUNK": CHUNK, "BLOCK_T": 16, "BLOCK_N": 16}
    return load(render(SPEC, problem, config))


def lists(module: ModuleType, inputs: TrialInputs, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """token_list, block_start and item_place, as the gathering kernel gets them."""
    caught: list[Any] = []
    monkeypatch.setattr(module.slc_attn_bwd_dkv_kernel, "run", lambda *args, **kwargs: caught.extend(args))
    monkeypatch.setattr(module.slc_attn_bwd_dkv_sum_kernel, "run", lambda *args, **kwargs: None)
    inputs.call(module.launch)
    token_list, block_start, item_place = [a for a in caught if isinstance(a, Tensor) and a.dtype == torch.int32][:3]
    return token_list, block_start, item_place


def expected_places(problem: Problem, inputs: TrialInputs) -> tuple[Tensor, Tensor, int]:
    """Place of each used entry and its token, in the order of (batch, token, head, slot); number of places."""
    blocks = inputs.tensors["blocks"]
    assert blocks is not None
    blocks = blocks.long()
    num_blocks = problem.nsa.num_select_blocks(problem.seq_k)
    ids = blocks
    if problem.layout == "packed":
        cmp_start, slc_first = inputs.tensors["cmp_start"], inputs.tensors["slc_first"]
        assert cmp_start is not None and slc_first is not None
        num_blocks = slc_first.shape[0]
        ratio = problem.nsa.select_block_size // problem.nsa.compress_stride
        ids = (cmp_start.long()[:, None, None] // ratio + blocks)[None]
        blocks = blocks[None]
    batch, tokens, heads, _ = blocks.shape
    batch_head = torch.arange(batch)[:, None, None, None] * heads + torch.arange(heads)[:, None]  # [B, 1, H, 1]
    place = (batch_head * num_blocks + ids)[blocks >= 0]
    token = torch.arange(tokens)[None, :, None, None].expand_as(blocks)[blocks >= 0]
    return place, token, batch * heads * num_blocks


@pytest.mark.parametrize("problem", [LONG, LONG.replace(seq_q=1, seq_k=1), PACKED], ids=["batched", "one", "packed"])
def test_the_lists_are_those_of_a_stable_sort(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SPEC, problem, "cpu")
    token_list, block_start, _ = lists(rendered(problem), inputs, monkeypatch)
    place, token, num_places = expected_places(problem, inputs)
    order = torch.sort(place, stable=True).indices
    assert torch.equal(token_list[: len(order)].long(), token[order])
    counts = torch.bincount(place, minlength=num_places)
    assert torch.equal(block_start.long(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    if problem.seq_q > 1:
        assert int(counts.max()) > CHUNK or problem.layout == "packed"  # block 0 is heavy
        assert int((inputs.tensors["blocks"] < 0).sum()) > 0  # type: ignore[operator]


def test_every_place_has_its_items_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SPEC, LONG, "cpu")
    _, block_start, item_place = lists(rendered(LONG), inputs, monkeypatch)
    lengths = block_start.diff().long()
    items = ((lengths + CHUNK - 1) // CHUNK).clamp(min=1)
    first = torch.arange(len(lengths)) + block_start[:-1].long() // CHUNK
    assert torch.equal(item_place[item_place >= 0].long(), torch.arange(len(lengths)).repeat_interleave(items))
    assert torch.equal(item_place[first].long(), torch.arange(len(lengths)))
    slots = block_start[:-1].long() // CHUNK * 2  # of partial sums: those of blocks of several items don't overlap
    several = items > 1
    taken = torch.cat([slot + torch.arange(int(n)) for slot, n in zip(slots[several], items[several], strict=True)])
    assert len(taken.unique()) == len(taken) and len(taken) >= 2
    assert int(taken.max()) < 2 * (inputs.tensors["blocks"].numel() // CHUNK)  # type: ignore[union-attr]


@pytest.mark.parametrize("only_block_0", [False, True])
def test_blocks_of_several_items_are_summed(only_block_0: bool) -> None:
    """Block 0 of 661 tokens takes two items of 512; blocks that nobody selected get zeros."""
    problem = LONG.replace(batch=1)
    inputs = make_inputs(SPEC, problem, "cpu")
    tensors = inputs.tensors
    blocks = tensors["blocks"]
    assert blocks is not None
    if only_block_0:
        blocks.fill_(-1)[..., 0] = 0
    inputs.call(rendered(problem).launch)
    given = {name: tensors[name] for name in ("q", "k", "v", "do", "lse", "delta", "gate", "blocks")}
    expected = attention_gradients("slc", **given, config=problem.nsa)  # type: ignore[arg-type]
    for name in ("dk", "dv"):
        found = tensors[name]
        assert found is not None and (not only_block_0 or bool((found[:, 16:] == 0).all()))
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-3)


def test_more_entries_than_int32_counts_are_refused() -> None:
    SPEC.check_problem(Problem(seq_q=1 << 24, seq_k=1 << 24))
    with pytest.raises(InvalidProblem, match=r"below 2\^31.*Split the batch"):
        SPEC.check_problem(Problem(batch=2, seq_q=1 << 24, seq_k=1 << 24))
