"""The paged cache of a trial: lengths, block table and pages, in which all that no sequence holds is NaN."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from ..codegen.shapes import SPARE_PAGES
from ..paged import first_cell, positions_of, stored
from ..spec import Argument, Problem
from .fills import select_at_random

PAGED_FILLS = ("tokens", "cells", "page_scale", "table", "lengths", "counters")
RAGGED_UP_TO = 4096  # tokens: sequences of shorter problems (the accuracy gate's) differ in length
SCALES = (0.5, 1.0, 2.0)  # of fp8 pages


def trial_lengths(problem: Problem, device: torch.device | str) -> Tensor:
    """Tokens of each sequence `[B]` int32: all of them; a short problem has shorter, new and unused ones too."""
    lengths = [problem.seq_k] * problem.batch
    if problem.seq_k <= RAGGED_UP_TO:
        stride, part = problem.nsa.compress_stride, problem.seq_k * 5 // 8
        ragged = (problem.seq_k, part - part % stride, problem.seq_q, 0)  # the second completes a compressed row
        lengths = [ragged[index % len(ragged)] for index in range(problem.batch)]
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def trial_table(problem: Problem, num_pages: int, pages_each: int, seed: int) -> Tensor:
    """A block table `[B, MP]` int32 that hands pages out in random order."""
    order = list(range(num_pages))
    random.Random(f"pages {seed} {num_pages}").shuffle(order)
    return torch.tensor(order[: problem.batch * pages_each], dtype=torch.int32).view(problem.batch, pages_each)


def block_table(problem: Problem, seed: int) -> Tensor:
    """The block table `[B, MP]` of a trial's cache, on the CPU."""
    pages_each = -(-problem.seq_k // problem.page_size)
    return trial_table(problem, problem.batch * pages_each + SPARE_PAGES, pages_each, seed)


def fill_paged(tensor: Tensor, argument: Argument, problem: Problem, generator: torch.Generator, seed: int) -> None:
    """The content of one tensor of the cache; equal for equal seeds."""
    if argument.fill == "counters":
        tensor.zero_()
    elif argument.fill == "lengths":
        tensor.copy_(trial_lengths(problem, tensor.device))
    elif argument.fill == "table":
        tensor.copy_(block_table(problem, seed))
    elif argument.fill == "page_scale":
        picked = torch.randint(len(SCALES), tensor.shape, device=tensor.device, generator=generator)
        tensor.copy_(torch.tensor(SCALES, device=tensor.device)[picked])
    else:
        tensor.fill_(math.nan)
        table = block_table(problem, seed).to(tensor.device)
        rows = tensor.shape[1]
        for index, length in enumerate(trial_lengths(problem, "cpu").tolist()):
            first, stop = 0, length
            if argument.fill == "cells":
                first = first_cell(problem.nsa)
                stop = first + problem.nsa.num_compressed(length)
            place = torch.arange(first, stop, device=tensor.device)
            values = torch.randn((len(place), *tensor.shape[2:]), device=tensor.device, generator=generator)
            flat = table[index].long()[place // rows] * rows + place % rows
            stored(tensor).view(-1, *tensor.shape[2:])[flat] = stored(values.to(tensor.dtype))


def fill_paged_blocks(tensor: Tensor, problem: Problem, generator: torch.Generator) -> None:
    """A valid selection `[B, Q, H, n]` for the last tokens of each sequence."""
    positions = positions_of(trial_lengths(problem, tensor.device), problem.seq_q)
    for index in range(problem.batch):
        mine = positions[index]
        tensor[index] = -1
        exists = mine >= 0
        if exists.any():
            how = (1, problem.num_kv_heads, problem.nsa, problem.locality, generator)
            tensor[index, exists] = select_at_random(mine[exists], *how)[0]
