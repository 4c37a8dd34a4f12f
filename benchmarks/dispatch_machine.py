"""Where `dispatch.py` launches: a GPU, or the memory of a CPU with a driver that does nothing."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from forward import gpu_slug

from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.ops import checks, serve


@contextmanager
def machine() -> Iterator[tuple[torch.device, dict[str, str]]]:
    """The device to launch on and its facts: a GPU, or the CPU's memory and a stub."""
    import triton

    versions = {"torch, Triton": f"{torch.__version__}, {triton.__version__}", "Python": platform.python_version()}
    if torch.cuda.is_available():
        here = current("cuda:0")
        gpu = {"GPU": here.gpu, "driver, CUDA": f"{here.driver}, {here.cuda}", "slug": gpu_slug(here.gpu)}
        yield torch.device("cuda:0"), {**gpu, **versions}
        return
    import stub_cuda

    with tempfile.TemporaryDirectory() as folder, serving_cpu_tensors():
        stub_cuda.build(Path(folder))
        stub_cuda.StubDriver().install()
        load_1m = os.getloadavg()[0]
        stub = {"GPU": f"none: stub driver, kernels compiled for cuda:{stub_cuda.CAPABILITY}", "slug": "cpu-stub"}
        cores = f"{os.cpu_count()}, load average {load_1m:.1f} at the start"
        yield torch.device("cpu"), {**stub, "CPU cores": cores, **versions}


@contextmanager
def serving_cpu_tensors() -> Iterator[None]:
    """Within it, tensors of the CPU take the way of CUDA tensors."""
    kept = serve.on_kernels, torch.cuda.current_device, checks.values_are_known
    serve.on_kernels, torch.cuda.current_device = (lambda x: True), (lambda: None)  # torch.device("cpu").index
    checks.values_are_known = lambda x: False  # a GPU's are not looked at
    try:
        yield
    finally:
        serve.on_kernels, torch.cuda.current_device, checks.values_are_known = kept
