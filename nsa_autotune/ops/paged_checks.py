"""What must hold before a kernel sees a paged cache. Values on a device are read only where `debug` asks for it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import NSAConfig
from ..errors import InvalidInput
from ..paged import BRANCHES, FP8, CachePools, Pages
from ..spec import PAGE_SIZES
from . import checks


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A count as an int: of what is one in Python, NumPy or a tensor, but no bool."""
    kind = "an int" if least is None else f"an int of at least {least}"
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        remedy = "Convert it by int() where that loses nothing." if found is None else f"Count from {least} on."
        raise InvalidInput(f"{name} must be {kind}", {name: value}, remedy)
    return found


def sequence_numbers(sequences: Sequence[int], max_batch: int) -> tuple[int, ...]:
    """The sequences of a step: ints below `max_batch`, each named once."""
    remedy = f"Pass a list of numbers from 0 to {max_batch - 1}."
    try:
        given = tuple(sequences)
    except TypeError:
        raise InvalidInput("sequences must be a list of ints", {"sequences": sequences}, remedy) from None
    named = tuple(whole_number("sequence", sequence) for sequence in given)
    if not named or len(set(named)) < len(named) or not all(0 <= sequence < max_batch for sequence in named):
        values = {"sequences": list(named), "max_batch": max_batch}
        raise InvalidInput("sequences must be named once each, by numbers below max_batch", values, remedy)
    return named


def length_limit(max_length: int | None, capacity: int, num_new: int) -> int:
    """Tokens that no sequence has more of: `max_length`, or what the block table has room for."""
    limit = capacity if max_length is None else min(whole_number("max_length", max_length), capacity)
    if limit < num_new:
        values = {"max_length": limit, "new tokens": num_new}
        remedy = "It counts the new tokens; leave it out for all that the block table has room for."
        raise InvalidInput("max_length must be at least the number of new tokens", values, remedy)
    return limit


def check_held(host_lengths: Sequence[int], table: Tensor, num_new: int, batch: int, limit: int) -> None:
    """Every sequence of a chunk has its new tokens counted, and no more tokens than `limit`."""
    if len(host_lengths) != batch or table.shape[0] != batch or min(host_lengths) < num_new:
        values = {"new tokens": (batch, num_new), "block_table": tuple(table.shape), "lengths": list(host_lengths)}
        raise InvalidInput("every sequence must hold the new tokens already", values, "Append before you attend.")
    if max(host_lengths) > limit:
        longest = {"length": max(host_lengths), "capacity": limit}
        raise InvalidInput("a length must lie between 0 and the capacity", longest, "Reserve more pages.")


def check_kinds(pools: CachePools, config: NSAConfig) -> None:
    """Both are of our classes."""
    if not isinstance(pools, CachePools):
        raise InvalidInput("pools must be CachePools", {"pools": type(pools).__name__}, "Take them from a KVCache.")
    if not isinstance(config, NSAConfig):
        raise InvalidInput("config must be an NSAConfig", {"config": type(config).__name__}, "Use NSAConfig(...).")


def check_pools(pools: CachePools, q: Tensor, config: NSAConfig) -> None:
    """Every pool is [P, ROWS, H, D] beside q, of its dtype or fp8 with scales, and holds pages of one size."""
    check_kinds(pools, config)
    asked = (q.dtype, q.device, q.shape[2:], config)
    if asked in pools.fits:  # what was checked stays so, and checking takes longer than a launch
        return
    _check_all(pools, q, config)
    pools.fits.add(asked)


def _check_all(pools: CachePools, q: Tensor, config: NSAConfig) -> None:
    size = pools.page_size
    if size not in PAGE_SIZES or size % config.compress_stride:
        sizes = {"page_size": size, "compress_stride": config.compress_stride}
        known = f"Use one of {', '.join(map(str, PAGE_SIZES))} that compress_stride (d) divides."
        raise InvalidInput("a page must hold whole strides", sizes, known)
    for branch in BRANCHES:
        k, v = getattr(pools, f"k_{branch}"), getattr(pools, f"v_{branch}")
        rows = size // config.compress_stride if branch == "cmp" else size
        check_pages(f"k_{branch}", k, q, rows)
        check_pages(f"v_{branch}", v, q, rows)
        if k.data.shape[:3] != v.data.shape[:3] or k.data.shape[:3:2] != pools.k_cmp.data.shape[:3:2]:
            values = {f"k_{branch}": tuple(k.data.shape), f"v_{branch}": tuple(v.data.shape)}
            raise InvalidInput("all pools must have equally many pages and heads", values)
        if k.data.dtype != pools.k_raw.data.dtype or v.data.dtype != pools.k_raw.data.dtype:
            dtypes = {"k_raw": str(pools.k_raw.data.dtype), branch: f"{k.data.dtype}, {v.data.dtype}"}
            raise InvalidInput("all pools must be of one dtype", dtypes)
        if v.data.shape[3] != pools.v_raw.data.shape[3]:
            values = {"v_raw": tuple(pools.v_raw.data.shape), f"v_{branch}": tuple(v.data.shape)}
            raise InvalidInput("the values of all branches must have one head dim", values)
        if k.data.shape[3] != q.shape[3]:
            values = {"q": tuple(q.shape), f"k_{branch}": tuple(k.data.shape)}
            raise InvalidInput(f"k_{branch} must have the head dim of q", values, "Only v may have its own.")


