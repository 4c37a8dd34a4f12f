"""The learned compression of blocks, as a module and as the kernels of a decode step take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.phi import FoldedPhi, fold
from ..reference import PhiWeights


class Phi(nn.Module):
    """The learned compression of Eq. 7, `[l, D] -> [D]`, shared by the heads: silu((x + position) w1 + b1) w2 + b2."""

    def __init__(self, block_size: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(block_size, dim))  # [l, D]
        self.w1 = nn.Parameter(torch.empty(block_size * dim, hidden))
        self.b1 = nn.Parameter(torch.empty(hidden))
        self.w2 = nn.Parameter(torch.empty(hidden, dim))
        self.b2 = nn.Parameter(torch.empty(dim))
        self._folded: tuple[tuple[object, ...], FoldedPhi] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights that keep the variance, a faint position encoding, no biases."""
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.w1, std=self.w1.shape[0] ** -0.5)
        nn.init.normal_(self.w2, std=self.w2.shape[0] ** -0.5)
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    def weights(self, dtype: torch.dtype) -> PhiWeights:
        """The weights in the dtype of the tokens that they compress; differs from their own under autocast."""
        return PhiWeights(*(w.to(dtype) for w in self._parts()))

    @torch.no_grad()
    def folded(self, dtype: torch.dtype) -> FoldedPhi:
        """The weights as a decode step takes them: made once, and again when a parameter has changed.

        The biases stay in their place then, so that a captured graph goes on with the new ones after the next step.
        What is written through `.data` goes unnoticed, as it does by autograd.
        """
        key = (dtype, *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in self._parts()))
        if self._folded is not None and self._folded[0] == key:
            return self._folded[1]
        with torch.inference_mode(False):  # else they could not be changed outside of it
            new = fold(self.weights(dtype))
            b1, b2 = new.b1, new.b2.clone()  # which may be the parameter itself
            if self._folded is not None and self._folded[1].b1.device == b1.device:
                b1, b2 = self._folded[1].b1.copy_(b1), self._folded[1].b2.copy_(b2)
        self._folded = (key, FoldedPhi(new.w1, b1, new.w2, b2))
        return self._folded[1]

    def _parts(self) -> tuple[Tensor, ...]:
        return self.position, self.w1, self.b1, self.w2, self.b2

    def __getstate__(self) -> dict[str, object]:
        """What copies and files get: the folded weights are made from the others."""
        return {**self.__dict__, "_folded": None}
