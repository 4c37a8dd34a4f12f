"""Switches of kernels that small groups and short windows do not reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu.watcher import watched

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Config, Problem

SMALL = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected=5, window_size=64)
RANDOM = Problem(  # tokens of a tile share the forced blocks only
    seq_q=54, seq_k=70, num_q_heads=16, num_kv_heads=1, d_qk=48, d_v=32, dtype="float16", locality=0.0, nsa=SMALL
)
PROBLEMS = {
    "random": RANDOM,
    "odd_group_packed": RANDOM.replace(
        batch=3, seq_q=45, seq_k=45, num_q_heads=24, num_kv_heads=2, d_qk=32, d_v=16, layout="packed"
    ),
    "last_tile_half_full": RANDOM.replace(batch=2, seq_q=9, d_qk=32, dtype="float32"),
    "odd_n": RANDOM.replace(seq_q=7, d_qk=32, d_v=16, nsa=replace(SMALL, num_selected=3, num_local=1)),
}


def check(family: str, problem: Problem, changes: Config) -> None:
    """Compare the default with these changes against the reference; the watcher refuses a read past an end."""
    spec = get_spec(family)
    config = {**spec.default_config(problem), **changes}
    spec.check_config(problem, config)
    with watched(load(render(spec, problem, config))) as (watcher, launch):
        report = check_variant(spec, problem, launch, "cpu")
    assert report.ok, report.reason
    assert watcher.checked > 0


@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swap"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_blocks_that_a_tile_shares_are_walked_once(name: str, swap: bool) -> None:
    tma = PROBLEMS[name].dtype != "float32"
    check(
        "slc_attn_fwd",
        PROBLEMS[name],
        {"loop_order": "pair", "BLOCK_T": 2, "BLOCK_N": 16, "swap": swap, "use_tma": tma},
    )


@pytest.mark.parametrize("tokens", [2, 8, 16], ids=["a_comparison", "a_full_one", "chunks"])
def test_a_union_lists_each_block_once_in_order(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a caller's list repeats a block or is not sorted."""
    spec, problem = get_spec("slc_attn_fwd"), RANDOM.replace(num_q_heads=8, dtype="float32")
    config = {**spec.default_config(problem), "loop_order": "union", "BLOCK_T": tokens, "BLOCK_N": 16}
    module, inputs = load(render(spec, problem, config)), make_inputs(spec, problem, "cpu")
    blocks = inputs.tensors["blocks"]
    assert blocks is not None
    blocks[0, ::3, 0, :3] = torch.tensor([3, 1, 3], dtype=torch.int32)
    caught: list[Any] = []
    monkeypatch.setattr(module.slc_attn_fwd_kernel, "run", lambda *args, **_: caught.extend(args))
    inputs.call(module.launch)
    starts, bits, counts = [x for x in caught if isinstance(x, torch.Tensor) and x.dtype == torch.int32][:3]
    for tile, count in enumerate(counts.tolist()):
        rows = blocks[0, tile * tokens : (tile + 1) * tokens, 0].tolist()
        wanted = {16 * b: sum(1 << t for t, row in enumerate(rows) if b in row) for row in rows for b in row if b >= 0}
        found = slice(tile * tokens * 5, tile * tokens * 5 + count)
        assert list(zip(starts[found].tolist(), bits[found].tolist(), strict=True)) == sorted(wanted.items())


@pytest.mark.parametrize(("order", "tokens"), [("query_major", 1), ("union", 4)])
def test_the_carried_block_is_the_next_one(order: str, tokens: int) -> None:
    """Two key tiles a block, so that a block is carried over a step in which it does not change."""
    problem = RANDOM.replace(nsa=replace(SMALL, select_block_size=32, compress_block_size=32, compress_stride=16))
    for case in (problem, problem.replace(batch=3, layout="packed")):
        check("slc_attn_fwd", case, {"loop_order": order, "BLOCK_T": tokens, "BLOCK_N": 16, "carry": True})


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize(("window", "tokens"), [(64, 4), (50, 2)])  # ends with 3 keys; with 19, in two narrow tiles
@pytest.mark.parametrize("name", ["whole", "packed", "last_queries"])
def test_a_narrow_tail_ends_every_window(name: str, window: int, tokens: int, tma: bool) -> None:
    whole = RANDOM.replace(seq_q=74, seq_k=74, num_q_heads=8, d_qk=16, d_v=16, nsa=replace(SMALL, window_size=window))
    cases = {"whole": whole, "packed": whole.replace(batch=3, layout="packed"), "last_queries": whole.replace(seq_q=9)}
    config = {"BLOCK_T": tokens, "BLOCK_N": 32, "use_tma": tma, "split_mask": True, "narrow_tail": True}
    check("win_attn_fwd", cases[name], config)


