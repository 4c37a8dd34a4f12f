"""A key-value cache in pages: where tokens and compressed rows lie, and the equations of a decode step over it.

A block table `[B, MP]` int32 names the pages of each sequence in order (unused entries may hold anything), `lengths`
`[B]` int32 its tokens, the new ones included. Token t lies in page t // PS at row t % PS. A page of PS tokens also owns
PS / d cells for compressed rows; row i lies in cell i + l/d - 1, the page of its last token, so that a page depends on
nothing behind it: sequences with a common prefix can share its pages.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .config import NSAConfig

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # what a page of zeros has, so that any value after them can raise it


BRANCHES = ("cmp", "raw", "slc", "win")


@dataclass(frozen=True)
class Pages:
    """Keys or values of one branch: `data` `[P, ROWS, H, D]`, ROWS tokens or cells a page.

    fp8 pages have a `scale` `[P, H]` float32, a power of two: a value is data * scale. Pages of other dtypes have none.
    """

    data: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class CachePools:
    """All pages of one layer's cache. Branches that share keys and values name the same tensors."""

    k_cmp: Pages  # compressed rows, PS / d cells a page
    v_cmp: Pages
    k_raw: Pages  # the tokens under them
    v_raw: Pages
    k_slc: Pages
    v_slc: Pages
    k_win: Pages
    v_win: Pages
    # queries that these very pools passed `check_pools` for
    fits: set[Hashable] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def page_size(self) -> int:
        """PS, tokens a page."""
        return int(self.k_raw.data.shape[1])

    def distinct(self) -> list[Pages]:
        """Every pool once."""
        seen: dict[int, Pages] = {}
        for branch in BRANCHES:
            for pages in (getattr(self, f"k_{branch}"), getattr(self, f"v_{branch}")):
                seen.setdefault(id(pages.data), pages)
        return list(seen.values())


def first_cell(config: NSAConfig) -> int:
    """The cell of compressed row 0: l/d - 1. Cells before it are unused."""
    return config.compress_block_size // config.compress_stride - 1


