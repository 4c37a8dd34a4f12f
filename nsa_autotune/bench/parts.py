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
from .inputs import INDEX_FILLS, TrialInputs, empty_guarded, fill_unused, query_positions

ROWS_AT_ONCE = 16
COTANGENTS = ("do", "delta", "dout")  # inputs in which a backward is linear: without them every gradient is zero


@dataclass(frozen=True)
class Part:
    """A problem for the reference, and how its tensors are cut from those of the launch."""

    problem: Problem
    layout: PackedLayout | None
    positions: Tensor  # [TQ] of the part's queries among its keys
    cut: Callable[[Argument, Tensor], Tensor]
    where: str = ""  # what its coordinates count, for people

    def given(self, spec: KernelSpec, inputs: TrialInputs) -> dict[str, Tensor]:
        """The input tensors of the part by argument name, and what a launch adds to; without index tensors."""
        chosen: dict[str, Tensor] = {}
        for argument in spec.arguments:
            tensor = inputs.tensors[argument.name]
            if tensor is None or argument.fill in INDEX_FILLS:
                continue
            if argument.is_state:
                chosen[argument.name] = inputs.before[argument.name]
            elif not argument.is_output:
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


Kept = list[tuple[int | None, slice | Tensor]]  # (batch, None if packed; rows)


@dataclass(frozen=True)
class Sample:
    """Parts of a long problem, and the inputs that take the place of others while they are checked."""

    parts: tuple[Part, ...]
    replaced: Mapping[str, Tensor]


