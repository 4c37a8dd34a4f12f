"""The one tolerance policy: a kernel may err twice as much as PyTorch computing the same in the kernel's dtype.

Floats are compared over a whole output and again row by row, each row brought to unit size, because rows that average
thousands of values are small and would hide behind the large ones. Selections are compared by the importance they lose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import NSAConfig
from ..reference import select_from_importance

FACTOR = 2.0
ACCUMULATION_FLOOR = 1e-5  # float32 sums in another order and exp2 instead of exp, relative to the largest value
ROW_FLOOR = 1e-3  # rows smaller than this share of the output's RMS are compared at that size
REGRET_FLOOR = 1e-6
TINY_SCORE = 1e-30  # below it float32 and float64 need not agree on order


@dataclass(frozen=True)
class AccuracyReport:
    """Verdict on a variant: a sentence with numbers, its largest error, and that of PyTorch in the same dtype."""

    ok: bool
    reason: str
    max_error: float
    baseline_error: float


def relative_floor(dtype: torch.dtype) -> float:
    """Error that a perfect kernel may show: half a unit in the last place of its output, or of float32 accumulation."""
    return max(torch.finfo(dtype).eps / 2, ACCUMULATION_FLOOR)


def compare_floats(
    name: str, out: Tensor, reference: Tensor, baseline: Tensor, *, has_rows: bool = False
) -> AccuracyReport:
    """Judge a float output against `reference` (float32 or wider); `has_rows`: the last dimension is one vector."""
    if out.shape != reference.shape:
        return _failed(f"{name}: shape {tuple(out.shape)} instead of {tuple(reference.shape)}.")
    if reference.numel() == 0:
        return AccuracyReport(True, "", 0.0, 0.0)
    exact, got, base = reference, out.to(reference.dtype), baseline.to(reference.dtype)
    for bad, what in (
        (got.isnan(), "is NaN or was never written"),
        (got.isinf() & (got != exact), "is infinite where the reference is not"),
        (exact.isinf() & (got != exact), "is finite where the reference is infinite"),
    ):
        if bad.any():
            return _failed(f"{name}: {int(bad.sum())} of {bad.numel()} values wrong; {_first(bad)} {what}.")
    finite = exact.isfinite()
    exact = exact.masked_fill(~finite, 0.0)
    error, base_error = ((x - exact).masked_fill(~finite, 0.0).abs() for x in (got, base))
    floor = relative_floor(out.dtype)
    report = _within(f"{name}: max error", error, base_error, floor * float(exact.abs().max()))
    if report.ok and has_rows:
        size = exact.square().mean(-1, keepdim=True).sqrt()
        size = size.clamp(min=max(ROW_FLOOR * _rms(exact), torch.finfo(exact.dtype).tiny))
        row_floor = floor * float((exact.abs() / size).max())
        rows = _within(f"{name}: max error over the RMS of its row", error / size, base_error / size, row_floor)
        report = report if rows.ok else rows
    rms, base_rms = _rms(error), _rms(base_error)
    if report.ok and rms > FACTOR * base_rms + floor * _rms(exact):
        reason = f"{name}: RMS error {rms:.3g} exceeds {FACTOR:g} x {base_rms:.3g} + {floor * _rms(exact):.3g}."
        report = AccuracyReport(False, reason, report.max_error, report.baseline_error)
    return report


def compare_blocks(
    blocks: Tensor, scores: Tensor, base_scores: Tensor, positions: Tensor, config: NSAConfig, dtype: str
) -> AccuracyReport:
    """Judge a selection `[.., TQ, H, n]` by float64 `scores` `[.., TQ, H, NB]` and those in the problem's dtype.

    Structure first; then score regret; then equal sets where the n-th and the next best score differ clearly, and the
    lower index where they are exactly equal.
    """
    own = positions.long().div(config.select_block_size, rounding_mode="floor")[:, None, None]  # [TQ, 1, 1]
    if (reason := _structure_fault(blocks, own, config)) is not None:
        return _failed(f"blocks: {reason}")
    if blocks.numel() == 0:
        return AccuracyReport(True, "", 0.0, 0.0)
    chosen = membership(blocks, scores.shape[-1])
    best = membership(select_from_importance(scores, config, positions), scores.shape[-1])
    base = membership(select_from_importance(base_scores, config, positions), scores.shape[-1])
    index = torch.arange(scores.shape[-1], device=scores.device)
    free = (index >= config.num_initial) & (index <= own - config.num_local)
    score = scores.masked_fill(~free, 0.0)
    total = (score * best).sum(-1)
    lost, base_lost = ((total - (score * sets).sum(-1)).clamp(min=0.0) for sets in (chosen, base))
    regret, base_regret = (x / total.clamp(min=TINY_SCORE) for x in (lost, base_lost))
    report = _within("blocks: lost importance", regret, base_regret, REGRET_FLOOR)
    if not report.ok:
        return report
    worst = score.masked_fill(~(best & free), math.inf).amin(-1, keepdim=True)  # the n-th best
    left = (free & ~best).any(-1, keepdim=True)
    next_best = score.masked_fill(~(free & ~best), -math.inf).amax(-1, keepdim=True)
    margin = 1e-5 if dtype == "float32" else 1e-3
    clear = left & (worst > TINY_SCORE) & (worst - next_best > margin * worst)
    wrong = (clear & (chosen != best)).any(-1)
    if wrong.any():
        reason = f"another set than the reference, though its scores differ by more than {margin:g}, at {_first(wrong)}"
        return AccuracyReport(False, f"blocks: {reason}.", report.max_error, report.baseline_error)
    tied = free & (score == worst) & left & (next_best == worst)
    passed_over = (tied & ~chosen).cumsum(-1) > 0
    wrong = (tied & chosen & passed_over).any(-1)
    if wrong.any():
        reason = f"of equal scores the lower index must win, at {_first(wrong)}"
        return AccuracyReport(False, f"blocks: {reason}.", report.max_error, report.baseline_error)
    return report


def membership(blocks: Tensor, num_blocks: int) -> Tensor:
    """Which blocks each row chose: bool `[.., NB]`."""
    chosen = torch.zeros(*blocks.shape[:-1], num_blocks + 1, dtype=torch.bool, device=blocks.device)
    index = blocks.long()
    chosen.scatter_(-1, index.masked_fill(index < 0, num_blocks), True)  # the last column takes the unused slots
    return chosen[..., :num_blocks]


def _structure_fault(blocks: Tensor, own: Tensor, config: NSAConfig) -> str | None:
    count = (own + 1).clamp(0, config.num_selected)
    used = torch.arange(config.num_selected, device=blocks.device) < count
    forced = [(blocks == j).any(-1, keepdim=True) | (own < j) for j in range(config.num_initial)]
    local = [(blocks == own - j).any(-1, keepdim=True) | (own < j) for j in range(config.num_local)]
    pairs = used[..., 1:].expand_as(blocks[..., 1:])
    for bad, what in (
        (~used & (blocks != -1), "is not -1, though the row's blocks are used up"),
        (used & ((blocks < 0) | (blocks > own)), "is unused, negative or in the future"),
        (pairs & (blocks[..., 1:] <= blocks[..., :-1]), "is followed by a block that is not greater"),
        (~torch.stack(forced + local).all(0), "lacks a forced block"),
    ):
        if bad.any():
            where = _first(bad)
            return f"{int(bad.sum())} places are wrong; {where} {what}."
    return None


def _within(what: str, error: Tensor, base_error: Tensor, floor: float) -> AccuracyReport:
    worst, base = float(error.max()), float(base_error.max())
    bound = FACTOR * base + floor
    if worst <= bound:
        return AccuracyReport(True, "", worst, base)
    count, where = int((error > bound).sum()), _first(error == error.max())
    reason = (
        f"{what} {worst:.3g} at {where} exceeds {FACTOR:g} x {base:.3g} (PyTorch in its dtype) + {floor:.3g}; "
        f"{count} of {error.numel()} values do, first {_first(error > bound)}."
    )
    return AccuracyReport(False, reason, worst, base)


def _failed(reason: str) -> AccuracyReport:
    return AccuracyReport(False, reason, math.inf, 0.0)


def _first(bad: Tensor) -> str:
    """Coordinate of the first true element."""
    flat = int(bad.flatten().to(torch.uint8).argmax())
    return str([int(i) for i in torch.unravel_index(torch.tensor(flat), bad.shape)])


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
