"""KVCache: the keys, values and compressed rows of one layer in pages, and the sequences that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidConfig, InvalidInput
from ..kernels._paged import MAX_NEW_TOKENS
from ..ops import checks, paged_checks
from ..ops.append import Phi
from ..ops.append import append as append_tokens
from ..ops.decode import decode_counters
from ..paged import FP8, CachePools, Pages
from .engine_table import EngineTable
from .page_table import PageTable, Rows

MAX_NEW = MAX_NEW_TOKENS  # query tokens of a decode step
PAGE_DTYPES = (*checks.KERNEL_DTYPES, FP8)


@dataclass(frozen=True)
class LayerSizes:
    """What the pools of a layer are made for."""

    num_kv_heads: int
    d_qk: int
    d_v: int
    config: NSAConfig
    dtype: torch.dtype = torch.bfloat16
    share_kv: bool = True  # the branches have the same keys and values

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "d_qk", "d_v"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfig(f"{name} must be a positive int", {name: value})
        if not isinstance(self.config, NSAConfig):
            values = {"config": type(self.config).__name__}
            raise InvalidConfig("config must be an NSAConfig", values, "Take it from the module's cache_sizes().")
        if self.dtype not in PAGE_DTYPES:
            known = f"Use one of {', '.join(map(str, PAGE_DTYPES))}."
            raise InvalidConfig("dtype must be one that pages can have", {"dtype": str(self.dtype)}, known)


class KVCache:
    """One layer's keys, values and compressed rows in pages, for `max_batch` sequences of up to `max_tokens` tokens.

    Make it by `paged`, `contiguous` or `from_engine`; `another_layer` makes those of a model's other layers, which
    share block table and lengths: each of them appends once in a step. Nothing here waits for a GPU, but for `debug`,
    which checks the values of block table and lengths in every step (always done on the CPU).
    """

    def __init__(
        self, pools: CachePools, pages: PageTable | EngineTable, config: NSAConfig, *, debug: bool = False
    ) -> None:
        paged_checks.check_kinds(pools, config)
        paged_checks.check_pools(pools, pools.k_raw.data[:1], config)
        self.pools, self.pages, self.config, self.debug = pools, pages, config, debug
        self._sizes: LayerSizes | None = None
        self._layer = pages.add_layer(pools) if isinstance(pages, PageTable) else 0
        self.counters = decode_counters(pages.max_batch, MAX_NEW, pools.k_raw.data.shape[2], pages.table.device)

    @classmethod
    def paged(
        cls,
        *,
        num_pages: int,
        max_batch: int,
        max_tokens: int,
        num_kv_heads: int,
        d_qk: int,
        d_v: int,
        config: NSAConfig,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        share_kv: bool = True,
        debug: bool = False,
    ) -> KVCache:
        """`num_pages` pages that sequences take as they grow; `dtype` float8_e4m3fn keeps a scale a page and head."""
        sizes = LayerSizes(num_kv_heads, d_qk, d_v, config, dtype, share_kv)
        room = {"max_batch": max_batch, "max_tokens": max_tokens, "num_pages": num_pages, "page_size": page_size}
        return cls._layer_on(PageTable(**room, adjacent=False, device=device), sizes, debug)

    @classmethod
    def contiguous(
        cls,
        *,
        max_batch: int,
        max_tokens: int,
        num_kv_heads: int,
        d_qk: int,
        d_v: int,
        config: NSAConfig,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        share_kv: bool = True,
        debug: bool = False,
    ) -> KVCache:
        """Every sequence owns its `max_tokens` from the start, its pages side by side; `fork` copies all it needs."""
        sizes = LayerSizes(num_kv_heads, d_qk, d_v, config, dtype, share_kv)
        room = {"max_batch": max_batch, "max_tokens": max_tokens, "page_size": page_size}
        return cls._layer_on(PageTable(**room, adjacent=True, device=device), sizes, debug)

    @classmethod
    def from_engine(
        cls,
        pools: CachePools,
        block_table: Tensor,
        lengths: Tensor,
        *,
        config: NSAConfig,
        max_length: int | None = None,
        debug: bool = False,
    ) -> KVCache:
        """Over a serving engine's tensors: int32 `[B, MP]` and `[B]`, which it keeps; `lengths` count the new tokens.

        Pages are taken, shared and given back by the engine; here tokens are only written and read. No sequence will
        be longer than `max_length`, by default what the block table has room for.
        """
        return cls(pools, EngineTable(block_table, lengths, max_length), config, debug=debug)

    @classmethod
    def _layer_on(cls, pages: PageTable, sizes: LayerSizes, debug: bool) -> KVCache:
        stride = sizes.config.compress_stride
        if pages.page_size % stride:
            values = {"page_size": pages.page_size, "d": stride}
            raise InvalidConfig("page_size must be a multiple of compress_stride (d)", values, "Make pages larger.")
        cache = cls(new_pools(pages, sizes), pages, sizes.config, debug=debug)
        cache._sizes = sizes
        return cache

    def another_layer(self) -> KVCache:
        """A cache of the same sizes for another layer of the model, over the same block table and lengths."""
        if self._sizes is None:
            raise InvalidInput("only a cache that made its own pools can make more", {}, "Use from_engine() again.")
        return self._layer_on(self._owned("another_layer"), self._sizes, self.debug)

    @property
    def max_batch(self) -> int:
        """Sequences that it has room for."""
        return self.pages.max_batch

    @property
    def block_table(self) -> Tensor:
        """Pages of each sequence, int32 `[B, MP]`."""
        return self.pages.table

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 `[B]` on the device."""
        return self.pages.lengths

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence on the host; waits for the device only if an engine counts them."""
        return self.pages.host_lengths

    @contextmanager
    def step(self, num_new: int, sequences: Sequence[int] | None = None) -> Iterator[Rows]:
        """Counts the new tokens of a step, which `write` fills; if anything fails inside, they are taken back."""
        rows = self.pages.begin(self._layer, num_new, sequences)
        try:
            yield rows
        except BaseException:
            self.pages.undo(self._layer)
            raise

    def write(
        self,
        rows: Rows,
        keys: Mapping[str, Any],
        phi_k: Phi = None,
        phi_v: Phi = None,
        dispatcher: Dispatcher | None = None,
        strict: bool = False,
    ) -> None:
        """Fills the last tokens of a step: `keys` has k and v, and k_slc, v_slc, k_win, v_win if kept apart."""
        append_tokens(
            *(keys["k"], keys["v"], self.pools, rows.table, rows.lengths),
            config=self.config,
            phi_k=phi_k,
            phi_v=phi_v,
            k_slc=keys.get("k_slc"),
            v_slc=keys.get("v_slc"),
            k_win=keys.get("k_win"),
            v_win=keys.get("v_win"),
            max_length=rows.max_length,
            dispatcher=dispatcher,
            strict=strict,
            debug=self.debug,
        )

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        k_slc: Tensor | None = None,
        v_slc: Tensor | None = None,
        k_win: Tensor | None = None,
        v_win: Tensor | None = None,
        phi_k: Phi = None,
        phi_v: Phi = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        """Q more tokens, k `[B, Q, H, D_QK]`, v `[B, Q, H, D_V]`: a row for each sequence, or for each of `sequences`.

        A row of an inactive sequence is not read. Raises CacheFull or InvalidInput, and then nothing has changed.
        """
        keys = {"k": k, "v": v, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
        if not isinstance(k, Tensor) or k.ndim != 4:
            values = {"k": tuple(k.shape) if isinstance(k, Tensor) else type(k).__name__}
            raise InvalidInput("k must be a tensor [B, Q, H, D_QK]", values)
        with self.step(k.shape[1], sequences) as rows:
            self.write(rows, keys, phi_k, phi_v)

    def undo(self) -> None:
        """Takes back, for all layers, a step that some of them have not taken: one failed, and none will follow.

        Where all have taken the last step nothing happens; `truncate` is for that.
        """
        self._owned("undo").undo()

    def reserve(self, tokens: int) -> None:
        """See `PageTable.reserve`; all layers at once, as everything below."""
        self._owned("reserve").reserve(tokens)

    def advance(self, num_new: int) -> None:
        """See `PageTable.advance`."""
        self._owned("advance").advance(num_new)

    def fork(self, source: int, target: int) -> None:
        """See `PageTable.fork`."""
        self._owned("fork").fork(source, target)

    def truncate(self, sequence: int, length: int) -> None:
        """See `PageTable.truncate`."""
        self._owned("truncate").truncate(sequence, length)

    def free(self, sequence: int) -> None:
        """See `PageTable.free`."""
        self._owned("free").free(sequence)

    def _owned(self, act: str) -> PageTable:
        if isinstance(self.pages, PageTable):
            return self.pages
        raise InvalidInput(f"{act} is for the serving engine, which owns the pages", {}, "Change its block table.")


@torch.inference_mode(False)  # else no step outside of it could write to them
def new_pools(pages: PageTable, sizes: LayerSizes) -> CachePools:
    """Zeroed pools of one layer for the pages of a table."""
    cells = pages.page_size // sizes.config.compress_stride

    def make(rows: int, dim: int) -> Pages:
        shape, device = (pages.num_pages, rows, sizes.num_kv_heads, dim), pages.table.device
        scale = torch.ones(shape[0], shape[2], device=device) if sizes.dtype == FP8 else None
        zeros = torch.zeros(math.prod(shape) * sizes.dtype.itemsize, dtype=torch.uint8, device=device)
        return Pages(zeros.view(sizes.dtype).reshape(shape), scale)

    names = {"raw": pages.page_size} if sizes.share_kv else dict.fromkeys(("raw", "slc", "win"), pages.page_size)
    made: dict[str, Any] = {}
    for branch, rows in {**names, "cmp": cells}.items():
        made |= {f"k_{branch}": make(rows, sizes.d_qk), f"v_{branch}": make(rows, sizes.d_v)}
    for branch in ("slc", "win"):
        made.setdefault(f"k_{branch}", made["k_raw"])
        made.setdefault(f"v_{branch}", made["v_raw"])
    return CachePools(**made)