def sampled(
    spec: KernelSpec, problem: Problem, inputs: TrialInputs, device: torch.device, rows: int, seed: int
) -> Sample:
    """About `rows` rows of a long problem: the first, the last and random ones of up to three sequences.

    A gradient that sums over queries or windows is checked with cotangents that are zero but in those rows, so that
    the reference needs these alone, and all other sequences must get nothing.
    """
    if problem.layout == "paged":  # a few tokens a sequence: the reference does them all
        return Sample((whole(problem, inputs, device),), {})
    sides = {argument.shape[0] for argument in spec.arguments if argument.shape}
    summed, chosen = sums_over(spec), _chosen(list(_sequences(problem, inputs.layout)))
    share = max(4, rows // max(1, len(chosen)))
    if summed == "C":
        tiles = _tiles(problem, chosen, share // 2)
        kept: Kept = [(tile.batch, slice(tile.row, tile.row + tile.rows)) for tile in tiles if tile.has_gradient]
        parts = (_tile_part(problem, tiles, device),) if tiles else ()
        return Sample(parts, _only(spec, inputs, kept))
    found: list[Part] = []
    kept = []
    for number, sequence in enumerate(chosen):
        if "Q" in sides:
            picked = sample_rows(sequence.len_q, share, seed + number)
            found.extend(_query_rows(problem, sequence, picked, device, len(picked) if summed else ROWS_AT_ONCE))
            kept.append((sequence.batch, torch.tensor(picked, device=device) + sequence.q))
        else:
            found.extend(_compressed_rows(problem, sequence, share // 2, device))
    if not summed:
        return Sample(tuple(found), {})
    found.extend(_silent(problem, inputs.layout, chosen, device))
    return Sample(tuple(found), _only(spec, inputs, kept))


def sums_over(spec: KernelSpec) -> str:
    """The side ("Q", "C") over which a backward sums cotangents into outputs of another side, or ""."""
    sides = [str(a.shape[0]) for a in spec.arguments if a.name in COTANGENTS and not a.is_output]
    return next((side for side in sides if any(a.is_output and a.shape[0] != side for a in spec.arguments)), "")


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


def _query_rows(
    problem: Problem, sequence: _Sequence, picked: list[int], device: torch.device, at_once: int
) -> Iterator[Part]:
    num_cmp = problem.nsa.num_compressed(sequence.len_k)
    for start in range(0, len(picked), at_once):
        index = torch.tensor(picked[start : start + at_once], device=device)
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


def _only(spec: KernelSpec, inputs: TrialInputs, kept: Kept) -> dict[str, Tensor]:
    """Copies of the cotangents that are zero except in the rows kept."""
    copies: dict[str, Tensor] = {}
    for argument in spec.arguments:
        tensor = inputs.tensors[argument.name]
        if argument.name in COTANGENTS and tensor is not None:
            copy = empty_guarded(tuple(tensor.shape), tensor.dtype, tensor.device).zero_()
            for batch, rows in kept:
                where = (rows,) if batch is None else (batch, rows)
                copy[where] = tensor[where]
            if inputs.layout is not None and argument.shape[0] == "C":
                fill_unused(copy, argument.name, inputs.layout)
            copies[argument.name] = copy
    return copies


def _silent(
    problem: Problem, layout: PackedLayout | None, chosen: list[_Sequence], device: torch.device
) -> Iterator[Part]:
    """The keys and compressed rows outside of the chosen sequences, seen by no query that has a gradient."""
    none = torch.arange(0, device=device)
    if layout is None:
        for batch in sorted(set(range(problem.batch)) - {sequence.batch for sequence in chosen}):
            rows: dict[str, slice | Tensor] = {"Q": slice(0, 0), "K": slice(None), "C": slice(None)}
            sequence = _Sequence(batch, 0, 0, 0, problem.seq_k, 0)
            yield sequence.part(problem, rows, problem.seq_k, none, "rows without gradient")
        return
    starts = [(0, 0)] + [(s.k + s.len_k, s.cmp + problem.nsa.num_compressed(s.len_k)) for s in chosen]
    stops = [(s.k, s.cmp) for s in chosen] + [(problem.seq_k, layout.num_cmp_rows)]
    for (k, cmp), (k_stop, cmp_stop) in zip(starts, stops, strict=True):
        rows = {"Q": slice(0, 0), "K": slice(k, k_stop), "C": slice(cmp, cmp_stop)}
        sequence = _Sequence(None, 0, 0, k, k_stop - k, cmp)
        yield sequence.part(problem, rows, max(1, k_stop - k), none, "rows without gradient")


@dataclass(frozen=True)
class _Tile:
    """Adjacent compressed rows and the first token under them."""

    batch: int | None
    token: int
    row: int
    rows: int
    has_gradient: bool


def _tiles(problem: Problem, chosen: list[_Sequence], count: int) -> list[_Tile]:
    """Tiles of `count` rows at both ends of the chosen sequences, and one behind the first that gets no gradient."""
    nsa = problem.nsa
    count = min(count, max((nsa.num_compressed(s.len_k) for s in chosen), default=0))
    tokens = (count - 1) * nsa.compress_stride + nsa.compress_block_size
    tiles: list[_Tile] = []
    for s in chosen:
        last = nsa.num_compressed(s.len_k) - count
        room = last * nsa.compress_stride // tokens  # tiles before the last, no token in two
        if count and last >= 0:
            firsts = [(0, True)] + ([(last, True)] if room >= 1 else [])
            firsts += [(tokens // nsa.compress_stride, False)] if room >= 2 else []
            for first, has_gradient in firsts:
                tiles.append(_Tile(s.batch, s.k + first * nsa.compress_stride, s.cmp + first, count, has_gradient))
    return tiles


def _tile_part(problem: Problem, tiles: list[_Tile], device: torch.device) -> Part:
    """The tiles as sequences of one batch, so that what is summed over all windows is summed over them."""
    nsa = problem.nsa
    tokens = (tiles[0].rows - 1) * nsa.compress_stride + nsa.compress_block_size

    def cut(argument: Argument, tensor: Tensor) -> Tensor:
        side = argument.shape[0] if argument.shape else ""
        if side not in ("K", "C"):
            return tensor
        starts = [tile.token if side == "K" else tile.row for tile in tiles]
        size = tokens if side == "K" else tiles[0].rows
        lead = [tensor if tile.batch is None else tensor[tile.batch] for tile in tiles]
        return torch.stack([rows[start : start + size] for rows, start in zip(lead, starts, strict=True)])

    small = problem.replace(batch=len(tiles), layout="batched", seq_q=tokens, seq_k=tokens)
    places = [(tile.batch, tile.token) for tile in tiles]
    where = f" Coordinates count tiles of {tokens} tokens that start at (batch, token) {places}."
    return Part(small, None, torch.arange(tokens, device=device), cut, where)
