"""The decoder with a cache: what was said is not computed again, and the last few tokens can be taken back."""

from __future__ import annotations

import torch
from decoder import Decoder, Layer
from torch import Tensor
from torch.nn import functional as F

from nsa_autotune import KVCache, NativeSparseAttention
from nsa_autotune.nn.cache import MAX_NEW


class CachedDecoder:
    """Logits of new tokens `[B, Q]`, which are remembered; Q is up to MAX_NEW in a decode step, more are a prefill.

    Every layer has a `KVCache`, all over one block table, and a tail: the last inputs of its convolution, so many that
    MAX_NEW tokens can be taken back. `cache_dtype` float8_e4m3fn keeps keys and values in a byte.
    """

    def __init__(
        self,
        model: Decoder,
        max_tokens: int,
        batch: int = 1,
        *,
        page_size: int = 64,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.eval()
        attention = self._layers()[0].attention
        if not isinstance(attention, NativeSparseAttention):
            raise ValueError("a cache is for a model with --attention nsa")
        sizes = attention.cache_sizes()
        sizes |= {} if cache_dtype is None else {"dtype": cache_dtype}
        pages = batch * -(-max_tokens // page_size)
        room = {"num_pages": pages, "max_batch": batch, "max_tokens": max_tokens, "page_size": page_size}
        first = KVCache.paged(**room, **sizes)
        self.caches = [first, *(first.another_layer() for _ in self._layers()[1:])]
        weight = model.embedding.weight
        self.width = self._layers()[0].convolution.weight.shape[-1] - 1  # tokens before one that its convolution sees
        kept = self.width + MAX_NEW
        self.tails = [torch.zeros(batch, kept, weight.shape[1]).to(weight) for _ in self.caches]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, Q, vocabulary]` of what follows each of the new tokens."""
        x = self.model.embedding(tokens)
        for index, layer in enumerate(self._layers()):
            x = x + self._attention(index, layer, layer.attention_norm(x))
            x = x + layer.mlp(layer.mlp_norm(x))
        return F.linear(self.model.norm(x), self.model.embedding.weight)

    @property
    def length(self) -> int:
        """Tokens of the first sequence."""
        return self.caches[0].host_lengths[0]

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Takes back the tokens of a sequence from `length` on, MAX_NEW at most."""
        dropped = self.caches[0].host_lengths[sequence] - length
        if not 0 <= dropped <= MAX_NEW:
            raise ValueError(f"up to {MAX_NEW} tokens can be taken back, not {dropped}")
        self.caches[0].truncate(sequence, length)
        for tail in self.tails:
            tail[sequence] = F.pad(tail[sequence], (0, 0, dropped, 0))[: tail.shape[1]]

    def _attention(self, index: int, layer: Layer, x: Tensor) -> Tensor:
        known = torch.cat([self.tails[index], x], dim=1)
        self.tails[index] = known[:, -self.tails[index].shape[1] :].clone()
        seen = layer.convolution(known[:, -self.width - x.shape[1] :])[:, self.width :]
        attention: NativeSparseAttention = layer.attention  # type: ignore[assignment]
        step = attention.decode_step if x.shape[1] <= MAX_NEW else attention.prefill
        return step(seen, self.caches[index])

    def _layers(self) -> list[Layer]:
        return list(self.model.layers)  # type: ignore[arg-type]
