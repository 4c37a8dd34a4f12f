"""Attention of a chunk of new tokens over a paged cache that holds them and what came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..layout import PackedLayout, packed_layout
from ..paged import CachePools, Pages, first_cell, rows_at
from . import checks, paged_checks, serve, whole


@torch.no_grad()
def prefill_attention(
    q: Tensor,
    gates: Tensor,
    pools: CachePools,
    block_table: Tensor,
    host_lengths: Sequence[int],
    *,
    config: NSAConfig,
    scale: float | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
) -> Tensor:
    """o `[B, T, HQ, D_V]` of the last T tokens of every sequence, q `[B, T, HQ, D_QK]`, gates `[B, T, HQ, 3]` (Eq. 5).

    Keys and compressed rows are gathered from the pages, in the dtype of q, and attended by the forward kernels: one
    batch if all sequences have the same length, else packed. `host_lengths` count the new tokens; none is below T.
    """
    checks.check_query(q, None)
    checks.check_gates(gates, q)
    paged_checks.check_pools(pools, q, config)
    batch, num_new = q.shape[:2]
    paged_checks.check_held(host_lengths, block_table, num_new, batch, block_table.shape[1] * pools.page_size)
    layout = _layout(host_lengths, num_new, block_table.device, config)
    if layout is None:
        tokens, compressed = _batched_rows(block_table, host_lengths[0], config)
    else:
        tokens, compressed = _packed_rows(layout)
        q, gates = q.flatten(0, 1), gates.flatten(0, 1)
    k_cmp, v_cmp = (_gather(pages, block_table, compressed, q.dtype) for pages in (pools.k_cmp, pools.v_cmp))
    k_slc, v_slc = (_gather(pages, block_table, tokens, q.dtype) for pages in (pools.k_slc, pools.v_slc))
    k_win, v_win = k_slc, v_slc
    if pools.k_win.data is not pools.k_slc.data:
        k_win, v_win = (_gather(pages, block_table, tokens, q.dtype) for pages in (pools.k_win, pools.v_win))
    rest = (serve.index_of(layout), config.to_text(), k_slc.shape[-3], serve.scale_of(q, scale))
    keys, handle = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), serve.handle_of(dispatcher, strict)
    out: Tensor = whole.gated_attention(gates.to(q.dtype), q, *keys, True, *rest, handle)[0]
    return out.reshape(batch, num_new, *out.shape[-2:])


@dataclass(frozen=True)
class _Places:
    """Rows (token positions, or cells) of sequences, of one shape `[..]`; those that do not exist are read as zeros."""

    sequence: Tensor
    row: Tensor
    exists: Tensor | None = None


def _layout(lengths: Sequence[int], num_new: int, device: torch.device, config: NSAConfig) -> PackedLayout | None:
    """None for equal lengths, which make a batch."""
    if len(set(lengths)) == 1:
        return None
    ends = torch.tensor([[0, *accumulate([num_new] * len(lengths))], [0, *accumulate(lengths)]], dtype=torch.int32)
    cu_seqlens_q, cu_seqlens_k = ends.to(device)
    return packed_layout(cu_seqlens_q, cu_seqlens_k, num_new * len(lengths), sum(lengths), config)


def _batched_rows(block_table: Tensor, length: int, config: NSAConfig) -> tuple[_Places, _Places]:
    """Where tokens `[B, TK]` and compressed rows `[B, NC]` lie."""
    sequence = torch.arange(block_table.shape[0], device=block_table.device)[:, None]
    token, row = (torch.arange(n, device=block_table.device)[None] for n in (length, config.num_compressed(length)))
    return _Places(sequence, token), _Places(sequence, row + first_cell(config))


def _packed_rows(layout: PackedLayout) -> tuple[_Places, _Places]:
    """Where tokens `[TK]` lie, and the compressed rows `[NC]` in their slots."""
    config, starts = layout.config, layout.cu_seqlens_k.long()
    exists, first = layout.cmp_source >= 0, layout.cmp_source.long().clamp(min=0)
    sequence = torch.searchsorted(starts[1:].contiguous(), first, right=True).clamp_(max=starts.numel() - 2)
    row = ((first - starts[sequence]) // config.compress_stride + first_cell(config)).where(exists, 0)
    token = torch.arange(layout.total_k, device=starts.device)
    owner = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    return _Places(owner, token - starts[owner]), _Places(sequence, row, exists)


def _gather(pages: Pages, block_table: Tensor, places: _Places, dtype: torch.dtype) -> Tensor:
    size = pages.data.shape[1]
    page = block_table[places.sequence, places.row // size].long()
    rows = rows_at(pages, page, places.row % size, dtype)
    return rows if places.exists is None else rows.where(places.exists[:, None, None], 0.0)
