"""The key-major order of selected attention: blocks walk the tokens that chose them, and partial results are joined."""

from __future__ import annotations

from dataclasses import replace

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

FAMILIES = ("slc_attn_fwd", "slc_attn_bwd_dq")
SMALL = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected=5, window_size=64)
BASE = Problem(
    seq_q=38, seq_k=38, num_q_heads=2, num_kv_heads=2, d_qk=32, d_v=16, dtype="float16", locality=0.3, nsa=SMALL
)
PROBLEMS = {
    "one_head_a_group": BASE,
    "two_batches_fewer_queries": BASE.replace(batch=2, seq_q=21, seq_k=150, num_q_heads=4),
    "odd_group": BASE.replace(num_q_heads=3, num_kv_heads=1, d_qk=48, d_v=32, dtype="float32"),
    "one_token": BASE.replace(seq_q=1, seq_k=1, num_q_heads=8, num_kv_heads=1),
    "odd_n_wide_blocks": BASE.replace(
        num_q_heads=8, nsa=replace(SMALL, select_block_size=32, num_selected=3, num_local=1)
    ),
    "d192_128": BASE.replace(seq_q=9, seq_k=41, d_qk=192, d_v=128, num_q_heads=4),
    "packed": BASE.replace(batch=4, layout="packed", seq_q=58, seq_k=58),
    "packed_fewer_queries": BASE.replace(batch=3, layout="packed", seq_q=30, seq_k=117, num_q_heads=8),
    "packed_short": BASE.replace(batch=14, layout="packed", num_q_heads=4, dtype="float32"),
}


def key_major(family: str, problem: Problem, **changes: int) -> Config:
    """The default with this order, and tiles of 16 rows or more."""
    default = get_spec(family).default_config(problem)
    tokens = max(1, 16 // (1 << (problem.group_size - 1).bit_length()))
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


@pytest.mark.parametrize("name", ["odd_group", "two_batches_fewer_queries", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_tokens_make_the_whole(family: str, name: str) -> None:
    """Lengths that four runs do not divide; the scratch is that of one run."""
    check(family, PROBLEMS[name], key_major(family, PROBLEMS[name], num_runs=4))
