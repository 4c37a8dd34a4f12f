"""A device that still computes: a sum and a product whose values are known, asked of it in a fresh process."""

from __future__ import annotations

import torch

from ..errors import WorkerError

COUNT = 1 << 20
SIDE = 64


def check_device(device: torch.device | str) -> None:
    """Raise WorkerError if the device computes wrongly; whatever it raises itself passes through."""
    numbers = torch.arange(1, COUNT + 1, dtype=torch.int64, device=device)
    known_sum = COUNT * (COUNT + 1) // 2
    digits = torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE) % 7  # products of these are exact
    known_product = digits.double() @ digits.double()
    product = (digits.to(device) @ digits.to(device)).double().cpu()
    found_sum = int(numbers.sum().item())
    if found_sum != known_sum or not torch.equal(product, known_product):
        worst = (product - known_product).abs().max().item()
        values = {"device": str(device), "sum": found_sum, "known_sum": known_sum, "error_of_product": worst}
        raise WorkerError("a device must compute what is known", values)
