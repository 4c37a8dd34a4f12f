"""Made-up activations with the traits that decide what a sparse pattern loses in a trained layer.

Logits q k^T / sqrt(D) are the sum of four parts: a sink on the first tokens; recency, a kernel of the distance that
fades over hundreds of tokens; topics, which queries share with stretches of keys far back; needles, short spans that
answer one topic twice as strongly. Noise of unit variance comes on top. Query heads weigh the parts differently.
Values tell the topic and their own noise. Trained layers differ in all of this: activations of one's own are better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput
from .activations import Activations, sha256_of

VERSION = 1  # of what a seed gives
MIN_DIM = 16  # of queries and keys: fewer do not hold the four parts
SINK_TOKENS = 4
NEEDLE_TOKENS = 16
NUM_NEEDLES = 8
NUM_TOPICS = 32
STRETCH_TOKENS = 96  # of one topic, on average
FREQUENCIES = (1 / 1024, 1 / 16)  # radians a token of recency, least and greatest
SINK, RECENCY, TOPIC, NOISE = 8.0, 3.0, 3.0, 1.0  # strengths of logits, natural units


@dataclass(frozen=True)
class Plan:
    """Which topic each token has, and where needles lie: the truth that tests compare with."""

    topics: Tensor  # [T], of queries and of keys
    needles: Tensor  # [NUM_NEEDLES], first token of each span; span j answers topic j


def make_plan(tokens: int, seed: int) -> Plan:
    """Topics change every STRETCH_TOKENS tokens on average; needles lie in the first three quarters."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(tokens, generator=generator) < 1 / STRETCH_TOKENS
    drawn = torch.randint(NUM_TOPICS, (tokens,), generator=generator)
    source = torch.where(changes, torch.arange(tokens), 0).cummax(0).values  # where the stretch began
    last = max(1, tokens * 3 // 4 - NEEDLE_TOKENS)
    return Plan(drawn[source], torch.randint(last, (NUM_NEEDLES,), generator=generator))


def make_activations(
    tokens: int, q_heads: int, kv_heads: int, d_qk: int, d_v: int, *, dtype: str = "float32", seed: int = 0
) -> Activations:
    """One sequence: q `[1, T, HQ, D_QK]`, k, v; equal arguments give equal values on equal versions of torch."""
    if d_qk < MIN_DIM or d_qk % 4:
        raise InvalidInput(
            f"made-up activations need a head dim of at least {MIN_DIM}, a multiple of 4", {"d_qk": d_qk}
        )
    if kv_heads < 1 or q_heads % kv_heads:
        raise InvalidInput("query heads are a multiple of kv heads", {"q_heads": q_heads, "kv_heads": kv_heads})
    plan, generator = make_plan(tokens, seed), torch.Generator().manual_seed(seed + 1)
    topics = _directions(NUM_TOPICS, d_qk // 2 - 1, generator)
    values = _directions(NUM_TOPICS, d_v, generator)
    q, k = _queries_and_keys(plan, topics, q_heads, kv_heads, d_qk, generator)
    rotations = torch.linalg.qr(
        torch.randn(kv_heads, d_qk, d_qk, generator=generator)
    ).Q  # no head has an axis to itself
    q = torch.einsum("thgd,hde->thge", q.unflatten(1, (kv_heads, -1)), rotations).flatten(1, 2)
    k = torch.einsum("thd,hde->the", k, rotations)
    own = torch.randn(tokens, kv_heads, d_v, generator=generator) / math.sqrt(d_v)
    v = values[plan.topics][:, None] + own
    kind = getattr(torch, dtype)
    q, k, v = (x[None].to(kind) for x in (q, k, v))
    origin = {"source": "generator", "version": VERSION, "seed": seed, "sha256": sha256_of(q, k, v)}
    return Activations(q, k, v, origin)


def _queries_and_keys(
    plan: Plan, topics: Tensor, q_heads: int, kv_heads: int, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """q `[T, HQ, D]` and k `[T, H, D]`: 1 dim of sink, D / 2 of recency, the rest content; their logits add up."""
    tokens, unit = plan.topics.numel(), math.sqrt(dim)
    place = torch.arange(tokens)
    low, high = (math.log(frequency) for frequency in FREQUENCIES)
    rates = torch.linspace(low, high, dim // 4).exp()
    angles = place[:, None] * rates
    recent = torch.cat([angles.cos(), angles.sin()], dim=-1) * math.sqrt(RECENCY * unit / rates.numel())  # [T, D / 2]
    sink = torch.where(place < SINK_TOKENS, 1.0, 0.0)[:, None] * math.sqrt(SINK * unit)
    q_content = topics[plan.topics] * math.sqrt(TOPIC * unit)  # [T, D / 2 - 1]
    k_content = q_content.clone()
    for topic, first in enumerate(plan.needles.tolist()):
        k_content[first : first + NEEDLE_TOKENS] = 2 * topics[topic] * math.sqrt(TOPIC * unit)
    noise = (NOISE * unit) ** 0.5 / q_content.shape[1] ** 0.25  # of both sides: their product has variance NOISE^2
    weights = torch.rand(q_heads, 3, generator=generator) + 0.5  # of sink, recency and content, in [0.5, 1.5)
    parts = (torch.full((tokens, 1), math.sqrt(SINK * unit)), recent, q_content)
    q = torch.cat([part[:, None] * weights[:, i, None] for i, part in enumerate(parts)], dim=-1)
    k = torch.cat([sink, recent, k_content], dim=-1)[:, None].repeat(1, kv_heads, 1)
    content = slice(dim - q_content.shape[1], dim)
    q[..., content] += noise * torch.randn(tokens, q_heads, q_content.shape[1], generator=generator)
    k[..., content] += noise * torch.randn(tokens, kv_heads, q_content.shape[1], generator=generator)
    return q, k


def _directions(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors `[count, dim]`."""
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)
