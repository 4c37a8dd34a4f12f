"""A decode step over a paged cache: two kernels on CUDA tensors, which wait for nobody, the equations on others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels, paged
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..kernels._paged import MAX_NEW_TOKENS
from ..paged import CachePools, Pages
from ..spec import Problem
from . import checks, paged_checks, serve

LEAST_BOUND = 1024  # tokens: lengths below share kernels and grids


@torch.inference_mode(False)  # else no step outside of it could use them
def decode_counters(batch: int, num_new: int, num_kv_heads: int, device: torch.device | str) -> Tensor:
    """Zeros with which the programs of a step find out who is last; every step leaves them zero."""
    return torch.zeros(batch * num_new * num_kv_heads, dtype=torch.int32, device=device)


def length_bound(length: int, capacity: int) -> int:
    """A bound of `length` for a step's grid: the next power of two, so that few bounds occur, up to the capacity."""
    return min(max(LEAST_BOUND, 1 << max(length - 1, 0).bit_length()), capacity)


@torch.no_grad()
def decode_attention(
    q: Tensor,
    gates: Tensor,
    pools: CachePools,
    block_table: Tensor,
    lengths: Tensor,
    *,
    config: NSAConfig,
    counters: Tensor,
    max_length: int | None = None,
    scale: float | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
    debug: bool = False,
) -> Tensor:
    """Attention of the last Q tokens of every sequence, which are in the cache already (`append`): `[B, Q, HQ, D_V]`.

    q `[B, Q, HQ, D_QK]` with 1 <= Q <= 8, gates `[B, Q, HQ, 3]`, block_table `[B, MP]` int32, lengths `[B]` int32 with
    the new tokens counted; tokens that a shorter sequence does not have get zeros. counters: `decode_counters`.
    max_length: no sequence is or, in a captured graph, will be longer (by default the table's capacity); one that is
    all the same is not read and gets NaN. debug: check table and lengths, which waits for the device; on the CPU that
    is always done. Raises InvalidInput.
    """
    checks.check_query(q, None)
    if q.shape[1] > MAX_NEW_TOKENS:
        values = {"new tokens": q.shape[1]}
        raise InvalidInput(f"a decode step takes up to {MAX_NEW_TOKENS} tokens", values, "Use prefill_attention().")
    checks.check_gates(gates, q)
    paged_checks.check_pools(pools, q, config)
    paged_checks.check_table(block_table, lengths, q)
    num_heads = pools.k_cmp.data.shape[2]
    paged_checks.check_counters(counters, q, num_heads)
    bound = paged_checks.length_limit(max_length, block_table.shape[1] * pools.page_size, q.shape[1])
    if debug or checks.values_are_known(lengths):
        paged_checks.check_values(block_table, lengths, pools, q.shape[1], bound)
    factor = serve.scale_of(q, scale)
    if not serve.on_kernels(q):
        return paged.decode_attention(q, gates, pools, block_table, lengths, config, factor)
    step = _Step(
        q if q.stride(-1) == 1 else q.contiguous(),
        pools,
        {
            "table": block_table,
            "lengths": lengths,
            "counters": counters.flatten()[: q.shape[0] * q.shape[1] * num_heads],
            "scale": factor,
        },
        config,
        bound,
        serve.from_handle(serve.handle_of(dispatcher, strict), q),
    )
    return _selected_and_window(step, gates.to(q.dtype), *_compressed(step))


@dataclass(frozen=True)
class _Step:
    """What both kernels of a step take."""

    q: Tensor
    pools: CachePools
    shared: dict[str, Any]  # table, lengths, counters, scale
    config: NSAConfig
    bound: int  # tokens of the longest sequence
    dispatcher: Dispatcher | None

    def launch(self, family: str, tensors: dict[str, Any]) -> None:
        """Serve one kernel."""
        q, k, v, table = self.q, self.pools.k_cmp.data, self.pools.v_cmp.data, self.shared["table"]
        shape = (
            q.shape,
            q.dtype,
            self.pools.page_size,
            k.shape,
            k.dtype,
            v.shape[3],
            table.shape,
            self.config,
            self.bound,
        )
        problem = partial(describe, q, self.pools, self.config, self.bound, v.shape[3])
        tensors = {"q": q, **tensors, **self.shared, "seq_k": self.bound}
        serve.launch(self.dispatcher, kernels.get_spec(family), shape, problem, tensors, q.device)


def _compressed(step: _Step) -> tuple[Tensor, Tensor]:
    """o_cmp and the selected blocks."""
    q, pools = step.q, step.pools
    o_cmp = q.new_empty((*q.shape[:3], pools.v_cmp.data.shape[3]))
    size = (*q.shape[:2], pools.k_cmp.data.shape[2], step.config.num_selected)
    blocks = torch.empty(size, dtype=torch.int32, device=q.device)
    tensors = {**pages("k", pools.k_cmp), **pages("v", pools.v_cmp), "o": o_cmp, "blocks": blocks}
    step.launch("cmp_decode_fwd", tensors)
    return o_cmp, blocks


def _selected_and_window(step: _Step, gates: Tensor, o_cmp: Tensor, blocks: Tensor) -> Tensor:
    """The gated sum."""
    out = torch.empty_like(o_cmp)
    tensors: dict[str, Any] = {"blocks": blocks, "o_cmp": o_cmp, "gates": gates, "out": out}
    for name in ("k_slc", "v_slc", "k_win", "v_win"):
        tensors |= pages(name, getattr(step.pools, name))
    step.launch("slc_win_decode_fwd", tensors)
    return out


def pages(name: str, pool: Pages) -> dict[str, Any]:
    """Launch arguments of one pool."""
    return {name: pool.data} if pool.scale is None else {name: pool.data, f"{name}_scale": pool.scale}


def describe(q: Tensor, pools: CachePools, config: NSAConfig, seq_k: int, d_v: int, phi_hidden: int = 128) -> Problem:
    """The problem behind a launch for the tokens of q, queries or keys `[B, Q, .., D_QK]`."""
    fp8 = pools.k_cmp.scale is not None
    return Problem(
        batch=q.shape[0],
        seq_q=q.shape[1],
        seq_k=seq_k,
        num_q_heads=q.shape[2],
        num_kv_heads=pools.k_cmp.data.shape[2],
        d_qk=q.shape[3],
        d_v=d_v,
        dtype=str(q.dtype).removeprefix("torch."),
        layout="paged",
        phi_hidden=phi_hidden,
        nsa=config,
        page_size=pools.page_size,
        cache_dtype=str(paged.FP8).removeprefix("torch.") if fp8 else "problem",
    )
