"""Pages that a launch adds to: what a trial holds before it, and which mistakes the accuracy gate finds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.bench.inputs import TrialInputs, make_inputs
from nsa_autotune.bench.paged import trial_lengths
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

PROBLEM = Problem(
    batch=4,
    seq_q=3,
    seq_k=40,
    num_q_heads=2,
    num_kv_heads=2,
    d_qk=32,
    d_v=16,
    dtype="float16",
    layout="paged",
    page_size=16,
    cache_dtype="float8_e4m3fn",
    nsa=NSAConfig(8, 4, 16, 4, 1, 2, 20),
)
FAMILY = "cmp_pool_append_fwd"
Launch = Callable[..., Any]


def launch_of(problem: Problem) -> Launch:
    """The default variant."""
    spec = get_spec(FAMILY)
    launch: Launch = load(render(spec, problem, spec.default_config(problem))).launch
    return launch


def held(pages: Tensor) -> Tensor:
    """Rows `[P, ROWS]` that hold something."""
    return ~pages.float().isnan().all(-1).all(-1)


@pytest.mark.parametrize("cache", ["problem", "float8_e4m3fn"])
def test_a_trial_holds_all_rows_but_the_new_ones(cache: str) -> None:
    problem = PROBLEM.replace(cache_dtype=cache)
    inputs = make_inputs(get_spec(FAMILY), problem, "cpu", seed=1)
    same = make_inputs(get_spec(FAMILY), problem, "cpu", seed=1)
    lengths, nsa = trial_lengths(problem, "cpu").tolist(), problem.nsa
    old = [max(0, length - problem.seq_q) for length in lengths]
    for name, count in (("k", sum(old)), ("v_cmp", sum(map(nsa.num_compressed, old)))):
        pages, again, before = inputs.tensors[name], same.tensors[name], inputs.before[name]
        assert pages is not None and again is not None
        assert int(held(pages).sum()) == count > 0
        assert torch.equal(pages.view(torch.uint8), again.view(torch.uint8))
        assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8)) and pages.data_ptr() != before.data_ptr()
    assert (inputs.tensors["k_scale"] is None) == (cache == "problem")
    assert any(nsa.num_compressed(a) < nsa.num_compressed(b) for a, b in zip(old, lengths, strict=True))


def test_new_tokens_make_some_scale_grow_in_the_middle_of_a_page() -> None:
    inputs = make_inputs(get_spec(FAMILY), PROBLEM, "cpu")
    inputs.call(launch_of(PROBLEM))
    scale, data = inputs.tensors["k_scale"], inputs.tensors["k"]
    assert scale is not None and data is not None
    had_rows = held(inputs.before["k"]).any(1)
    assert bool((scale > inputs.before["k_scale"])[had_rows].any())
    assert bool((scale == inputs.before["k_scale"])[had_rows].any())


@pytest.mark.parametrize("cache", ["problem", "float8_e4m3fn"])
def test_a_right_kernel_passes_every_time(cache: str) -> None:
    problem = PROBLEM.replace(cache_dtype=cache)
    launch = launch_of(problem)
    for _ in range(2):
        report = check_variant(get_spec(FAMILY), problem, launch, "cpu")
        assert report.ok, report.reason


def empty_row(pages: Tensor) -> tuple[int, int]:
    """A page and row that hold nothing, in a page with rows."""
    rows = held(pages)
    page, row = (rows.any(1)[:, None] & ~rows).nonzero()[-1].tolist()
    return page, row


def write_beside(tensors: dict[str, Any]) -> None:
    """One element of a row that is nobody's."""
    page, row = empty_row(tensors["k"])
    tensors["k"].view(torch.uint8)[page, row, 0, 0] = 1


def spoil_a_row(tensors: dict[str, Any]) -> None:
    """A token that was there before."""
    page = int(tensors["table"][0, 0])
    tensors["v"].view(torch.uint8)[page, 2, 1] ^= 0x80


def forget_to_rescale(tensors: dict[str, Any]) -> None:
    """A page's scale alone."""
    tensors["k_scale"][int(tensors["table"][0, 0])] *= 2


def touch_an_idle_scale(tensors: dict[str, Any]) -> None:
    """The scale of a page that nobody has."""
    idle = set(range(len(tensors["k"]))) - set(tensors["table"].flatten().tolist())
    tensors["k_scale"][min(idle)] = 7.0


def lose_a_row(tensors: dict[str, Any]) -> None:
    """The last compressed row of the longest sequence is not written."""
    last = tensors["v_cmp"]
    before = PROBLEM.nsa.num_compressed(int(tensors["lengths"][0]))
    cell = before - 1 + PROBLEM.nsa.compress_block_size // PROBLEM.nsa.compress_stride - 1
    last[int(tensors["table"][0, cell // last.shape[1]]), cell % last.shape[1]] = float("nan")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (write_beside, "k: the kernel changed 1 bytes of rows that are not its own"),
        (spoil_a_row, "v: max error"),
        (forget_to_rescale, "k: max error"),
        (touch_an_idle_scale, "k_scale: the kernel changed"),
        (lose_a_row, "v_cmp: .* NaN or was never written"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__,
)
def test_the_gate_finds_a_mistake(mistake: Callable[[dict[str, Any]], None], words: str) -> None:
    launch = launch_of(PROBLEM)

    def wrong(**tensors: Any) -> Any:
        done = launch(**tensors)
        mistake(tensors)
        return done

    report = check_variant(get_spec(FAMILY), PROBLEM, wrong, "cpu")
    assert not report.ok
    assert re.search(words, report.reason), report.reason


def test_nothing_done_is_found() -> None:
    report = check_variant(get_spec(FAMILY), PROBLEM, lambda **tensors: None, "cpu")
    assert not report.ok and "never written" in report.reason


def test_inputs_without_state_keep_nothing_twice() -> None:
    inputs: TrialInputs = make_inputs(get_spec("cmp_decode_fwd"), PROBLEM.replace(num_q_heads=4), "cpu")
    assert inputs.before == {}