def read_rows(pages: Pages, table_row: Tensor, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows (token positions, or cells) of one sequence: `[R]` int64 to `[R, H, D]`, scaled, in `dtype` (the data's)."""
    size = pages.data.shape[1]
    return rows_at(pages, table_row.long()[rows // size], rows % size, dtype)


def stored(data: Tensor) -> Tensor:
    """The same memory, fp8 as bytes: not every operator that moves data knows fp8 on every device."""
    return data.view(torch.uint8) if data.dtype == FP8 else data


def rows_at(pages: Pages, page: Tensor, row: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `[..]` int64 of pages `[..]` int64: `[.., H, D]`, scaled, in `dtype` (the data's)."""
    found = stored(pages.data)[page, row].view(pages.data.dtype)
    wanted = dtype or found.dtype
    if pages.scale is None:
        return found.to(wanted)
    return (found.float() * pages.scale[page][..., None]).to(wanted)


def read_tokens(pages: Pages, table_row: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """The first `length` tokens of one sequence: `[length, H, D]`."""
    return read_rows(pages, table_row, torch.arange(length, device=table_row.device), dtype)


def read_compressed(
    pages: Pages, table_row: Tensor, length: int, config: NSAConfig, dtype: torch.dtype | None = None
) -> Tensor:
    """The compressed rows of the first `length` tokens: `[NC, H, D]`."""
    rows = torch.arange(config.num_compressed(length), device=table_row.device) + first_cell(config)
    return read_rows(pages, table_row, rows, dtype)


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The smallest power of two s >= 2^-126 with `largest` <= 448 s: what an fp8 page is multiplied with."""
    mantissa, exponent = torch.frexp(largest.float() / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    return torch.where(largest > 0, scale, 0.0).clamp_(min=SMALLEST_SCALE)


def positions_of(lengths: Tensor, num_new: int) -> Tensor:
    """Positions `[B, Q]` int64 of the last Q tokens of each sequence; negative ones do not exist."""
    return lengths.long()[:, None] - num_new + torch.arange(num_new, device=lengths.device)


def compressed_decode(
    q: Tensor, k_cmp: Pages, v_cmp: Pages, table: Tensor, lengths: Tensor, config: NSAConfig, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o_cmp `[B, Q, HQ, D_V]` and importance `[B, Q, H, NB]` of the last Q tokens (Eq. 5, 8-10); NB is the longest's.

    Blocks of the future, and of tokens that do not exist, are -inf.
    """
    batch, num_new = q.shape[:2]
    num_blocks = config.num_select_blocks(max(int(lengths.max()), 1))
    o = q.new_zeros((*q.shape[:3], v_cmp.data.shape[-1]))
    heads = k_cmp.data.shape[2]
    scores = torch.full((batch, num_new, heads, num_blocks), -math.inf, dtype=_wide(q.dtype), device=q.device)
    for b in range(batch):
        length = int(lengths[b])
        rows = slice(max(0, num_new - length), None)  # tokens that exist
        if length == 0:
            continue
        k, v = (read_compressed(x, table[b], length, config, q.dtype)[None] for x in (k_cmp, v_cmp))
        o_b, lse = reference.compressed_attention(q[b : b + 1, rows], k, v, config, seq_k=length, scale=scale)
        found = reference.importance(q[b : b + 1, rows], k, lse, config, seq_k=length, scale=scale)[0]
        o[b, rows] = o_b[0]
        scores[b, rows] = F.pad(found, (0, num_blocks - found.shape[-1]), value=-math.inf)
    return o, scores


def select_decode(scores: Tensor, lengths: Tensor, config: NSAConfig) -> Tensor:
    """Eq. 11-12 for the importance of the last Q tokens: int32 `[B, Q, H, n]`, ascending, then -1."""
    positions = positions_of(lengths, scores.shape[1]).flatten()
    chosen = reference.select_from_importance(scores.flatten(0, 1), config, positions)
    return chosen.reshape(*scores.shape[:3], config.num_selected)


def selected_window_decode(
    q: Tensor,
    k_slc: Pages,
    v_slc: Pages,
    k_win: Pages,
    v_win: Pages,
    blocks: Tensor,
    o_cmp: Tensor,
    gates: Tensor,
    table: Tensor,
    lengths: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> Tensor:
    """The gated sum of the three branches for the last Q tokens (Eq. 5): `[B, Q, HQ, D_V]`; no token gives zeros."""
    num_new = q.shape[1]
    out = torch.zeros_like(o_cmp)
    for b in range(q.shape[0]):
        length = int(lengths[b])
        rows = slice(max(0, num_new - length), None)
        if length == 0:
            continue
        (k_s, v_s, k_w, v_w) = (read_tokens(x, table[b], length, q.dtype)[None] for x in (k_slc, v_slc, k_win, v_win))
        mine, picked = q[b : b + 1, rows], blocks[b : b + 1, rows]
        o_slc, _ = reference.selected_attention(mine, k_s, v_s, picked, config, scale=scale)
        o_win, _ = reference.window_attention(mine, k_w, v_w, config, scale=scale)
        out[b, rows] = reference.combine(gates[b, rows], o_cmp[b, rows], o_slc[0], o_win[0])
    return out


def decode_attention(
    q: Tensor,
    gates: Tensor,
    pools: CachePools,
    table: Tensor,
    lengths: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> Tensor:
    """One decode step in plain PyTorch: o `[B, Q, HQ, D_V]` of the last Q tokens of every sequence."""
    o_cmp, scores = compressed_decode(q, pools.k_cmp, pools.v_cmp, table, lengths, config, scale)
    blocks = select_decode(scores, lengths, config)
    k_slc, v_slc, k_win, v_win = pools.k_slc, pools.v_slc, pools.k_win, pools.v_win
    return selected_window_decode(q, k_slc, v_slc, k_win, v_win, blocks, o_cmp, gates, table, lengths, config, scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
