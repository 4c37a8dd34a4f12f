"""Values that random numbers alone do not give: a causal selection with locality, and log-sum-exps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import NSAConfig

LSE_EXCESS = 0.5  # of log(mean exp(s)) over log(1), for scores of unit variance
SCORE_ELEMENTS = 1 << 26  # most scores held at once by `causal_lse`, in float32 elements


def select_at_random(
    positions: Tensor, batch: int, num_kv_heads: int, config: NSAConfig, locality: float, generator: torch.Generator
) -> Tensor:
    """A valid selection for queries at `positions` `[TQ]`: int32 `[B, TQ, H, n]`, ascending, unused slots -1 last.

    The f free slots share the free blocks out by residue (slot s draws from blocks s, s+f, s+2f, ...), which keeps them
    distinct, and each keeps its block from the token before with probability `locality`.
    """
    device, tokens = positions.device, positions.numel()
    initial, local = config.num_initial, config.num_local
    own = positions.long().div(config.select_block_size, rounding_mode="floor")[:, None]  # [TQ, 1]
    none = torch.iinfo(torch.int32).max  # sorts behind every block
    first = torch.arange(initial, device=device)
    last = own - local + 1 + torch.arange(local, device=device)
    forced = torch.cat(
        [torch.where(first <= own, first, none), torch.where((last >= initial) & (last >= 0), last, none)], dim=1
    )  # [TQ, initial + local]
    shape = (batch, tokens, num_kv_heads)
    free = _free_blocks(own, shape, config, locality, generator)
    blocks = torch.cat([forced[None, :, None].expand(*shape, -1), free], dim=-1).int().sort(dim=-1).values
    return blocks.masked_fill_(blocks == none, -1)


def _free_blocks(
    own: Tensor, shape: tuple[int, int, int], config: NSAConfig, locality: float, generator: torch.Generator
) -> Tensor:
    """The free blocks `[B, TQ, H, f]`, int32 maximum where there is none; `own` `[TQ, 1]` is each token's block."""
    device = own.device
    slots = config.num_selected - config.num_initial - config.num_local
    slot = torch.arange(slots, device=device)
    candidates = (own - config.num_local + 1 - config.num_initial).clamp_(min=0)  # [TQ, 1]
    choices = (
        (candidates - slot + slots - 1).div(max(slots, 1), rounding_mode="floor").clamp_(min=0)[:, None]
    )  # [TQ, 1, f]
    drawn = (torch.rand(*shape, slots, device=device, generator=generator) * choices).long()
    drawn = torch.minimum(drawn, (choices - 1).clamp(min=0))  # a product may round up to `choices`
    renewed = torch.rand(*shape, slots, device=device, generator=generator) >= locality
    renewed[:, 1:] |= (candidates[1:] < candidates[:-1])[
        :, :, None
    ]  # another sequence begins: its past has fewer blocks
    token = torch.arange(shape[1], device=device)[:, None, None]
    source = torch.where(renewed, token, 0).cummax(dim=1).values if shape[1] else drawn  # when each slot was drawn last
    block = config.num_initial + slot + slots * drawn.gather(1, source)
    return block.masked_fill(choices == 0, torch.iinfo(torch.int32).max)


def causal_lse(q: Tensor, k_cmp: Tensor, positions: Tensor, config: NSAConfig, scale: float) -> Tensor:
    """log sum exp of q k_cmp^T scale over the visible compressed blocks: float32 `[B, TQ, HQ]`, -inf without any.

    q `[B, TQ, HQ, D_QK]`, k_cmp `[B, NC, H, D_QK]`, positions `[TQ]` ascending; scores are formed in chunks of queries.
    """
    batch, tokens, q_heads = q.shape[:3]
    num_cmp, kv_heads = k_cmp.shape[1], k_cmp.shape[2]
    lse = torch.full((batch, tokens, q_heads), -math.inf, device=q.device)
    visible = (positions.long() - config.compress_block_size + 1).div(config.compress_stride, rounding_mode="floor") + 1
    visible = visible.clamp_(0, num_cmp)  # [TQ]
    keys = k_cmp.float().permute(0, 2, 3, 1)  # [B, H, D_QK, NC]
    chunk = max(1, SCORE_ELEMENTS // max(1, batch * q_heads * num_cmp))
    for start in range(0, tokens, chunk):
        seen = visible[start : start + chunk]
        limit = int(seen.max())
        if limit == 0:
            continue
        rows = q[:, start : start + chunk].float().unflatten(2, (kv_heads, -1)).movedim(2, 1)  # [B, H, C, G, D_QK]
        scores = (rows.flatten(2, 3) @ keys[..., :limit] * scale).unflatten(2, rows.shape[2:4])  # [B, H, C, G, limit]
        hidden = torch.arange(limit, device=q.device) >= seen[:, None, None]  # [C, 1, limit]
        part = scores.masked_fill_(hidden, -math.inf).logsumexp(-1)  # [B, H, C, G]
        lse[:, start : start + chunk] = part.movedim(1, 2).flatten(2)
    return lse


def likely_lse(fill: str, positions: Tensor, config: NSAConfig) -> Tensor:
    """About the log-sum-exp of queries at `positions` `[TQ]` in branch `lse_cmp`, `lse_slc` or `lse_win`: `[TQ]`.

    The number of visible keys tells it for scores of unit variance; -inf where there is none.
    """
    before = (positions.double() + 1).clamp_(min=0)  # keys up to the query
    if fill == "lse_cmp":
        past = (before - config.compress_block_size).div(config.compress_stride, rounding_mode="floor")
        keys = (past + 1).clamp_(min=0)
    else:
        reach = config.window_size if fill == "lse_win" else config.num_selected * config.select_block_size
        keys = before.clamp(max=reach)
    return (keys.log() + LSE_EXCESS).float()
