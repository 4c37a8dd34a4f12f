"""Appending tokens to a paged cache: kernels on CUDA tensors, which wait for nobody, the equations on others."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import kernels, paged_append
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidInput
from ..kernels._paged import MAX_NEW_TOKENS
from ..paged import CachePools, Pages
from ..reference import PhiWeights
from ..spec import Problem
from . import checks, paged_checks, serve
from .decode import describe, pages
from .phi import FoldedPhi, fold

Phi = PhiWeights | FoldedPhi | None
News = dict[str, tuple[Tensor, Tensor]]  # keys and values by branch, the shared ones under "raw" alone


@torch.no_grad()
def append(
    k: Tensor,
    v: Tensor,
    pools: CachePools,
    block_table: Tensor,
    lengths: Tensor,
    *,
    config: NSAConfig,
    phi_k: Phi = None,
    phi_v: Phi = None,
    k_slc: Tensor | None = None,
    v_slc: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    max_length: int | None = None,
    dispatcher: Dispatcher | None = None,
    strict: bool = False,
    debug: bool = False,
) -> None:
    """Write keys `[B, Q, H, D_QK]` and values `[B, Q, H, D_V]` of the last Q tokens, and the rows that they complete.

    block_table `[B, MP]` int32, lengths `[B]` int32 with the new tokens counted; tokens that a shorter sequence does
    not have are skipped. Compressed rows are made by phi, or by the mean without; PhiWeights are folded in every call,
    so pass what `fold` made of them. Branches with pools of their own bring their own keys and values. More than 8
    tokens are written by PyTorch, which waits for the device. debug: check table and lengths, which waits too; on the
    CPU that is always done, and then no sequence may be longer than max_length. Pools change in place. Raises
    InvalidInput before anything is written.
    """
    paged_checks.check_kinds(pools, config)
    given = {"raw": (k, v), "slc": (k_slc, v_slc), "win": (k_win, v_win)}
    news = _branches(given, pools, config)
    _check_phi(phi_k, phi_v, news, config)
    paged_checks.check_table(block_table, lengths, k)
    limit = block_table.shape[1] * pools.page_size
    if max_length is not None:
        limit = paged_checks.length_limit(max_length, limit, k.shape[1])
    if debug or checks.values_are_known(lengths):
        paged_checks.check_values(block_table, lengths, pools, k.shape[1], limit)
    step = _Step(pools, block_table, lengths, config, serve.from_handle(serve.handle_of(dispatcher, strict), k))
    if serve.on_kernels(k) and k.shape[1] <= MAX_NEW_TOKENS:
        _on_kernels(step, news, phi_k, phi_v)
    else:
        _by_equations(step, news, phi_k, phi_v)


@dataclass(frozen=True)
class _Step:
    """What all launches of a step take."""

    pools: CachePools
    table: Tensor
    lengths: Tensor
    config: NSAConfig
    dispatcher: Dispatcher | None

    def launch(self, family: str, like: Tensor, tensors: dict[str, Any], d_v: int, hidden: int = 128) -> None:
        """Serve one kernel; `like` has the shape and dtype of new tokens."""
        pool = self.pools.k_raw.data
        shape = (like.shape, like.dtype, d_v, pool.shape, pool.dtype, self.table.shape, self.config, hidden)

        def problem() -> Problem:
            capacity = max(self.table.shape[1] * self.pools.page_size, like.shape[1])
            return describe(like, self.pools, self.config, capacity, d_v, hidden)

        tensors = {**tensors, "table": self.table, "lengths": self.lengths}
        serve.launch(self.dispatcher, kernels.get_spec(family), shape, problem, tensors, like.device)


def _branches(given: dict[str, tuple[Tensor | None, Tensor | None]], pools: CachePools, config: NSAConfig) -> News:
    """What each pool of its own gets; raises InvalidInput where that does not fit the pools."""
    news: News = {}
    for branch, both in given.items():
        for side, x in zip("kv", both, strict=True):
            name = side if branch == "raw" else f"{side}_{branch}"
            pool: Pages = getattr(pools, f"{side}_{branch}")
            own = branch == "raw" or pool.data is not getattr(pools, f"{side}_raw").data
            if own != (x is not None):
                values = {name: None if x is None else tuple(x.shape)}
                rule = f"{name} must be given if, and only if, its branch has a pool of its own"
                raise InvalidInput(rule, values, "Shared pools take the keys and values of all branches from k and v.")
            if x is not None:
                _check_new(name, x, pool, given["raw"][0])
        k, v = both
        if k is not None and v is not None:
            news[branch] = (k, v)
    paged_checks.check_pools(pools, news["raw"][0], config)
    return news


def _check_new(name: str, x: Tensor, pool: Pages, first: Tensor | None) -> None:
    """x is [B, Q, H, D] beside its pool, and counts the tokens of the first."""
    checks.check_tensor(name, x)
    if x.ndim != 4 or x.shape[1] < 1 or tuple(x.shape[2:]) != tuple(pool.data.shape[2:]):
        values = {"shape": tuple(x.shape), "pool": tuple(pool.data.shape)}
        raise InvalidInput(f"{name} must be [B, Q, H, D] with the heads and the head dim of its pool", values)
    if first is not None and (x.shape[:2] != first.shape[:2] or x.dtype != first.dtype or x.device != first.device):
        facts = {n: f"{tuple(t.shape)} {t.dtype} {t.device}" for n, t in (("k", first), (name, x))}
        raise InvalidInput(f"{name} must have the tokens, dtype and device of k", facts)


def _check_phi(phi_k: Phi, phi_v: Phi, news: News, config: NSAConfig) -> None:
    """Both or none, with weights for the head dims and in the dtype of the tokens."""
    if (phi_k is None) != (phi_v is None):
        raise InvalidInput("phi_k and phi_v come together", {}, "Pass both, or none for the mean.")
    for name, phi, x in (("phi_k", phi_k, news["raw"][0]), ("phi_v", phi_v, news["raw"][1])):
        if phi is None:
            continue
        _check_parts(name, phi, x)
        width, hidden = x.shape[3], phi.w1.shape[-1]
        want = {
            "w1": (config.compress_block_size * width, hidden),
            "b1": (hidden,),
            "w2": (hidden, width),
            "b2": (width,),
        }
        found = {part: tuple(getattr(phi, part).shape) for part in want}
        if found != want:
            raise InvalidInput(f"the weights of {name} must fit l, D and the hidden width", found, f"Here: {want}.")
    if phi_k is not None and phi_v is not None and phi_k.w1.shape[1] != phi_v.w1.shape[1]:
        widths = {"phi_k": phi_k.w1.shape[1], "phi_v": phi_v.w1.shape[1]}
        raise InvalidInput("phi_k and phi_v must have hidden layers of one width", widths)


def _check_parts(name: str, phi: PhiWeights | FoldedPhi, x: Tensor) -> None:
    """All on the device of x, weights of its dtype; what is folded, as `fold` makes it: kernels take no strides."""
    for part in fields(phi):
        tensor: Tensor = getattr(phi, part.name)
        if part.name in ("w1", "w2"):
            checks.check_same(f"{name}.{part.name}", tensor, x)
        else:
            checks.check_tensor(f"{name}.{part.name}", tensor)
            checks.check_device(f"{name}.{part.name}", tensor, x)
        if isinstance(phi, FoldedPhi):
            is_bias = part.name in ("b1", "b2")
            if not tensor.is_contiguous() or (is_bias and tensor.dtype != torch.float32):
                found = {"dtype": tensor.dtype, "strides": tensor.stride()}
                rule = f"{name}.{part.name} must be contiguous" + (" and float32" if is_bias else "")
                raise InvalidInput(rule, found, "Take it from fold().")


def _on_kernels(step: _Step, news: News, phi_k: Phi, phi_v: Phi) -> None:
    pools = step.pools
    for branch, (k, v) in news.items():
        tensors = {"k_new": _readable(k), "v_new": _readable(v)}
        tensors |= {**pages("k", getattr(pools, f"k_{branch}")), **pages("v", getattr(pools, f"v_{branch}"))}
        family = "kv_append_fwd"
        if branch == "raw" and phi_k is None:
            family = "cmp_pool_append_fwd"
            tensors |= {**pages("k_cmp", pools.k_cmp), **pages("v_cmp", pools.v_cmp)}
        step.launch(family, k, tensors, v.shape[3])
    if phi_k is None or phi_v is None:
        return
    made: dict[str, Any] = {**pages("k", pools.k_raw), **pages("v", pools.v_raw)}
    made |= {**pages("k_cmp", pools.k_cmp), **pages("v_cmp", pools.v_cmp)}
    for side, phi in (("k", phi_k), ("v", phi_v)):
        folded = fold(phi) if isinstance(phi, PhiWeights) else phi
        made |= {f"{side}_{part.name}": getattr(folded, part.name) for part in fields(FoldedPhi)}
    k, v = news["raw"]
    step.launch("cmp_mlp_append_fwd", k, {**made, "num_new": k.shape[1]}, v.shape[3], phi_k.w1.shape[1])


def _by_equations(step: _Step, news: News, phi_k: Phi, phi_v: Phi) -> None:
    pools, table, lengths = step.pools, step.table, step.lengths
    for branch, both in news.items():
        for side, x in zip("kv", both, strict=True):
            paged_append.write_tokens(getattr(pools, f"{side}_{branch}"), table, lengths, x)
    num_new = news["raw"][0].shape[1]
    for raw, cells, phi in ((pools.k_raw, pools.k_cmp, phi_k), (pools.v_raw, pools.v_cmp, phi_v)):
        weights = phi.unfolded(step.config) if isinstance(phi, FoldedPhi) else phi
        paged_append.write_compressed(raw, cells, table, lengths, num_new, step.config, weights)


def _readable(x: Tensor) -> Tensor:
    """x with vectors in one piece, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