def test_a_narrow_tail_multiplies_fewer_keys() -> None:
    spec, problem = get_spec("win_attn_fwd"), Problem(nsa=NSAConfig())
    config = {**spec.default_config(problem), "split_mask": True}
    wide, narrow = (spec.cost(problem, {**config, "narrow_tail": on}).mma_flops for on in (False, True))
    assert narrow / wide == pytest.approx(528 / 576)  # 515 keys of 4 tokens: 8 tiles of 64 and 16, not 9 of 64


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("name", ["random", "odd_group_packed", "odd_n"])
def test_gluon_takes_what_its_stand_in_takes(name: str, registers: bool) -> None:
    """The interpreter runs the kernel in Triton: what it checks is the launch and the arguments, not Gluon's loop."""
    tokens = 2 if PROBLEMS[name].group_size > 16 else 4
    changes = {"BLOCK_T": tokens, "BLOCK_N": 16, "use_tma": True, "lean_softmax": True, "split_mask": registers}
    config = {**changes, "gluon": True, "q_in_registers": registers, "num_warps": 4}
    check("slc_attn_fwd", PROBLEMS[name].replace(dtype="float16"), {**config, "loop_order": "union"})
    check("cmp_attn_fwd", PROBLEMS[name].replace(dtype="float16"), config)


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("name", ["random", "odd_group_packed", "odd_n"])
def test_gluon_takes_what_its_stand_in_takes_for_dq(name: str, registers: bool) -> None:
    tokens = 2 if PROBLEMS[name].group_size > 16 else 4
    changes = {"BLOCK_T": tokens, "BLOCK_N": 16, "use_tma": True, "num_warps": 4, "split_mask": registers}
    config = {**changes, "gluon": True, "do_in_registers": registers, "q_in_registers": registers}
    for family in ("cmp_attn_bwd_dq", "win_attn_bwd_dq"):
        check(family, PROBLEMS[name].replace(dtype="float16"), config)
    check("slc_attn_bwd_dq", PROBLEMS[name].replace(dtype="float16"), {**config, "loop_order": "union"})


LEAN = {  # loops with and without a mask, both ways of the products, rows that see nothing
    "cmp_attn_fwd": {"split_mask": True},
    "win_attn_fwd": {"split_mask": True, "BLOCK_N": 32, "narrow_tail": True},
    "slc_attn_fwd": {"loop_order": "union", "BLOCK_T": 2, "BLOCK_N": 16, "swap": True},
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("family", LEAN)
def test_scores_may_be_scaled_and_masked_once(family: str, name: str) -> None:
    check(family, PROBLEMS[name], {**LEAN[family], "lean_softmax": True})


@pytest.mark.parametrize(("order", "tokens"), [("query_major", 1), ("union", 4)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_blocks_seen_whole_need_no_mask(name: str, order: str, tokens: int) -> None:
    swap = (order == "union") == (name in ("random", "odd_n"))
    changes = {"loop_order": order, "BLOCK_T": tokens, "BLOCK_N": 16, "split_mask": True, "swap": swap}
    check("slc_attn_bwd_dq", PROBLEMS[name], changes)
    check("slc_attn_fwd", PROBLEMS[name], {**changes, "lean_softmax": swap, "carry": order == "union"})


def test_sharing_reads_less_than_one_token_a_tile_with_random_selections() -> None:
    spec, problem = get_spec("slc_attn_fwd"), Problem(seq_q=65536, seq_k=65536, locality=0.0)
    default = spec.default_config(problem)
    reads = [
        spec.cost(problem, {**default, "loop_order": order, "BLOCK_T": tokens}).on_chip_bytes
        for order, tokens in (("query_major", 1), ("pair", 2))
    ]
    assert [read / reads[0] for read in reads] == pytest.approx([1, 14.5 / 16])  # 3 forced blocks of 16


def test_small_groups_may_not_share() -> None:
    spec, problem = get_spec("slc_attn_fwd"), Problem(num_q_heads=32)
    config = {**spec.default_config(problem), "loop_order": "pair", "BLOCK_T": 2}
    assert "9 query heads" in str(spec.broken_constraint(problem, config))
