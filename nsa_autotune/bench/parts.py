"""Pieces of a trial small enough for the reference: the whole of a small problem, or sampled rows of a long one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..spec import Argument, KernelSpec, Problem
from .inputs import INDEX_FILLS, TrialInputs, query_positions

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Part:
    """A problem for the reference, and how its tensors are cut from those of the launch."""

    problem: Problem
    layout: PackedLayout | None
    positions: Tensor  # [TQ] of the part's queries among its keys
    cut: Callable[[Argument, Tensor], Tensor]
    where: str = ""  # what its coordinates count, for people

    def given(self, spec: KernelSpec, inputs: TrialInputs) -> dict[str, Tensor]:
        """The input tensors of the part by argument name, without index tensors."""
        chosen: dict[str, Tensor] = {}
        for argument in spec.arguments:
            tensor = inputs.tensors[argument.name]
            if tensor is not None and not argument.is_output and argument.fill not in INDEX_FILLS:
                chosen[argument.name] = self.cut(argument, tensor)
        return chosen


@dataclass(frozen=True)
class _Sequence:
    """Where one sequence lies: `batch` indexes a batched tensor and is None in a packed one."""

    batch: int | None
    q: int
    len_q: int
    k: int
    len_k: int
    cmp: int

    def part(
        self, problem: Problem, rows: Mapping[str, slice | Tensor], tokens: int, positions: Tensor, where: str
    ) -> Part:
        """The batch of one that `rows` (by first symbol of a shape) cut out."""

        def cut(argument: Argument, tensor: Tensor) -> Tensor:
            side = str(argument.shape[0]) if argument.shape else ""
            if side not in rows:
                return tensor
            return (tensor if self.batch is None else tensor[self.batch])[rows[side]][None]

        seq_q = min(max(positions.numel(), 1), tokens)
        small = problem.replace(batch=1, layout="batched", seq_q=seq_q, seq_k=tokens)
        place = f"batch {self.batch}" if self.batch is not None else f"the sequence at token {self.k}"
        return Part(small, None, positions, cut, f" Coordinates count {where} of {place}.")


def whole(problem: Problem, inputs: TrialInputs, device: torch.device) -> Part:
    """The problem itself."""
    return Part(problem, inputs.layout, query_positions(problem, inputs.layout, device), lambda _, tensor: tensor)


def sampled(
    spec: KernelSpec, problem: Problem, inputs: TrialInputs, device: torch.device, rows: int, seed: int
) -> list[Part]:
    """About `rows` rows of a long problem: the first, the last and random ones of up to three sequences."""
    sides = {argument.shape[0] for argument in spec.arguments if argument.shape}
    chosen = _chosen(list(_sequences(problem, inputs.layout)))
    share = max(4, rows // max(1, len(chosen)))
    parts: list[Part] = []
    for number, sequence in enumerate(chosen):
        if "Q" in sides:
            picked = sample_rows(sequence.len_q, share, seed + number)
            parts.extend(_query_rows(problem, sequence, picked, device))
        else:
            parts.extend(_compressed_rows(problem, sequence, share // 2, device))
    return parts


def sample_rows(total: int, count: int, seed: int) -> list[int]:
    """At most `count` rows of `total`, ascending: 0, 1, the last two and random ones."""
    if total <= count:
        return list(range(total))
    edges = {0, 1, total - 2, total - 1}
    free = random.Random(f"rows {seed} {total}").sample(range(2, total - 2), max(0, count - len(edges)))
    return sorted(edges | set(free))


def _sequences(problem: Problem, layout: PackedLayout | None) -> Iterator[_Sequence]:
    if layout is None:
        for index in range(problem.batch):
            yield _Sequence(index, 0, problem.seq_q, 0, problem.seq_k, 0)
        return
    offsets = torch.stack([layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cmp_offsets]).T.tolist()
    for (q, k, cmp), (q_stop, k_stop, _) in itertools.pairwise(offsets):
        if q_stop > q:
            yield _Sequence(None, q, q_stop - q, k, k_stop - k, cmp)


def _chosen(sequences: list[_Sequence]) -> list[_Sequence]:
    """The first, the longest and the last."""
    if not sequences:
        return []
    longest = max(range(len(sequences)), key=lambda i: sequences[i].len_k)
    return [sequences[i] for i in sorted({0, longest, len(sequences) - 1})]


def _query_rows(problem: Problem, sequence: _Sequence, picked: list[int], device: torch.device) -> Iterator[Part]:
    num_cmp = problem.nsa.num_compressed(sequence.len_k)
    for start in range(0, len(picked), ROWS_AT_ONCE):
        index = torch.tensor(picked[start : start + ROWS_AT_ONCE], device=device)
        rows: dict[str, slice | Tensor] = {
            "Q": index + sequence.q,
            "K": slice(sequence.k, sequence.k + sequence.len_k),
            "C": slice(sequence.cmp, sequence.cmp + num_cmp),
        }
        positions = index + (sequence.len_k - sequence.len_q)
        yield sequence.part(problem, rows, sequence.len_k, positions, f"queries at positions {positions.tolist()}")


def _compressed_rows(problem: Problem, sequence: _Sequence, count: int, device: torch.device) -> Iterator[Part]:
    """The first and the last compressed rows, with just the tokens under them."""
    nsa = problem.nsa
    num_cmp = nsa.num_compressed(sequence.len_k)
    count = min(num_cmp, count)
    for first in sorted({0, num_cmp - count}) if count else ():
        token = sequence.k + first * nsa.compress_stride
        tokens = (count - 1) * nsa.compress_stride + nsa.compress_block_size
        rows = {
            "K": slice(token, token + tokens),
            "C": slice(sequence.cmp + first, sequence.cmp + first + count),
        }
        where = f"compressed rows from {first} on"
        yield sequence.part(problem, rows, tokens, torch.arange(tokens, device=device), where)
