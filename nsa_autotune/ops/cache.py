"""Appending to a paged cache, and a decode step over it; see `paged` for where everything lies."""

from __future__ import annotations

from torch import Tensor

from .. import paged, paged_append
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..paged import CachePools, Pages
from ..reference import PhiWeights
from . import cache_checks, checks


def append(
    k: Tensor,
    v: Tensor,
    pools: CachePools,
    block_table: Tensor,
    lengths: Tensor,
    *,
    config: NSAConfig,
    phi_k: PhiWeights | None = None,
    phi_v: PhiWeights | None = None,
    k_slc: Tensor | None = None,
    v_slc: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
    debug: bool = False,
) -> None:
    """Writes keys `[B, Q, H, D_QK]` and values `[B, Q, H, D_V]` to the last Q of `lengths` `[B]` tokens, in place.

    The compressed rows that they complete are written as well, by phi or by the mean. Branches with pools of their own
    bring their own keys and values. A sequence of length 0 is skipped. Raises InvalidInput before anything is written.
    """
    given = {"k": k, "v": v, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    writes = check_append(given, pools, block_table)
    cache_checks.check_table(block_table, lengths, pools, k.shape[1], debug)
    for pages, x in writes:
        paged_append.write_tokens(pages, block_table, lengths, x)
    for raw, compressed, phi in ((pools.k_raw, pools.k_cmp, phi_k), (pools.v_raw, pools.v_cmp, phi_v)):
        paged_append.write_compressed(raw, compressed, block_table, lengths, k.shape[1], config, phi)


def check_append(given: dict[str, Tensor | None], pools: CachePools, block_table: Tensor) -> list[tuple[Pages, Tensor]]:
    """The pages to write and what goes there; raises InvalidInput where they do not fit, without looking at values."""
    writes: list[tuple[Pages, Tensor]] = []
    for name, x in given.items():
        pages: Pages = getattr(pools, name if "_" in name else f"{name}_raw")
        own = name in ("k", "v") or pages.data is not getattr(pools, f"{name[0]}_raw").data
        if own is not (x is not None):
            values = {name: None if x is None else "given"}
            rule = f"{name} must be given if, and only if, the cache keeps it apart"
            raise InvalidInput(rule, values, "share_kv of the cache must be that of the model.")
        if x is not None:
            cache_checks.check_rows(name, x, pages, block_table)
            writes.append((pages, x))
    if len({x.shape[1] for _, x in writes}) > 1:
        raise InvalidInput(
            "all keys and values must be of the same tokens", {n: x.shape for n, x in given.items() if x is not None}
        )
    return writes


def decode_attention(
    q: Tensor,
    gates: Tensor,
    pools: CachePools,
    block_table: Tensor,
    lengths: Tensor,
    *,
    config: NSAConfig,
    counters: Tensor | None = None,
    scale: float | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
    debug: bool = False,
) -> Tensor:
    """o `[B, Q, HQ, D_V]` of the last Q tokens of every sequence, q `[B, Q, HQ, D_QK]`, gates `[B, Q, HQ, 3]` (Eq. 5).

    Their keys and values have been appended. Rows without a token (length below Q) are zero.
    """
    checks.check_query(q, None)
    checks.check_gates(gates, q)
    cache_checks.check_dtype("q", q, pools.k_raw)
    if q.shape[0] != block_table.shape[0] or q.shape[-1] != pools.k_raw.data.shape[-1]:
        values = {"q": tuple(q.shape), "block_table": tuple(block_table.shape), "k": tuple(pools.k_raw.data.shape)}
        raise InvalidInput("q must have a row for each of the block table and the head dim of k", values)
    cache_checks.check_table(block_table, lengths, pools, 0, debug)
    return paged.decode_attention(q, gates, pools, block_table, lengths, config, scale)
