"""Pools over shuffled pages for tests of the paged cache: what nothing has written is NaN."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from nsa_autotune.config import NSAConfig
from nsa_autotune.paged import FP8, CachePools, Pages, first_cell, read_rows

E4M3_NAN = 0x7F


def nan_pages(num_pages: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> Pages:
    """Pages `[P, ROWS, H, D]` of NaN, their scales NaN as well."""
    if dtype == FP8:
        data = torch.full((num_pages, rows, heads, dim), E4M3_NAN, dtype=torch.uint8).view(FP8)
        return Pages(data, torch.full((num_pages, heads), math.nan))
    return Pages(torch.full((num_pages, rows, heads, dim), math.nan, dtype=dtype))


def raw_and_compressed(
    num_pages: int, page_size: int, heads: int, dim: int, config: NSAConfig, dtype: torch.dtype
) -> tuple[Pages, Pages]:
    """NaN pages for tokens, and for the compressed rows over them."""
    cells = page_size // config.compress_stride
    return (nan_pages(num_pages, page_size, heads, dim, dtype), nan_pages(num_pages, cells, heads, dim, dtype))


def shuffled_table(batch: int, pages_each: int, seed: int = 0) -> Tensor:
    """A block table `[B, MP]` int32 whose pages lie in no order; as many pages as it has entries."""
    order = list(range(batch * pages_each))
    random.Random(seed).shuffle(order)
    return torch.tensor(order, dtype=torch.int32).reshape(batch, pages_each)


def int32(values: list[int]) -> Tensor:
    """A list as lengths."""
    return torch.tensor(values, dtype=torch.int32)


def e4m3_step(value: Tensor, scale: Tensor) -> Tensor:
    """The distance of neighbours in e4m3 times `scale` at `value`."""
    exponent = torch.frexp((value / scale).abs())[1] - 1
    return scale * torch.exp2(exponent.clamp(min=-6).float() - 3)


def rows_and_scales(pages: Pages, table_row: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[R, H, D]` float32, and their scales `[R, H, 1]` (1 where the pages have none)."""
    found = read_rows(pages, table_row, rows, torch.float32)
    if pages.scale is None:
        return found, torch.ones(*found.shape[:2], 1)
    return found, pages.scale[table_row.long()[rows // pages.data.shape[1]]][..., None]


def used_cells(length: int, config: NSAConfig) -> Tensor:
    """Cells of the compressed rows that `length` tokens complete."""
    return torch.arange(config.num_compressed(length)) + first_cell(config)


def fill_with_nan(pools: CachePools) -> None:
    """What a fresh cache may hold; whoever reads a row that nobody wrote gives NaN."""
    for pages in pools.distinct():
        if pages.scale is None:
            pages.data.fill_(math.nan)
        else:
            pages.data.view(torch.uint8).fill_(E4M3_NAN)
            pages.scale.fill_(math.nan)
