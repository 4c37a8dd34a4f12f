"""The model side: Native Sparse Attention as a plain torch.nn.Module."""

from __future__ import annotations

from .attention import NativeSparseAttention, Phi
from .cache import KVCache

__all__ = ["KVCache", "NativeSparseAttention", "Phi"]
