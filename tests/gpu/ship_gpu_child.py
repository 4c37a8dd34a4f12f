"""The module of one package on the GPU, in a process of its own: run by test_ship.

`python ship_gpu_child.py PACKAGE RESULT` writes output, gradients, times and how often Triton compiled.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from typing import Any

import torch
import triton.compiler
from cpu import ship_child

TOKENS, HIDDEN, HEADS, KV_HEADS, DIM = 8192, 1024, 64, 4, 128
REPEATS = 50


def count_compilations() -> list[str]:
    """Names of the kernels that Triton compiles from now on."""
    names: list[str] = []
    compile_kernel = triton.compiler.compile

    def counted(source: Any, *rest: Any, **named: Any) -> Any:
        names.append(source.name)
        return compile_kernel(source, *rest, **named)

    triton.compiler.compile = counted
    return names


def median_us(run: Any) -> float:
    """Of REPEATS runs, by events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for _ in range(5):
        run()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in events)


def main(package: str, result: str) -> None:
    """Compute and measure."""
    if package != "nsa_autotune":
        ship_child.BLOCKED = ship_child.BLOCKED[:-1]  # torch has imported numpy
        sys.meta_path[:] = [ship_child.Blocker()]
    compiled = count_compilations()
    torch.manual_seed(0)
    built = importlib.import_module(package).NativeSparseAttention(HIDDEN, HEADS, KV_HEADS, DIM)
    built = built.to("cuda", torch.bfloat16)
    x = torch.randn(1, TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    do = torch.randn_like(x)
    started = time.perf_counter()
    y = built(x)
    y.backward(do)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"first_s": time.perf_counter() - started, "compiled": list(compiled)}
    grads = {name: p.grad.cpu() for name, p in built.named_parameters()}
    found["tensors"] = {"y": y.detach().cpu(), "dx": x.grad.cpu(), **grads}
    with torch.no_grad():
        found["forward_us"] = median_us(lambda: built(x))
    found["training_us"] = median_us(lambda: built(x).backward(do))
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
