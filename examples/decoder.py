"""A small decoder: pre-norm, RMSNorm, short convolution, SwiGLU; attention is NativeSparseAttention or dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_autotune import NativeSparseAttention, NSAConfig
from nsa_autotune.nn.attention import rotary_angles, rotate

ATTENTIONS = ("nsa", "dense")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder; `nsa` holds the constants of the sparse branches."""

    vocabulary: int
    hidden: int = 512
    layers: int = 4
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float | None = None  # None: the short convolution alone tells the order
    compression: str = "mlp"  # of keys and values to a block, in sparse attention
    share_kv: bool = False  # among the branches of sparse attention
    nsa: NSAConfig = field(default_factory=NSAConfig)


class DenseAttention(nn.Module):
    """Causal grouped-query attention, rotary or not, by PyTorch's scaled_dot_product_attention."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = sizes.head_dim, sizes.rope_theta
        self.q_proj = nn.Linear(sizes.hidden, sizes.heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.out_proj = nn.Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, hidden]`; returns the shape of x."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            places = torch.arange(x.shape[1], device=x.device)
            cos, sin = rotary_angles(places, self.head_dim, self.rope_theta, q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, T, D]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out_proj(o.transpose(1, 2).flatten(-2))
        return out


class ShortConvolution(nn.Module):
    """x plus a causal depthwise convolution over the last `width` tokens: a value gets to know the key before it."""

    def __init__(self, hidden: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, 1, width).uniform_(-1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, hidden]`; returns the shape of x."""
        padded = F.pad(x.transpose(1, 2), (self.weight.shape[-1] - 1, 0))
        return x + F.conv1d(padded, self.weight, groups=x.shape[-1]).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), about 8/3 as wide as x."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        width = -(-hidden * 8 // 3 // 32) * 32
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape `[.., hidden]`."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    """x + attention(convolution(norm(x))), then x + swiglu(norm(x))."""

    def __init__(self, sizes: Sizes, attention: str) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.convolution, self.mlp = ShortConvolution(sizes.hidden), SwiGLU(sizes.hidden)
        if attention == "nsa":
            heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
            self.attention: nn.Module = NativeSparseAttention(
                sizes.hidden,
                *heads,
                config=sizes.nsa,
                compression=sizes.compression,
                rope_theta=sizes.rope_theta,
                share_kv=sizes.share_kv,
            )
        else:
            self.attention = DenseAttention(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, hidden]`; returns the shape of x."""
        x = x + self.attention(self.convolution(self.attention_norm(x)))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """Token ids `[B, T]` to logits `[B, T, vocabulary]`; embedding and output share their weights."""

    def __init__(self, sizes: Sizes, attention: str) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, attention) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.apply(_start)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every place."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def _start(module: nn.Module) -> None:
    """Normal weights that keep the variance; the compression inside NativeSparseAttention keeps its own."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
