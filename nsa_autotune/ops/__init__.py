"""The operators of Native Sparse Attention: generated kernels on CUDA tensors, the PyTorch reference on others."""

from .attention import nsa_attention
from .branches import combine, compress, compressed_attention, select_blocks, selected_attention, window_attention

__all__ = [
    "combine",
    "compress",
    "compressed_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
