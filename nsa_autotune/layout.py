"""Where each query, key and compressed row of a packed batch lies; computed on the device, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import NSAConfig


@dataclass(frozen=True)
class PackedLayout:
    """Index tensors (int32, on the tensors' device) of packed sequences `[T, H, D]` with `cu_seqlens`.

    Compressed rows are laid out in slots: each selection block of a sequence owns l'/d rows, so that sequence s starts
    at row `cmp_offsets[s]`, a multiple of l'/d. Rows that no window fills are zero, and no query sees them.
    """

    cu_seqlens_q: Tensor  # [S + 1]
    cu_seqlens_k: Tensor  # [S + 1]
    cmp_offsets: Tensor  # [S + 1], first compressed row of each sequence
    q_pos: Tensor  # [NQ], position of a query among the keys of its sequence (bottom-right aligned)
    k_start: Tensor  # [NQ], first key of the query's sequence
    cmp_start: Tensor  # [NQ], first compressed row of the query's sequence
    cmp_source: Tensor  # [NC], first key token under each compressed row, -1 where there is none
    total_k: int  # keys of all sequences
    config: NSAConfig

    @property
    def num_cmp_rows(self) -> int:
        """Rows of the compressed keys and values, unused ones included."""
        return self.cmp_source.shape[0]

    def tensors(self) -> list[Tensor]:
        """The index tensors in their order: what operators take."""
        queries = [self.q_pos, self.k_start, self.cmp_start]
        return [self.cu_seqlens_q, self.cu_seqlens_k, self.cmp_offsets, *queries, self.cmp_source]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor], total_k: int, config: NSAConfig) -> PackedLayout:
        """The layout whose `tensors()` these are."""
        cu_q, cu_k, cmp_offsets, q_pos, k_start, cmp_start, cmp_source = tensors
        return PackedLayout(cu_q, cu_k, cmp_offsets, q_pos, k_start, cmp_start, cmp_source, total_k, config)

    # What only the backward reads is computed on first use. Query rows [begin, end) see a key: begin >= end means none.

    @functools.cached_property
    def k_pos(self) -> Tensor:
        """Position of each key in its sequence: `[NK]`."""
        return self._key_place[1].int()

    @functools.cached_property
    def k_cmp(self) -> Tensor:
        """First compressed row of each key's sequence: `[NK]`."""
        return self.cmp_offsets[self._key_place[0]]

    @functools.cached_property
    def win_begin(self) -> Tensor:
        """First query row whose window holds each key: `[NK]`."""
        return self._query_row(*self._key_place)

    @functools.cached_property
    def win_end(self) -> Tensor:
        """One past the last query row whose window holds each key: `[NK]`."""
        seq, position = self._key_place
        return self._query_row(seq, position + self.config.window_size)

    @functools.cached_property
    def cmp_begin(self) -> Tensor:
        """First query row that sees each compressed row: `[NC]`; that of unused rows is the end of their sequence."""
        seq, index = self._row_place
        return self._query_row(seq, index * self.config.compress_stride + self.config.compress_block_size - 1)

    @functools.cached_property
    def cmp_end(self) -> Tensor:
        """One past the last query row that sees each compressed row: `[NC]`."""
        return self.cu_seqlens_q[1:][self._row_place[0]]

    @functools.cached_property
    def slc_first(self) -> Tensor:
        """First key of each selection block, -1 where there is none: `[NC // (l'/d)]`."""
        return self._select_blocks[0]

    @functools.cached_property
    def slc_end(self) -> Tensor:
        """One past the last key of each selection block, -1 where there is none: `[NC // (l'/d)]`."""
        return self._select_blocks[1]

    @functools.cached_property
    def _key_place(self) -> tuple[Tensor, Tensor]:
        """Sequence of each key, and its position there."""
        return _places(self.cu_seqlens_k.long(), torch.arange(self.total_k, device=self.cu_seqlens_k.device))

    @functools.cached_property
    def _row_place(self) -> tuple[Tensor, Tensor]:
        """Sequence of each compressed row, and its index there."""
        return _places(self.cmp_offsets.long(), torch.arange(self.num_cmp_rows, device=self.cmp_offsets.device))

    @functools.cached_property
    def _select_blocks(self) -> tuple[Tensor, Tensor]:
        """Keys [first, end) of the selection blocks; block j of a sequence has the number cmp_start/(l'/d) + j."""
        size, ratio = self.config.select_block_size, self.config.select_block_size // self.config.compress_stride
        seq, index = (place[::ratio] for place in self._row_place)  # a block's slots are its sequence's
        stop = self.cu_seqlens_k.long()[1:][seq]
        first = self.cu_seqlens_k.long()[seq] + index // ratio * size
        end = torch.minimum(first + size, stop)
        return torch.where(first < stop, first, -1).int(), torch.where(first < stop, end, -1).int()

    def _query_row(self, seq: Tensor, position: Tensor) -> Tensor:
        """Row of the first query at or past `position` of sequence `seq`, or the sequence's end: int32."""
        start, stop = self.cu_seqlens_q.long()[seq], self.cu_seqlens_q.long()[1:][seq]
        shift = self.cu_seqlens_k.long().diff()[seq] - (stop - start)  # position of the sequence's first query
        return torch.minimum((start + position - shift).clamp_(min=start), stop).int()


def packed_cmp_rows(total_k: int, num_sequences: int, config: NSAConfig) -> int:
    """Rows that hold the compressed blocks of any packing of `total_k` tokens into `num_sequences` sequences."""
    ratio = config.select_block_size // config.compress_stride
    return ratio * (total_k // config.select_block_size + num_sequences)


def packed_layout(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, config: NSAConfig
) -> PackedLayout:
    """The layout of sequences whose queries and keys start at `cu_seqlens_q[s]` and `cu_seqlens_k[s]`."""
    device = cu_seqlens_q.device
    ratio = config.select_block_size // config.compress_stride
    cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    len_q, len_k = cu_q.diff(), cu_k.diff()  # [S]
    slots = (len_k + config.select_block_size - 1) // config.select_block_size * ratio
    cmp_offsets = torch.cat([slots.new_zeros(1), slots.cumsum(0)])  # [S + 1]

    seq, index = _places(cu_q, torch.arange(total_q, device=device))
    q_pos = index + len_k[seq] - len_q[seq]

    rows = torch.arange(packed_cmp_rows(total_k, len_k.numel(), config), device=device)
    row_seq, row_index = _places(cmp_offsets, rows)
    first = row_index * config.compress_stride
    fits = (rows < cmp_offsets[-1]) & (first + config.compress_block_size <= len_k[row_seq])
    cmp_source = torch.where(fits, first + cu_k[row_seq], -1)
    return PackedLayout(
        cu_seqlens_q=cu_seqlens_q.int(),
        cu_seqlens_k=cu_seqlens_k.int(),
        cmp_offsets=cmp_offsets.int(),
        q_pos=q_pos.int(),
        k_start=cu_k[seq].int(),
        cmp_start=cmp_offsets[seq].int(),
        cmp_source=cmp_source.int(),
        total_k=total_k,
        config=config,
    )


def _places(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence of each row and its index there; rows past the end count on in the last sequence."""
    seq = torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp_(max=max(offsets.numel() - 2, 0))
    return seq, rows - offsets[seq]
