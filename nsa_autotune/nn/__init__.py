"""The model side: Native Sparse Attention as a plain torch.nn.Module."""

from __future__ import annotations

from .attention import NativeSparseAttention
from .cache import KVCache
from .phi import Phi

__all__ = ["KVCache", "NativeSparseAttention", "Phi"]