def check_pages(name: str, pages: Pages, q: Tensor, rows: int) -> None:
    """One pool: [P, rows, H, D] with contiguous heads of vectors, and scales [P, H] float32 if it is fp8."""
    data, scale = pages.data, pages.scale
    facts = {"shape": tuple(data.shape), "dtype": str(data.dtype), "device": str(data.device)}
    if data.ndim != 4 or data.shape[1] != rows or 0 in data.shape:
        raise InvalidInput(f"{name} must be [P, {rows}, H, D]", facts, "Cells are page_size / compress_stride a page.")
    if data.device != q.device or data.dtype not in (q.dtype, FP8):
        remedy = "Build the cache for it; for torch.autocast, take cache_sizes() within it."
        raise InvalidInput(f"{name} must be on {q.device} and of {q.dtype} or {FP8}", facts, remedy)
    if data.stride(3) != 1 or any(
        stride * data.element_size() % checks.ALIGNMENT_BYTES for stride in data.stride()[:3]
    ):
        strides = {**facts, "strides": data.stride()}
        raise InvalidInput(f"vectors of {name} must be contiguous and aligned to 16 bytes", strides)
    if q.shape[2] % data.shape[2]:
        heads = {"query heads": q.shape[2], f"heads of {name}": data.shape[2]}
        raise InvalidInput(f"the heads of {name} must divide the query heads", heads)
    if (data.dtype == FP8) != (scale is not None):
        raise InvalidInput(f"{name} needs scales if it is fp8, and only then", facts, "Scales are float32 [P, H].")
    if scale is not None:
        want = (data.shape[0], data.shape[2])
        if tuple(scale.shape) != want or scale.dtype != torch.float32 or scale.device != q.device:
            values = {"shape": tuple(scale.shape), "dtype": str(scale.dtype), "device": str(scale.device)}
            raise InvalidInput(f"the scales of {name} must be float32 {want} on {q.device}", values)
        if not scale.is_contiguous():
            raise InvalidInput(f"the scales of {name} must be contiguous", {"strides": scale.stride()})


def check_table(table: Tensor, lengths: Tensor, q: Tensor) -> None:
    """table is int32 [B, MP] and lengths int32 [B], on the device of q."""
    for name, x in (("block_table", table), ("lengths", lengths)):
        if not isinstance(x, Tensor):
            values = {name: type(x).__name__}
            raise InvalidInput(f"{name} must be an int32 tensor", values, "Use torch.tensor(.., dtype=torch.int32).")
        if x.ndim < 1:
            raise InvalidInput(f"{name} must have a row for each sequence", {"shape": tuple(x.shape)}, "Reshape it.")
    for name, x, want in (("block_table", table, (q.shape[0], -1)), ("lengths", lengths, (q.shape[0],))):
        facts = {"shape": tuple(x.shape), "dtype": str(x.dtype), "device": str(x.device)}
        fits = x.ndim == len(want) and x.shape[0] == want[0] and x.dtype == torch.int32 and x.device == q.device
        if not fits or (x.ndim == 2 and x.shape[1] < 1) or x.stride(-1) != 1:
            form = "[B, MP]" if name == "block_table" else "[B]"
            remedy = f"Here B = {q.shape[0]} and the device is {q.device}."
            raise InvalidInput(f"{name} must be int32 {form} beside the tokens", facts, remedy)


def check_values(table: Tensor, lengths: Tensor, pools: CachePools, num_new: int, max_length: int) -> None:
    """What the kernels trust: lengths within bounds, pages that exist, and new tokens in pages that nobody else names.

    Reads the device's values, so it waits for them.
    """
    size, pages = pools.page_size, pools.k_raw.data.shape[0]
    capacity = min(max_length, table.shape[1] * size)
    used: list[list[int]] = []
    for index, (length, row) in enumerate(zip(lengths.tolist(), table.tolist(), strict=True)):
        if not 0 <= length <= capacity:
            values = {"sequence": index, "length": length, "capacity": capacity}
            raise InvalidInput("a length must lie between 0 and the capacity", values, "Reserve more pages.")
        used.append(row[: -(-length // size)])
        wrong = [page for page in used[index] if not 0 <= page < pages]
        if wrong:
            values = {"sequence": index, "page": wrong[0], "pages": pages}
            raise InvalidInput("block_table must name pages that exist", values, "Unused entries may hold anything.")
    holders = Counter(page for mine in used for page in mine)
    for index, length in enumerate(lengths.tolist()):
        for page in used[index][max(0, length - num_new) // size :]:
            if holders[page] > 1:
                values = {"page": page, "sequences": [other for other, mine in enumerate(used) if page in mine]}
                remedy = "Copy a shared page before a sequence writes to it."
                raise InvalidInput("pages that new tokens are written to must belong to one sequence", values, remedy)


def check_counters(counters: Tensor, q: Tensor, num_heads: int) -> None:
    """counters is int32 with room for every new token and kv head."""
    need = q.shape[0] * q.shape[1] * num_heads
    remedy = "Take them from decode_counters(), once for all steps."
    if not isinstance(counters, Tensor):
        raise InvalidInput("counters must be a tensor", {"counters": type(counters).__name__}, remedy)
    if counters.dtype != torch.int32 or counters.numel() < need or counters.device != q.device:
        values = {"dtype": str(counters.dtype), "elements": counters.numel(), "device": str(counters.device)}
        raise InvalidInput(f"counters must be int32 with at least {need} elements on {q.device}", values, remedy)
