"""The key-major order of selected attention: blocks walk the tokens that chose them, and partial results are joined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu.watcher import watched

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.cli.tries import completed, read_tries
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.paths import CHECKOUT
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.gradients import attention_gradients
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Config, Problem

FAMILIES = ("slc_attn_fwd", "slc_attn_bwd_dq")
SMALL = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected=5, window_size=64)
BASE = Problem(
    seq_q=38, seq_k=38, num_q_heads=2, num_kv_heads=2, d_qk=32, d_v=16, dtype="float16", locality=0.3, nsa=SMALL
)
PROBLEMS = {
    "one_head_a_group": BASE,
    "two_batches_fewer_queries": BASE.replace(batch=2, seq_q=13, seq_k=90, num_q_heads=4),
    "odd_group": BASE.replace(num_q_heads=3, num_kv_heads=1, d_qk=48, d_v=32, dtype="float32"),
    "one_token": BASE.replace(seq_q=1, seq_k=1, num_q_heads=8, num_kv_heads=1),
    "odd_n_wide_blocks": BASE.replace(
        num_q_heads=8, num_kv_heads=1, nsa=replace(SMALL, select_block_size=32, num_selected=3, num_local=1)
    ),
    "d192_128": BASE.replace(seq_q=9, seq_k=41, d_qk=192, d_v=128, num_q_heads=4),
    "packed": BASE.replace(batch=4, layout="packed", seq_q=48, seq_k=48),
    "packed_fewer_queries": BASE.replace(batch=3, layout="packed", seq_q=21, seq_k=80, num_q_heads=8, num_kv_heads=1),
    "packed_short": BASE.replace(batch=14, layout="packed", num_q_heads=4, dtype="float32"),
}


def key_major(family: str, problem: Problem, **changes: int) -> Config:
    """The default with this order, and tiles of 32 rows."""
    default = get_spec(family).default_config(problem)
    tokens = max(1, 32 // (1 << (problem.group_size - 1).bit_length()))
    whole = {"BLOCK_T": tokens, "BLOCK_N": problem.nsa.select_block_size, "num_warps": 4}
    return {**default, "loop_order": "key_major", **whole, "CHUNK": 256, **changes}


def check(family: str, problem: Problem, config: Config) -> None:
    """Compare with the reference; the watcher refuses a read past an end, and scratch is NaN before."""
    spec = get_spec(family)
    spec.check_config(problem, config)
    with watched(load(render(spec, problem, config))) as (watcher, launch):
        report = check_variant(spec, problem, launch, "cpu")
    assert report.ok, report.reason
    assert watcher.checked > 0


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_results_of_blocks_make_the_whole(family: str, name: str) -> None:
    check(family, PROBLEMS[name], key_major(family, PROBLEMS[name]))


@pytest.mark.parametrize(("name", "num_runs"), [("odd_group", 4), ("two_batches_fewer_queries", 2), ("packed", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_tokens_make_the_whole(family: str, name: str, num_runs: int) -> None:
    """Also lengths that the runs do not divide: 38 in four, 13 in two."""
    check(family, PROBLEMS[name], key_major(family, PROBLEMS[name], num_runs=num_runs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_all_chose_takes_several_programs(family: str) -> None:
    """Block 0 of 290 tokens: two items of 256 entries, the last of which fills no whole tile."""
    problem = BASE.replace(seq_q=290, seq_k=301, num_q_heads=1, num_kv_heads=1, d_qk=16, dtype="float32")
    check(family, problem, key_major(family, problem, BLOCK_T=64))


def dq_of(problem: Problem, tensors: dict[str, Any]) -> Any:
    given = {name: tensors[name] for name in ("q", "k", "v", "do", "lse", "delta", "gate", "blocks")}
    return attention_gradients("slc", **given, config=problem.nsa)["dq"]


def test_dq_is_added_to_what_there_is_and_closed_gates_give_nothing() -> None:
    """The gate is part of the exponent, and log 0 is not finite."""
    spec, problem = get_spec("slc_attn_bwd_dq"), PROBLEMS["odd_group"]
    module = load(render(spec, problem, key_major(spec.family, problem, num_runs=2)))
    inputs = make_inputs(spec, problem, "cpu")
    tensors: dict[str, Any] = inputs.tensors
    tensors["gate"][:, ::2], tensors["delta"][:, ::2] = 0.0, 0.0  # delta = gate rowsum(do o)
    tensors["dq"].fill_(2.0)
    inputs.call(lambda **arguments: module.launch(**arguments, accumulate=True))
    wanted = dq_of(problem, tensors)
    assert wanted.abs().max() > 0.1 and not wanted[:, ::2].any()
    torch.testing.assert_close(tensors["dq"] - 2.0, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_is_that_of_one_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results are by far the most of it: 4 runs take a quarter."""
    spec, problem, largest = get_spec(family), BASE, {}
    for num_runs in (1, 4):
        module, asked = load(render(spec, problem, key_major(family, problem, num_runs=num_runs))), []

        def empty(size: int, made: list[int] = asked, **how: Any) -> torch.Tensor:
            made.append(size)
            return torch.empty(size, **how)

        monkeypatch.setattr(module, "torch", SimpleNamespace(empty=empty, int32=torch.int32, float32=torch.float32))
        make_inputs(spec, problem, "cpu").call(module.launch)
        largest[num_runs] = max(asked)
    tokens = {1: problem.seq_q, 4: -(-problem.seq_q // 4)}
    width = problem.d_v if family == "slc_attn_fwd" else problem.d_qk
    per_token = problem.num_q_heads * problem.nsa.num_selected * width
    assert largest == {runs: rows * per_token for runs, rows in tokens.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_long_sequences_need_runs(family: str) -> None:
    spec = get_spec(family)
    for heads, least in ((4, 1), (32, 8), (64, 16)):
        problem = Problem(seq_q=1 << 18, seq_k=1 << 18, num_q_heads=heads)
        config = {**key_major(family, problem), "BLOCK_T": 64 // problem.group_size}
        reasons = {runs: spec.broken_constraint(problem, {**config, "num_runs": runs}) for runs in (1, 2, 4, 8, 16, 32)}
        assert [runs for runs, reason in reasons.items() if reason] == [runs for runs in reasons if runs < least]
        assert least == 1 or "4 GiB" in str(reasons[least // 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_key_major_has_chunks_and_runs(family: str) -> None:
    spec, problem = get_spec(family), Problem(num_q_heads=4)
    default = spec.default_config(problem)
    assert default["loop_order"] == "query_major"  # until the other is measured
    assert spec.completed({name: default[name] for name in default if name not in ("CHUNK", "num_runs")}) == default
    for change in ({"CHUNK": 256}, {"num_runs": 2}):
        assert "for key_major" in str(spec.broken_constraint(problem, {**default, **change}))
    config = {**key_major(family, problem), "BLOCK_T": 64}
    assert spec.broken_constraint(problem, config) is None
    assert "whole blocks" in str(spec.broken_constraint(problem, {**config, "BLOCK_N": 32}))
    assert "no swap" in str(spec.broken_constraint(problem, {**config, "swap": True}))


@pytest.mark.parametrize("family", FAMILIES)
def test_small_groups_fill_the_rows_of_a_matrix_instruction(family: str) -> None:
    spec, problem = get_spec(family), Problem(num_q_heads=4)
    default = spec.default_config(problem)
    costs = [spec.cost(problem, config) for config in (default, {**key_major(family, problem), "BLOCK_T": 64})]
    assert costs[0].mma_flops / costs[1].mma_flops == 16 and costs[0].flops == costs[1].flops
    assert costs[0].on_chip_bytes > 4 * costs[1].on_chip_bytes


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "benchmarks" / "tries").glob("small-groups-g*.jsonl")), ids=lambda p: p.stem
)
def test_configs_to_try_are_whole_and_legal(path: Path) -> None:
    group, tries = int(path.stem.rpartition("g")[2]), read_tries(path)
    tokens = 1 << (16 if group == 16 else 15)
    problem = Problem(seq_q=tokens, seq_k=tokens, num_q_heads=4 * group, locality=0.0)
    for family in FAMILIES:
        given = [config for name, config in tries if name == family]
        assert len(given) >= 3 and completed(get_spec(family), problem, tries) == given
        assert all(set(config) == set(get_spec(family).default_config(problem)) for config in given)
