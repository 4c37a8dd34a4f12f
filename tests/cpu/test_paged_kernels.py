"""The families of a decode step: right and inside their tensors (in the interpreter), for every structure."""

from __future__ import annotations

import re

import pytest
from cpu.test_kernels import SMALL, SPECS, check, small_tiles, switches

from nsa_autotune.codegen.golden import structural_configs
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.spec import Problem

KERNEL_HEAD = r'def \w+_kernel\([^)]*\):\n(?:    """.*"""\n)?'  # with its docstring
FAMILIES = tuple(family for family, spec in SPECS.items() if spec.layouts == ("paged",))
STEP = Problem(
    batch=3,
    seq_q=2,
    seq_k=100,
    num_q_heads=6,
    num_kv_heads=2,
    d_qk=32,
    d_v=16,
    dtype="float16",
    layout="paged",
    page_size=16,
    locality=0.5,
    nsa=SMALL,
)
CASES = {
    "one_token": STEP.replace(seq_q=1),
    "eight_tokens_g_1": STEP.replace(seq_q=8, num_q_heads=2, seq_k=70),
    "g_16_large_pages": STEP.replace(seq_q=1, num_q_heads=16, num_kv_heads=1, page_size=256),
    "float32_d_192": STEP.replace(dtype="float32", d_qk=192, d_v=128, num_q_heads=2, seq_k=60),
    "fp8": STEP.replace(cache_dtype="float8_e4m3fn", page_size=64),
    "no_overlap_odd_n": STEP.replace(
        nsa=NSAConfig(16, 16, select_block_size=16, num_selected=5, num_local=1, window_size=16)
    ),
    "wide_overlap": STEP.replace(nsa=NSAConfig(32, 8, select_block_size=32, num_selected=6, window_size=33), seq_k=230),
    "one_block": STEP.replace(
        nsa=NSAConfig(8, 4, select_block_size=16, num_selected=1, num_initial=0, num_local=1, window_size=1)
    ),
    "no_compressed_row": STEP.replace(seq_k=7),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_structure_is_right(family: str) -> None:
    spec = SPECS[family]
    found = {switches(spec, config): config for config in structural_configs(spec, STEP)}
    assert found
    for config in found.values():
        check(spec, STEP, small_tiles(spec, STEP, config))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_is_right_on_every_kind_of_step(family: str, case: str) -> None:
    spec, problem = SPECS[family], CASES[case]
    check(spec, problem, small_tiles(spec, problem, spec.default_config(problem)))


def test_many_splits_are_joined() -> None:
    """More splits than are joined at once, and more tiles than a split has."""
    problem = STEP.replace(batch=1, seq_q=1, seq_k=600, nsa=NSAConfig(4, 2, 16, 4, 1, 2, 100), page_size=16)
    spec = SPECS["cmp_decode_fwd"]
    for finish in ("ticket", "kernel"):
        config = {**spec.default_config(problem), "BLOCK_N": 16, "SPLIT": 64, "BLOCK_S": 4, "finish": finish}
        check(spec, problem, config)
    spec = SPECS["slc_win_decode_fwd"]
    for finish in ("ticket", "kernel"):
        config = {**spec.default_config(problem), "BLOCK_N": 16, "SLC_SPLITS": 4, "WIN_SPLITS": 8, "finish": finish}
        check(spec, problem, config)


@pytest.mark.parametrize("num_selected", [3, 16], ids=["odd_n", "many_chunks"])
@pytest.mark.parametrize("finish", ["ticket", "kernel"])
def test_the_best_of_several_chunks_are_selected(finish: str, num_selected: int) -> None:
    """Five chunks of blocks, of which n = 16 leaves more candidates than are ranked at once, and two new tokens."""
    nsa = NSAConfig(8, 4, 16, num_selected=num_selected, num_local=2, window_size=20)
    problem = STEP.replace(seq_k=1100, nsa=nsa)
    spec = SPECS["cmp_decode_fwd"]
    top = {"BLOCK_TOP": 64} if finish == "kernel" else {}
    config = {**spec.default_config(problem), "BLOCK_N": 32, "SPLIT": 64, "BLOCK_J": 16, "finish": finish, **top}
    check(spec, problem, config)


TWO_TILES = NSAConfig(16, 8, select_block_size=32, num_selected=5, num_local=1, window_size=37)  # tiles of 16 a block
CARRIED = {  # and whether kv heads come first; all combinations of switches are met by STEP's structures
    "small_pages": (STEP.replace(nsa=TWO_TILES, seq_k=150), True),
    "large_pages_fp8": (STEP.replace(nsa=TWO_TILES, seq_k=150, page_size=64, cache_dtype="float8_e4m3fn"), False),
    "d_v_192": (STEP.replace(nsa=TWO_TILES, seq_q=1, batch=2, num_q_heads=2, d_qk=48, d_v=192, seq_k=120), True),
    "no_compressed_row": (CASES["no_compressed_row"], True),
    "one_block": (CASES["one_block"], False),
}


@pytest.mark.parametrize("case", CARRIED)
def test_the_carried_pages_are_those_of_the_next_tile(case: str) -> None:
    """Shares of several tiles, the last of them short: of three blocks that are two, and of a window's 37 keys."""
    problem, heads_first = CARRIED[case]
    how = {
        "carry_page": True,
        "heads_first": heads_first,
        "BLOCK_N": 16,
        "finish": "kernel" if heads_first else "ticket",
    }
    spec = SPECS["cmp_decode_fwd"]
    check(spec, problem, {**spec.default_config(problem), **how, "SPLIT": 64})
    spec = SPECS["slc_win_decode_fwd"]
    splits = {"SLC_SPLITS": min(2, problem.nsa.num_selected), "WIN_SPLITS": 2}
    check(spec, problem, {**spec.default_config(problem), **how, **splits})


@pytest.mark.parametrize("family", ["cmp_decode_fwd", "slc_win_decode_fwd"])
def test_kv_heads_that_share_pages_start_side_by_side(family: str) -> None:
    """The first axis of a grid runs fastest."""
    spec = SPECS[family]
    for first, begins in ((False, 0), (True, 2)):
        config = {**spec.default_config(STEP), "heads_first": first, "finish": "kernel"}
        assert render(spec, STEP, config).source.count("grid=(num_heads, ") == begins
    alone = STEP.replace(num_kv_heads=1)
    assert "heads_first" in (spec.broken_constraint(alone, {**spec.default_config(alone), "heads_first": True}) or "")


@pytest.mark.parametrize("finish", ["ticket", "kernel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_that_starts_early_waits_first(family: str, finish: str) -> None:
    """One that did not wait could end before what it depends on has, and let its own successor go."""
    spec = SPECS[family]
    late = spec.default_config(STEP)
    late |= {"finish": finish} if "finish" in late else {}
    source = render(spec, STEP, {**late, "launch_pdl": True}).source
    bodies = re.split(KERNEL_HEAD, source)[1:]
    assert len(bodies) == source.count("_kernel.run(") >= 1
    assert source.count("        **OPTIONS,\n") + source.count("        launch_pdl=True,\n") == len(bodies)
    for body in bodies:
        assert body.startswith("    if COMPILED:\n        gdc_launch_dependents()\n        gdc_wait()\n")
    assert "gdc" not in render(spec, STEP, late).source


def test_the_second_kernel_has_warps_of_its_own() -> None:
    spec = SPECS["cmp_decode_fwd"]
    config = {**spec.default_config(STEP), "finish": "kernel", "finish_warps": 8, "num_warps": 2}
    source = render(spec, STEP, config).source
    assert source.count("num_warps=8,") == 1 and '"num_warps": 2,' in source
    new = ("finish_warps", "carry_page", "heads_first")
    assert spec.completed({name: value for name, value in config.items() if name not in new}) == {
        **config,
        "finish_warps": 4,
    }
    assert "finish_warps" in (spec.broken_constraint(STEP, {**config, "finish": "ticket"}) or "")
