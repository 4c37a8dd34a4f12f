"""Pages of a paged cache that a launch adds to: drawn without the new rows, and compared whole afterwards.

Rows that hold something are compared as numbers, fp8 ones times their scale; all others, NaN, must keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..paged import FP8, first_cell, stored
from ..spec import Argument, Problem
from .compare import AccuracyReport, compare_floats
from .paged import block_table, fill_paged, trial_lengths

if TYPE_CHECKING:
    from .inputs import TrialInputs

STATE_FILLS = {"state_tokens": "tokens", "state_cells": "cells", "state_scale": "page_scale"}  # and those of full pages
FP8_FILL = 32.0  # spread of fp8 data before its scale
FP8_SCALES = (2.0**-9, 2.0**-7, 2.0**-5)  # the first is too small for new tokens of unit variance


def fill_state(tensor: Tensor, argument: Argument, problem: Problem, generator: torch.Generator, seed: int) -> None:
    """What the tensor holds before the last Q tokens of every sequence come; equal for equal seeds."""
    if argument.fill == "state_scale":
        picked = torch.randint(len(FP8_SCALES), tensor.shape, device=tensor.device, generator=generator)
        tensor.copy_(torch.tensor(FP8_SCALES, device=tensor.device)[picked])
        return
    fp8 = tensor.dtype == FP8
    whole = torch.empty(tensor.shape, device=tensor.device) if fp8 else tensor
    fill_paged(whole, replace(argument, fill=STATE_FILLS[argument.fill]), problem, generator, seed)
    pages, rows = block_table(problem, seed).to(tensor.device), tensor.shape[1]
    for index, (first, stop) in enumerate(_new_rows(argument, problem)):
        place = torch.arange(first, stop, device=tensor.device)
        whole[pages[index].long()[place // rows], place % rows] = math.nan
    if fp8:
        tensor.copy_(whole.mul_(FP8_FILL).to(tensor.dtype))


def _new_rows(argument: Argument, problem: Problem) -> list[tuple[int, int]]:
    """First new row of each sequence, and the one after the last."""
    found = []
    for length in trial_lengths(problem, "cpu").tolist():
        ends = (max(0, length - problem.seq_q), length)
        if argument.fill == "state_cells":
            nsa, shift = problem.nsa, first_cell(problem.nsa)
            ends = (nsa.num_compressed(ends[0]) + shift, nsa.num_compressed(length) + shift)
        found.append(ends)
    return found


def compare_state(
    argument: Argument,
    tensor: Tensor,
    inputs: TrialInputs,
    reference: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
) -> AccuracyReport:
    """Judge a tensor that the launch has added to against the pages' values in `reference` and `baseline`."""
    name, before = argument.name, inputs.before[argument.name]
    if argument.fill == "state_scale":
        idle = reference[name.removesuffix("_scale")].isnan().all(3).all(1)  # [P, H], pages that hold nothing
        return _kept(name, tensor[idle], before[idle])
    exact, base = reference[name], baseline[name]
    held = ~exact.isnan().all(-1)  # [P, ROWS, H]
    report = _kept(name, stored(tensor)[~held], stored(before)[~held])
    if not report.ok:
        return report
    scale = inputs.tensors.get(f"{name}_scale")
    values = tensor if scale is None else tensor.float() * scale[:, None, :, None]
    return compare_floats(name, values[held], exact[held], base[held], has_rows=True)


def _kept(name: str, now: Tensor, before: Tensor) -> AccuracyReport:
    changed = int((now.contiguous().view(torch.uint8) != before.contiguous().view(torch.uint8)).sum())
    if changed:
        reason = f"{name}: the kernel changed {changed} bytes of rows that are not its own."
        return AccuracyReport(False, reason, math.inf, 0.0)
    return AccuracyReport(True, "", 0.0, 0.0)
