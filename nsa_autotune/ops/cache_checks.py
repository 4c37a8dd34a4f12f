"""What must hold before a step writes to a paged cache or reads it; values of tensors are read only where that is free.

They are read on the CPU, and on a GPU with `debug`, which waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import NSAConfig
from ..errors import InvalidConfig, InvalidInput
from ..paged import FP8, CachePools, Pages
from .checks import check_tensor, values_are_known

PAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)


def check_page_size(page_size: int, config: NSAConfig) -> None:
    """A page holds whole strides, so that it owns PS / d cells for compressed rows."""
    if page_size % config.compress_stride:
        values = {"page_size": page_size, "d": config.compress_stride}
        remedy = "Make pages a multiple of the stride."
        raise InvalidConfig("page_size must be a multiple of compress_stride (d)", values, remedy)


def check_pools(pools: CachePools, config: NSAConfig) -> None:
    """All pages of a cache have one number, one dtype and the rows that tokens or compressed rows need."""
    check_page_size(pools.page_size, config)
    num_pages, size, heads, _ = pools.k_raw.data.shape
    cells = size // config.compress_stride
    for name in ("k_cmp", "v_cmp", "k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win"):
        pages: Pages = getattr(pools, name)
        data, scale = pages.data, pages.scale
        dim = (pools.k_raw if name[0] == "k" else pools.v_raw).data.shape[-1]
        shape = (num_pages, cells if name.endswith("cmp") else size, heads, dim)
        if tuple(data.shape) != shape or data.stride(-1) != 1:
            values: dict[str, object] = {"shape": tuple(data.shape), "strides": data.stride()}
            raise InvalidInput(f"{name} must be pages {list(shape)} with each head in one piece", values)
        if data.dtype not in PAGE_DTYPES or data.dtype != pools.k_raw.data.dtype:
            values = {"k_raw": str(pools.k_raw.data.dtype), name: str(data.dtype)}
            remedy = f"Known: {', '.join(str(dtype) for dtype in PAGE_DTYPES)}."
            raise InvalidInput("all pages of a cache must have one known dtype", values, remedy)
        wanted = (num_pages, heads) if data.dtype == FP8 else None
        if (None if scale is None else tuple(scale.shape)) != wanted:
            values = {"dtype": str(data.dtype), "scale": None if scale is None else tuple(scale.shape)}
            raise InvalidInput(f"{name} must have a scale [P, H] if it is fp8, and none if not", values)
        if scale is not None and scale.dtype != torch.float32:
            raise InvalidInput(f"the scale of {name} must be float32", {"dtype": str(scale.dtype)})


def check_rows(name: str, x: Tensor, pages: Pages, table: Tensor) -> None:
    """New keys or values `[B, Q, H, D]` fit their pages; any floating-point dtype goes into fp8 ones."""
    check_tensor(name, x)
    _, _, heads, dim = pages.data.shape
    if x.ndim != 4 or x.shape[0] != table.shape[0] or x.shape[1] < 1 or tuple(x.shape[2:]) != (heads, dim):
        values = {"shape": tuple(x.shape), "sequences": table.shape[0]}
        raise InvalidInput(f"{name} must be [B, Q, {heads}, {dim}], with a B for each row of the block table", values)
    check_dtype(name, x, pages)
    if x.device != pages.data.device:
        values = {name: str(x.device), "pages": str(pages.data.device)}
        raise InvalidInput(f"{name} must be on the device of the cache", values, f"Use {name}.to(device).")


def check_dtype(name: str, x: Tensor, pages: Pages) -> None:
    """x has the dtype of the pages, if that is one to compute with."""
    if pages.data.dtype not in (x.dtype, FP8):
        values = {name: str(x.dtype), "pages": str(pages.data.dtype)}
        raise InvalidInput(f"{name} must have the dtype of the pages", values, "Make the cache with the model's dtype.")


def check_table(table: Tensor, lengths: Tensor, pools: CachePools, num_new: int, debug: bool) -> None:
    """Block table `[B, MP]` and lengths `[B]`, both int32; and where reading is free, what they name.

    Then: lengths fit the table, used entries name pages that exist, and the pages that the `num_new` last tokens of a
    sequence lie in are named by nothing else, so that they may be written (0: they are only read).
    """
    for name, tensor, dims in (("block_table", table, 2), ("lengths", lengths, 1)):
        if tensor.dtype != torch.int32 or tensor.ndim != dims or tensor.shape[0] != table.shape[0]:
            values = {"dtype": str(tensor.dtype), "shape": tuple(tensor.shape)}
            raise InvalidInput(f"{name} must be int32 {['[B]', '[B, MP]'][dims - 1]}", values, f"Use {name}.int().")
        if tensor.device != pools.k_raw.data.device:
            values = {name: str(tensor.device), "pages": str(pools.k_raw.data.device)}
            raise InvalidInput(f"{name} must be on the device of the pages", values)
    if debug or values_are_known(table):
        _check_values(table.cpu().long(), lengths.cpu().long(), pools, num_new)


def _check_values(table: Tensor, lengths: Tensor, pools: CachePools, num_new: int) -> None:
    num_pages, size = pools.k_raw.data.shape[:2]
    most = table.shape[1] * size
    if bool(((lengths < 0) | (lengths > most)).any()):
        values = {"lengths": lengths.tolist(), "most": most}
        raise InvalidInput("lengths must not go beyond the pages of the block table", values, "Widen the block table.")
    slots = torch.arange(table.shape[1])
    used = slots < (lengths[:, None] + size - 1) // size  # [B, MP]
    strange = used & ((table < 0) | (table >= num_pages))
    if bool(strange.any()):
        values = {
            "(sequence, entry)": strange.nonzero()[0].tolist(),
            "page": int(table[strange][0]),
            "pages": num_pages,
        }
        raise InvalidInput("the block table must name pages that exist", values, "Fill it as far as lengths say.")
    holders = torch.bincount(table[used], minlength=num_pages)
    written = used & (slots >= ((lengths - num_new).clamp(min=0) // size)[:, None]) & (num_new > 0)
    aliased = written & (holders[table.clamp(0, num_pages - 1)] > 1)
    if bool(aliased.any()):
        values = {"(sequence, entry)": aliased.nonzero()[0].tolist(), "page": int(table[aliased][0])}
        remedy = "Copy a shared page before a sequence writes to it."
        raise InvalidInput("a page that is written must belong to one sequence only", values, remedy)
