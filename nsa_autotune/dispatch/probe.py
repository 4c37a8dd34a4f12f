"""Two tiny kernels on which a prepared launch is compared with Triton's own, once a device; imported when needed."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 16, 64


@triton.jit
def scale_kernel(x_ptr, out_ptr, size, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(out_ptr + offsets, x * scale, mask=offsets < size)


@triton.jit
def copy_kernel(x_desc, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + rows * COLUMNS + columns, x_desc.load([0, 0]))


def launch(x, out, scale, use_maps, warmup=False):
    """out = x * scale + 1 in two launches, with a scratch tensor and an operator between them; [ROWS, COLUMNS]."""
    scaled = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 256),)
    scale_kernel.run(x, scaled, x.numel(), scale, BLOCK=256, grid=grid, warmup=warmup)
    scaled.add_(1.0)
    if use_maps:
        descriptor = TensorDescriptor(scaled, [ROWS, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS])
        copy_kernel.run(descriptor, out, ROWS=ROWS, COLUMNS=COLUMNS, grid=(1,), warmup=warmup)
    else:
        scale_kernel.run(scaled, out, x.numel(), 1.0, BLOCK=256, grid=grid, warmup=warmup)
