"""How much of dense attention a sparse pattern keeps on given activations; needs no trained gates or phi.

A query sees the union of its selected blocks and its window, up to itself. Blocks are chosen by the importance of
`reference` (Eq. 8-12) with phi = mean, since a learned phi is not known. The compressed branch adds no output here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..config import NSAConfig
from ..dense import Visible, attend
from ..errors import InvalidConfig
from .activations import Activations

DEFINITION = (
    "softmax over selected and window keys, selection by mean compression"  # part of what results are kept under
)


@dataclass(frozen=True)
class Quality:
    """What a pattern keeps; shares lie in [0, 1]."""

    mass_kept: float  # share of dense probability on visible keys, mean over queries and query heads
    mass_kept_p10: float  # its tenth percentile over queries and query heads
    output_error: float  # |o - o_dense| / |o_dense|, o being attention over the visible keys alone
    locality: float | None  # of the selection; None where no block was chosen freely by adjacent queries


@dataclass(frozen=True)
class Dense:
    """Dense causal attention of some queries: what patterns are compared with."""

    positions: Tensor  # [C], of the queries, ascending
    q: Tensor  # [B, C, HQ, D_QK]
    k: Tensor  # [B, T, H, D_QK]
    v: Tensor  # [B, T, H, D_V]
    o: Tensor  # [B, C, HQ, D_V]
    lse: Tensor  # [B, C, HQ]


def spread_positions(tokens: int, count: int) -> Tensor:
    """All positions, or `count` (an even number below) of them: pairs of neighbours, evenly spread up to the last."""
    if count >= tokens:
        return torch.arange(tokens)
    pairs = max(1, count // 2)
    first = torch.arange(1, pairs + 1) * tokens // pairs - 2
    return torch.stack([first.clamp(min=0), first.clamp(min=0) + 1], dim=1).flatten()


@torch.no_grad()
def dense_attention(activations: Activations, positions: Tensor) -> Dense:
    """Dense attention of the queries at `positions` `[C]`, in float32 (float64 for float64) and bounded memory."""
    exact = torch.float64 if activations.q.dtype == torch.float64 else torch.float32
    where = positions.to(activations.q.device)
    q, k, v = (x.to(exact) for x in (activations.q[:, where], activations.k, activations.v))
    o, lse = attend(q, k, v, where, _causal_span, lambda _, position, keys: keys <= position, None)
    return Dense(where, q, k, v, o, lse)


@torch.no_grad()
def measure_quality(dense: Dense, config: NSAConfig, group_size: int | None = None) -> Quality:
    """What NSA with these constants keeps of `dense`.

    A `group_size` above HQ / H stands for fewer kv heads, each the mean of neighbours as when GQA models are made from
    others: they choose the blocks and give the output; mass is that of the heads there are. InvalidConfig if it does
    not fit.
    """
    pooled = _pooled_heads(dense, group_size)
    k, v = (x.unflatten(2, (-1, pooled)).mean(3) for x in (dense.k, dense.v))
    blocks = choose_blocks(dense.q, k, config, dense.positions)
    visible = visible_keys(blocks, config, k.shape[1])

    def visible_to_heads(rows: slice, position: Tensor, keys: Tensor) -> Tensor:
        return visible(rows, position, keys).repeat_interleave(pooled, dim=1)

    o, lse = attend(dense.q, k, v, dense.positions, _causal_span, visible, None)
    if pooled > 1:
        _, lse = attend(dense.q, dense.k, dense.v, dense.positions, _causal_span, visible_to_heads, None)
    mass = (lse - dense.lse).exp().clamp(max=1.0).flatten()  # sum of dense probabilities; rounding may pass 1
    error = (o - dense.o).norm() / dense.o.norm().clamp(min=torch.finfo(o.dtype).tiny)
    p10 = mass.kthvalue(1 + (mass.numel() - 1) // 10).values
    return Quality(float(mass.double().mean()), float(p10), float(error), selection_locality(blocks, config, dense))


def choose_blocks(q: Tensor, k: Tensor, config: NSAConfig, positions: Tensor) -> Tensor:
    """Blocks of queries `[B, C, HQ, D]` at `positions` among keys `[B, T, H, D]`: int32 `[B, C, H, n]`, unused -1."""
    k_cmp, tokens = reference.compress_mean(k, config), k.shape[1]
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp[..., :1], config, seq_k=tokens, positions=positions)
    return reference.select_blocks(q, k_cmp, lse, config, seq_k=tokens, positions=positions)


def visible_keys(blocks: Tensor, config: NSAConfig, tokens: int) -> Visible:
    """Who sees what: keys of the chosen `blocks` `[B, C, H, n]` or of the window, up to the query itself."""
    unused = config.num_select_blocks(tokens)

    def visible(rows: slice, position: Tensor, keys: Tensor) -> Tensor:
        index = blocks[:, rows].long()
        chosen = torch.zeros(*index.shape[:-1], unused + 1, dtype=torch.bool, device=index.device)
        chosen.scatter_(-1, index.masked_fill(index < 0, unused), True)
        selected = chosen[..., keys // config.select_block_size].transpose(1, 2)[:, :, None]  # [B, H, 1, c, K]
        age = position - keys
        return (selected | (age < config.window_size)) & (age >= 0)

    return visible


def selection_locality(blocks: Tensor, config: NSAConfig, dense: Dense) -> float | None:
    """Share of freely chosen blocks that the token before chose too; None if there are none or no neighbours."""
    follows = (dense.positions.diff() == 1).nonzero()[:, 0]  # query i + 1 is the token behind query i
    before, after = blocks[:, follows], blocks[:, follows + 1]
    own = (dense.positions[follows + 1] // config.select_block_size)[:, None, None]
    free = (after >= config.num_initial) & (after <= own - config.num_local)
    if not bool(free.any()):
        return None
    kept = (after[..., None] == before[..., None, :]).any(-1)
    return float(kept[free].double().mean())


def _causal_span(_: int, last: int) -> tuple[int, int]:
    return 0, last + 1


def _pooled_heads(dense: Dense, group_size: int | None) -> int:
    """How many kv heads become one."""
    q_heads, kv_heads = dense.q.shape[2], dense.k.shape[2]
    given = q_heads // kv_heads
    wanted = given if group_size is None else group_size
    if wanted < given or wanted % given or q_heads % wanted:
        raise InvalidConfig(
            "a group size must divide the query heads and be a multiple of the activations' own",
            {"group_size": wanted, "q_heads": q_heads, "kv_heads": kv_heads},
            "kv heads can be averaged, not invented: give activations with more of them.",
        )
    return wanted // given
