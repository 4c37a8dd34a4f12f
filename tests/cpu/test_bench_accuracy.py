"""The gate lets right kernels pass and names what is wrong with the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu.bench_fakes import NSA, PACKED, POOL, SELECT, SMALL, WINDOW, Kernel

from nsa_autotune import reference
from nsa_autotune.bench.accuracy import check_rows, check_variant, gate_problem, prepare_gate, run_cases
from nsa_autotune.bench.compare import compare_blocks, compare_floats
from nsa_autotune.bench.inputs import make_layout
from nsa_autotune.bench.parts import sample_rows
from nsa_autotune.config import NSAConfig
from nsa_autotune.spec import Problem

CPU = torch.device("cpu")
LONG = SMALL.replace(batch=3, seq_q=300, seq_k=300, dtype="float32")
LONG_PACKED = LONG.replace(batch=4, layout="packed", seq_q=500, seq_k=500)


def kernel(spec: Any, problem: Problem, fault: str = "right") -> Kernel:
    """A fake launch for a problem."""
    layout = make_layout(problem, CPU, 0) if problem.layout == "packed" else None
    return Kernel(spec, problem, fault, layout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("problem", [SMALL, SMALL.replace(seq_q=7), PACKED], ids=["batched", "short_q", "packed"])
@pytest.mark.parametrize("spec", [WINDOW, SELECT, POOL], ids=lambda spec: spec.family)
def test_a_right_kernel_passes(spec: Any, problem: Problem, dtype: str) -> None:
    problem = problem.replace(dtype=dtype)
    report = check_variant(spec, problem, kernel(spec, problem), CPU)
    assert report.ok, report.reason
    assert 0 <= report.max_error < 0.05 and math.isfinite(report.baseline_error)


@pytest.mark.parametrize(
    ("spec", "fault", "words"),
    [
        (WINDOW, "nan", "o: 1 of 4032 values wrong; [1, 62, 3, 7] is NaN or was never written"),
        (WINDOW, "row", "o: max error"),
        (WINDOW, "scale", "o: "),
        (WINDOW, "lse_inf", "lse: 1 of 504 values wrong; [0, 0, 0] is infinite where the reference is not"),
        (WINDOW, "stray", "o: the kernel wrote outside of the tensor."),
        (WINDOW, "input", "k: the kernel overwrote an input."),
        (SELECT, "tie", "of equal scores the lower index must win"),
        (SELECT, "order", "is followed by a block that is not greater"),
        (SELECT, "future", "is unused, negative or in the future"),
        (SELECT, "greedy", "blocks: lost importance"),
    ],
    ids=lambda value: value.replace(" ", "_")[:20] if isinstance(value, str) else value.family,
)
def test_a_wrong_kernel_is_caught_and_named(spec: Any, fault: str, words: str) -> None:
    report = check_variant(spec, SMALL, kernel(spec, SMALL, fault), CPU)
    assert not report.ok
    assert words in report.reason


def test_output_that_is_left_alone_is_caught_for_any_poison() -> None:
    report = check_variant(SELECT, SMALL, lambda **_: None, CPU)
    assert not report.ok and "blocks" in report.reason


def test_a_bad_variant_does_not_spoil_the_inputs_of_the_next() -> None:
    cases = prepare_gate(WINDOW, SMALL, CPU)
    assert not run_cases(cases, kernel(WINDOW, SMALL, "input")).ok
    assert run_cases(cases, kernel(WINDOW, SMALL)).ok


def test_a_small_wrong_row_does_not_hide_behind_large_ones() -> None:
    exact = torch.randn(64, 32)
    exact[1:] *= 1e-3
    base = exact.bfloat16().float()
    wrong = base.clone()
    wrong[40] = base[41]
    assert compare_floats("o", base.bfloat16(), exact, base, has_rows=True).ok
    assert compare_floats("o", wrong.bfloat16(), exact, base).ok  # by the whole output alone it would pass
    report = compare_floats("o", wrong.bfloat16(), exact, base, has_rows=True)
    assert not report.ok and "[40, " in report.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_rounded_reference_passes_even_if_the_baseline_is_exact(dtype: torch.dtype) -> None:
    exact = torch.randn(100, 64, dtype=torch.float64)
    report = compare_floats("o", exact.to(dtype), exact, exact, has_rows=True)
    assert report.ok and report.max_error > 0
    assert not compare_floats("o", (exact * 1.03).to(dtype), exact, exact).ok


def test_errors_are_bounded_by_twice_the_baseline() -> None:
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64).view(10, 100)
    base = exact + 0.01
    assert compare_floats("o", (exact + 0.019).float(), exact, base).ok
    report = compare_floats("o", (exact + 0.021).float(), exact, base)
    assert not report.ok
    assert report.max_error == pytest.approx(0.021, rel=1e-3) and report.baseline_error == pytest.approx(0.01)


def test_a_bias_below_the_maximum_fails_by_its_rms() -> None:
    exact = torch.zeros(1000, dtype=torch.float64) + 1.0
    base = exact.clone()
    base[0] += 0.01
    report = compare_floats("o", (exact + 0.01).float(), exact, base)
    assert not report.ok and "RMS" in report.reason


def test_infinities_must_coincide() -> None:
    exact = torch.tensor([-math.inf, 1.0])
    assert compare_floats("lse", exact.clone(), exact, exact).ok
    assert not compare_floats("lse", torch.tensor([0.0, 1.0]), exact, exact).ok
    assert not compare_floats("lse", torch.tensor([math.inf, 1.0]), exact, exact).ok


def test_a_wrong_shape_is_told() -> None:
    assert "shape (2,)" in compare_floats("o", torch.ones(2), torch.ones(3), torch.ones(3)).reason


class TestBlocks:
    """One token of block 9: 0 initial, 8 and 9 local, two free slots; scores fall with the index, 2 and 3 tie."""

    positions = torch.tensor([38])
    scores = torch.tensor([9.0, 5.0, 4.0, 4.0, 3.0, 2.0, 1.0, 1.0, 9.0, 9.0], dtype=torch.float64).view(1, 1, 10)

    def judge(self, blocks: list[int], scores: torch.Tensor | None = None, dtype: str = "bfloat16") -> Any:
        """The report on one row."""
        scores = self.scores if scores is None else scores
        rows = torch.tensor(blocks, dtype=torch.int32).view(1, 1, -1)
        return compare_blocks(rows, scores, self.scores.float(), self.positions, NSA, dtype)

    def test_the_best_pass(self) -> None:
        assert self.judge([0, 1, 2, 8, 9]).ok

    @pytest.mark.parametrize(
        ("blocks", "words"),
        [
            ([0, 1, 3, 8, 9], "lower index"),
            ([0, 1, 4, 8, 9], "lost importance 0.111"),
            ([0, 2, 1, 8, 9], "not greater"),
            ([0, 1, 1, 8, 9], "not greater"),
            ([1, 2, 3, 8, 9], "lacks a forced block"),
            ([0, 1, 2, 3, 9], "lacks a forced block"),
            ([0, 1, 8, 9, -1], "is unused"),
            ([0, 1, 8, 9, 10], "in the future"),
        ],
        ids=["tie", "worse", "order", "twice", "no_initial", "no_local", "too_few", "future"],
    )
    def test_others_fail(self, blocks: list[int], words: str) -> None:
        report = self.judge(blocks)
        assert not report.ok and words in report.reason

    @pytest.mark.parametrize(("dtype", "ok"), [("bfloat16", True), ("float32", False)])
    def test_sets_may_differ_only_where_scores_are_near(self, dtype: str, ok: bool) -> None:
        near = self.scores.clone()
        near[..., 3] = 4.0 * (1 - 1e-4)
        lenient = near.clone()
        lenient[..., 3], lenient[..., 2] = 5.0, 1.0  # the baseline itself errs here, so the regret is allowed
        rows = torch.tensor([0, 1, 3, 8, 9], dtype=torch.int32).view(1, 1, -1)
        assert compare_blocks(rows, near, lenient, self.positions, NSA, dtype).ok is ok

    def test_unused_slots(self) -> None:
        scores, position = torch.zeros(1, 1, 1, dtype=torch.float64), torch.tensor([2])
        good, bad = torch.tensor([[[0, -1, -1, -1, -1]]]), torch.tensor([[[0, 0, -1, -1, -1]]])
        assert compare_blocks(good, scores, scores, position, NSA, "float16").ok
        assert "is not -1" in compare_blocks(bad, scores, scores, position, NSA, "float16").reason


@pytest.mark.parametrize("problem", [LONG, LONG_PACKED], ids=["batched", "packed"])
@pytest.mark.parametrize("spec", [WINDOW, SELECT, POOL], ids=lambda spec: spec.family)
def test_rows_of_a_long_problem(spec: Any, problem: Problem) -> None:
    report = check_rows(spec, problem, kernel(spec, problem), CPU)
    assert report.ok, report.reason


@pytest.mark.parametrize(
    ("spec", "problem", "fault"),
    [
        (WINDOW, LONG, "row"),
        (WINDOW, LONG_PACKED, "row"),
        (WINDOW, LONG, "nan"),
        (SELECT, LONG, "order"),
        (POOL, LONG, "row"),
        (POOL, LONG, "nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "family", getattr(value, "layout", "")),
)
def test_an_error_in_the_last_row_of_a_long_problem_is_caught(spec: Any, problem: Problem, fault: str) -> None:
    report = check_rows(spec, problem, kernel(spec, problem, fault), CPU)
    assert not report.ok
    last = "compressed rows from 141 on of batch 2" if spec is POOL else "299] of batch 2"
    assert problem.layout == "packed" or f"{last}." in report.reason


@pytest.mark.parametrize(("total", "count"), [(1, 8), (8, 8), (9, 8), (65_536, 16)])
def test_sampled_rows_hold_both_ends(total: int, count: int) -> None:
    rows = sample_rows(total, count, seed=0)
    assert rows == sorted(set(rows)) and len(rows) == min(total, count)
    assert rows[0] == 0 and rows[-1] == total - 1


@pytest.mark.parametrize(
    ("problem", "batch", "seq_q", "seq_k"),
    [
        (Problem(batch=8, seq_q=65_536, seq_k=65_536), 2, 1543, 1543),
        (Problem(batch=1, seq_q=8192, seq_k=65_536), 1, 771, 1543),
        (Problem(batch=4, seq_q=1, seq_k=65_536), 2, 1, 1543),
        (Problem(batch=1, seq_q=100, seq_k=700), 1, 100, 700),
        (Problem(batch=64, seq_q=65_536, seq_k=65_536, layout="packed"), 4, 3086, 3086),
        (SMALL, 2, 63, 63),
    ],
    ids=["long", "chunk", "decode", "small", "packed", "tiny"],
)
def test_gate_problem_is_small_and_otherwise_equal(problem: Problem, batch: int, seq_q: int, seq_k: int) -> None:
    small = gate_problem(problem)
    assert (small.batch, small.seq_q, small.seq_k) == (batch, seq_q, seq_k)
    assert small.replace(batch=problem.batch, seq_q=problem.seq_q, seq_k=problem.seq_k) == problem


def test_gate_of_the_default_constants_leaves_blocks_out() -> None:
    config = NSAConfig()
    tokens = gate_problem(Problem(nsa=config)).seq_k
    assert config.num_select_blocks(tokens) >= config.num_selected + 8


def test_reference_agrees_with_itself_on_sampled_positions() -> None:
    q, k, v = torch.randn(1, 63, 4, 16), torch.randn(1, 63, 2, 16), torch.randn(1, 63, 2, 8)
    rows = torch.tensor([0, 17, 62])
    o, _ = reference.window_attention(q, k, v, NSA)
    part, _ = reference.window_attention(q[:, rows], k, v, NSA, positions=rows)
    torch.testing.assert_close(part, o[:, rows])
