"""The learned compression's weights as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import NSAConfig
from ..reference import PhiWeights


@dataclass(frozen=True)
class FoldedPhi:
    """phi as the kernels take it: the share of the position encoding is part of b1, biases are float32.

    All parts are contiguous: kernels take no strides of them.
    """

    w1: Tensor  # [l * D, HIDDEN]
    b1: Tensor  # [HIDDEN] float32
    w2: Tensor  # [HIDDEN, D]
    b2: Tensor  # [D] float32

    def unfolded(self, config: NSAConfig) -> PhiWeights:
        """As the equations take it."""
        dtype, rows = self.w1.dtype, config.compress_block_size
        position = self.w1.new_zeros(rows, self.w2.shape[1])
        return PhiWeights(position, self.w1, self.b1.to(dtype), self.w2, self.b2.to(dtype))


@torch.no_grad()
def fold(phi: PhiWeights) -> FoldedPhi:
    """Weights for kernels; those for `append` are made once, for weights that stay as they are."""
    b1, b2 = folded_bias(phi), phi.b2.float().contiguous()
    return FoldedPhi(phi.w1.contiguous(), b1, phi.w2.contiguous(), b2)


def folded_bias(phi: PhiWeights) -> Tensor:
    """b1 + flatten(position) w1 in float32: phi is linear before its activation."""
    return (phi.b1.float() + phi.position.float().flatten() @ phi.w1.float()).contiguous()
