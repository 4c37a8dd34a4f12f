"""The equations of appending to a cache in pages (see `paged`), in place, in plain PyTorch.

Tokens come in any number at a time: one by one, in chunks or all at once, the pages are the same in the end. That holds
for fp8 too, to its rounding: the scale of a page is that of its largest value so far, and rises only by powers of two,
so that what lies there already is rescaled exactly (but for subnormals).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .config import NSAConfig
from .paged import FP8_MAX, Pages, first_cell, positions_of, power_of_two_scale, rows_at, stored
from .reference import PhiWeights


def write_tokens(pages: Pages, table: Tensor, lengths: Tensor, x: Tensor) -> None:
    """Token j of x `[B, Q, H, D]` goes to position lengths[b] - Q + j of its sequence.

    Negative positions and those behind the table `[B, MP]` are skipped. Waits for the device, as `write_compressed`.
    """
    _write_rows(pages, table, positions_of(lengths, x.shape[1]), x, start=0)


def write_compressed(
    raw: Pages,
    compressed: Pages,
    table: Tensor,
    lengths: Tensor,
    num_new: int,
    config: NSAConfig,
    phi: PhiWeights | None,
) -> None:
    """Eq. 7 for every compressed row that one of the last `num_new` tokens completes, from raw pages that hold them.

    By phi, in the dtype of its weights, or by the mean without one (in float32 if the raw pages are fp8).
    """
    last = positions_of(lengths, num_new)
    behind_first = last - (config.compress_block_size - 1)
    complete = (behind_first >= 0) & (behind_first % config.compress_stride == 0)
    complete &= last < table.shape[1] * raw.data.shape[1]
    sequence, new = complete.nonzero(as_tuple=True)  # [N]
    row = behind_first[sequence, new] // config.compress_stride
    tokens = row[:, None] * config.compress_stride + torch.arange(config.compress_block_size, device=row.device)
    page = table[sequence].long().gather(1, tokens // raw.data.shape[1])
    mean_dtype = raw.data.dtype if raw.scale is None else torch.float32
    x = rows_at(raw, page, tokens % raw.data.shape[1], mean_dtype if phi is None else phi.w1.dtype)  # [N, l, H, D]
    out = reference.compress_mean(x, config) if phi is None else reference.compress_mlp(x, phi, config)
    start = first_cell(config)
    _write_rows(compressed, table[sequence], row[:, None] + start, out, start)


def _write_rows(pages: Pages, table: Tensor, rows: Tensor, x: Tensor, start: int) -> None:
    """x `[B, R, H, D]` to rows `[B, R]` of the sequences, of which `start` is the first one in use."""
    size = pages.data.shape[1]
    sequence, index = ((rows >= 0) & (rows < table.shape[1] * size)).nonzero(as_tuple=True)
    if sequence.numel() == 0:
        return
    row = rows[sequence, index]
    page, row_in_page = table[sequence, row // size].long(), row % size
    new = x[sequence, index]  # [N, H, D]
    if pages.scale is not None:
        opens = (row_in_page == 0) | (row == start)
        scale = _raise_scales(pages, pages.scale, page, row_in_page, opens, new)
        new = (new.float() / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)  # of inf; torch's own answer to it has changed
    stored(pages.data)[page, row_in_page] = stored(new.to(pages.data.dtype))


def _raise_scales(pages: Pages, scale: Tensor, page: Tensor, row: Tensor, opens: Tensor, new: Tensor) -> Tensor:
    """Makes room for new values `[N, H, D]` at row[i] of page[i] in fp8 pages; returns the scale of each, `[N, H]`.

    A page whose first row is among them starts anew: what it holds is dead. Else its scale only rises, and the rows
    before the new ones follow it.
    """
    touched, which = page.unique(return_inverse=True)  # [U], [N]
    largest = new.float().abs()
    largest = torch.where(largest.isfinite(), largest, 0.0).amax(-1)  # inf and NaN spoil their own token at most
    needed = power_of_two_scale(_per_page(largest, which, touched, "amax"))  # [U, H]
    fresh = _per_page(opens.long(), which, touched, "amax").bool()
    first = _per_page(row, which, touched, "amin")
    old = torch.where(fresh[:, None], needed, scale[touched])
    raised = torch.maximum(old, needed)
    held = torch.arange(pages.data.shape[1], device=page.device) < first[:, None]  # [U, ROWS]
    before = stored(pages.data)[touched]
    moved = (before.view(pages.data.dtype).float() * (old / raised)[:, None, :, None]).to(pages.data.dtype)
    stored(pages.data)[touched] = torch.where(held[..., None, None], stored(moved), before)
    scale[touched] = raised
    return raised[which]


def _per_page(values: Tensor, which: Tensor, touched: Tensor, how: str) -> Tensor:
    """The largest or smallest of the values `[N, ..]` that belong to each touched page: `[U, ..]`."""
    index = which.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
    empty = values.new_zeros(touched.numel(), *values.shape[1:])
    return empty.scatter_reduce(0, index, values, how, include_self=False)
