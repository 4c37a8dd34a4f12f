"""Where each query, key and compressed row of a packed batch lies; computed on the device, without waiting for it."""

from __future__ import annotations

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

    @property
    def num_cmp_rows(self) -> int:
        """Rows of the compressed keys and values, unused ones included."""
        return self.cmp_source.shape[0]


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

    tokens = torch.arange(total_q, device=device)
    seq = torch.searchsorted(cu_q[1:].contiguous(), tokens, right=True).clamp_(max=max(len_q.numel() - 1, 0))
    q_pos = tokens - cu_q[seq] + len_k[seq] - len_q[seq]

    rows = torch.arange(packed_cmp_rows(total_k, len_k.numel(), config), device=device)
    row_seq = torch.searchsorted(cmp_offsets[1:].contiguous(), rows, right=True).clamp_(max=max(len_k.numel() - 1, 0))
    first = (rows - cmp_offsets[row_seq]) * config.compress_stride
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
    )
