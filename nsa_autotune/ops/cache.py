"""Appending to a paged cache; see `paged` for where everything lies."""

from __future__ import annotations

from torch import Tensor

from .. import paged_append
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..paged import CachePools, Pages
from ..reference import PhiWeights
from . import checks, paged_checks


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
    paged_checks.check_table(block_table, lengths, k)
    if debug or checks.values_are_known(lengths):
        capacity = block_table.shape[1] * pools.page_size
        paged_checks.check_values(block_table, lengths, pools, k.shape[1], capacity)
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
            rule = f"{name} must be given if, and only if, the cache keeps it apart"
            remedy = "share_kv of the cache must be that of the model."
            raise InvalidInput(rule, {name: None if x is None else "given"}, remedy)
        if x is not None:
            paged_checks.check_rows(name, x, pages, block_table)
            writes.append((pages, x))
    if len({x.shape[1] for _, x in writes}) > 1:
        values = {name: tuple(x.shape) for name, x in given.items() if x is not None}
        raise InvalidInput("all keys and values must be of the same tokens", values)
    return writes
