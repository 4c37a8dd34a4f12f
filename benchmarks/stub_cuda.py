"""A CUDA driver whose launches do nothing, so that the host's share of a launch can be measured without a GPU.

The real C launcher of Triton runs above a `libcuda.so.1` of empty functions, which a C compiler makes on the spot.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ANSWERING = """
typedef int R;
R cuGetErrorString(R error, const char **text) { *text = "stub"; return 0; }
R cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
R cuPointerGetAttribute(unsigned long long *data, int which, unsigned long long p) { *data = p; return 0; }
"""
SILENT = (
    *("cuInit", "cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cuModuleGetFunction"),
    *("cuModuleLoadData", "cuModuleUnload", "cuFuncSetAttribute", "cuFuncGetAttribute", "cuFuncSetCacheConfig"),
    *("cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxGetDevice"),
    *("cuCtxSetLimit", "cuCtxGetLimit", "cuOccupancyMaxActiveClusters", "cuStreamIsCapturing", "cuDriverGetVersion"),
    *("cuPointerGetAttributes", "cuStreamSynchronize", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyDtoHAsync_v2"),
)
CAPABILITY = 90


def build(folder: Path) -> None:
    """Make the library and load it, so that whoever asks for libcuda.so.1 gets it; before Triton is imported."""
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(ANSWERING + "".join(f"R {name}() {{ return 0; }}\n" for name in SILENT), encoding="utf-8")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # what is linked against the stub stays with it


class StubDriver:
    """What Triton asks of a driver: device 0 of the chosen capability, stream 0."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver

        self.launcher_cls = driver.CudaLauncher
        self._driver = driver
        self.utils: Any = SimpleNamespace()

    def install(self) -> None:
        """Become Triton's active driver for the rest of the process."""
        from triton.runtime import driver

        driver._active = self
        real = self._driver.CudaUtils()
        self.utils = SimpleNamespace(**{name: getattr(real, name) for name in vars(real)})
        self.utils.load_binary = lambda name, *rest: (1, 1, 32, 0, 1024)
        self.utils.unload_module = lambda module: None
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 232_448}

    def get_current_target(self) -> Any:
        """The GPU to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        """Always the first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Always the default one."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Where the tensors are."""
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What answers for CUDA in torch."""
        import torch

        return torch.cuda
