"""Kernels in Gluon, on a model of the hardware's asynchronous operations: right, and safe however late tiles arrive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cpu.gluon_model import modelled

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import Problem

SMALL = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=32, num_selected=5, window_size=64)
BASE = Problem(
    seq_q=90, seq_k=330, num_q_heads=16, num_kv_heads=1, d_qk=64, d_v=32, dtype="bfloat16", locality=0.5, nsa=SMALL
)
PROBLEMS = {
    "few_queries": BASE,
    "chunks": BASE.replace(d_qk=96, d_v=48, dtype="float16", seq_q=40),  # head dims of two powers of two
    "batched": BASE.replace(batch=2, num_q_heads=24, num_kv_heads=2, seq_q=50, seq_k=50),
    "packed": BASE.replace(batch=3, num_q_heads=24, num_kv_heads=2, seq_q=60, seq_k=60, layout="packed", locality=0.0),
    "tiny": BASE.replace(seq_q=2, seq_k=2),
}
FAMILIES = [family for family, spec in all_specs().items() if any(param.name == "gluon" for param in spec.params)]


def gluon_config(family: str, problem: Problem, **changes: Any) -> dict[str, Any]:
    """Tiles of 64 rows, walked with and without a mask."""
    spec = get_spec(family)
    needed = {"loop_order": "union", "lean_softmax": True, "BLOCK_T": 4}
    needed |= {"gluon": True, "use_tma": True, "split_mask": True, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    default = spec.default_config(problem)
    return {**default, **{name: value for name, value in {**needed, **changes}.items() if name in default}}


def check(family: str, problem: Problem, patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Compare with the reference, outputs poisoned."""
    spec, config = get_spec(family), gluon_config(family, problem, **changes)
    spec.check_config(problem, config)
    report = check_variant(spec, problem, modelled(render(spec, problem, config), patch), "cpu")
    assert report.ok, report.reason


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_waited_for_whatever_the_number_of_buffers(
    family: str, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, BASE, monkeypatch, num_stages=stages, BLOCK_N=16 if stages == 3 else 32)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "few_queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_problems_are_right(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"q_in_registers": True, "do_in_registers": True, "split_mask": name != "chunks"}
    check(family, PROBLEMS[name], monkeypatch, num_stages=2, **held)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_warp_groups_hold_twice_the_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, BASE.replace(locality=0.0), monkeypatch, BLOCK_T=8, num_warps=8, num_stages=2)


MISTAKES = [  # what a kernel might lack, and what the model says to it
    ("hopper.mbarrier.wait(v_bars.index(slot), phase)", "pass", "read before it has arrived"),
    ("phase = i // STAGES & 1", "phase = i & 1", "last for ever"),
    ("qk = hopper.warpgroup_mma_wait(0, deps=[qk])", "pass", "used before it was waited for"),
    ("if i + STAGES < total:", "if i + STAGES <= total:", "never waited for"),
    ("hopper.fence_async_shared()", "pass", "fence is missing"),
    ("hopper.fence_async_shared()  # before the matrix unit reads q", "pass", "no fence"),
    ("hopper.mbarrier.init(v_bars.index(b), 1)", "hopper.mbarrier.init(v_bars.index(b), 2)", "for ever"),
    ("hopper.warpgroup_mma_wait(0, deps=[acc0])", "acc0", "used before it was waited for"),
]


@pytest.mark.parametrize(("line", "instead", "words"), MISTAKES)
def test_the_model_sees_what_a_kernel_lacks(
    line: str, instead: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = get_spec("cmp_attn_fwd")
    rendered = render(spec, BASE, gluon_config("cmp_attn_fwd", BASE, num_stages=2))
    assert line in rendered.source
    broken = replace(rendered, source=rendered.source.replace(line, instead), digest=f"{rendered.digest}x{hash(line)}")
    with pytest.raises(AssertionError, match=words):
        check_variant(spec, BASE, modelled(broken, monkeypatch), "cpu")
