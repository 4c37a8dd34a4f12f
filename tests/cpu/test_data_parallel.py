"""Two processes on the CPU under DDP and FSDP2: gradients are those of one process with both batches."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from nsa_autotune import NativeSparseAttention, NSAConfig

WORLD, HIDDEN, TOKENS = 2, 16, 40
CONFIG = NSAConfig(8, 4, 16, num_selected=4, window_size=12)


def make_layer() -> nn.Module:
    """Equal weights in each process."""
    torch.manual_seed(0)
    return NativeSparseAttention(HIDDEN, 4, 2, 8, config=CONFIG, phi_hidden=16)


def batches() -> Tensor:
    """One batch for each process."""
    return torch.randn(WORLD, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def wanted() -> dict[str, Tensor]:
    """Gradients of the mean loss of both batches."""
    layer = make_layer()
    (layer(batches()).square().sum() / WORLD).backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def train(rank: int, kind: str, port: int) -> None:
    """One backward in one of the processes; raises if a gradient differs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        layer = make_layer()
        if kind == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(layer)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))  # type: ignore[assignment]
        wrapped(batches()[rank : rank + 1]).square().sum().backward()
        want = wanted()
        found = dict(layer.named_parameters())
        assert set(found) == set(want)
        for name, parameter in found.items():
            grad = parameter.grad
            assert grad is not None, name
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(whole, want[name], rtol=1e-4, atol=1e-5, msg=name)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(train, args=(kind, port), nprocs=WORLD)
