"""A CUDA driver that keeps what it is asked to launch and runs nothing: Triton's own launcher above it is the real one.

To be imported where Triton compiles, that is in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from triton import runtime
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia


@dataclass
class StubDriver:
    """Device 0, stream `stream`; `launches` holds the arguments of the C launcher, one tuple a kernel."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    device: int = 0
    stream: int = 0
    fails: str = ""
    loads: int = 0  # binaries
    loads_in: float = 0.0  # seconds that a binary takes
    loading: threading.Event = field(default_factory=threading.Event)  # set when one begins to
    lock: threading.Lock = field(default_factory=threading.Lock)

    launcher_cls = nvidia.CudaLauncher

    @property
    def utils(self) -> Any:
        return SimpleNamespace(
            launch=self.launch,
            build_signature_metadata=tuple,
            load_binary=self.load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            fill_tma_descriptor=self.tensor_map,
            fill_tma_descriptor_tiled=self.tensor_map,
        )

    def launch(self, *arguments: Any) -> None:
        """What the C function is called with."""
        if self.fails:
            raise RuntimeError(self.fails)
        with self.lock:
            self.launches.append(arguments)

    def load_binary(self, name: str, *rest: Any) -> tuple[int, int, int, int, int]:
        """A module, a function, registers, spills and the most threads."""
        self.loads += 1
        self.loading.set()
        time.sleep(self.loads_in)
        return 1, 1 + hash((name, rest[0])) % 0xFFFFFF, 32, 0, 1024  # another number for other machine code

    @staticmethod
    def tensor_map(address: int, *rest: Any) -> tuple[Any, ...]:
        """A descriptor as its arguments."""
        return ("map", address, *(tuple(x) if isinstance(x, (list, torch.Size)) else x for x in rest))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 * device + self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def take(self) -> list[tuple[Any, ...]]:
        """The launches since the last call."""
        with self.lock:
            found, self.launches = self.launches, []
        return found


@contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Within it, kernels are compiled for cuda:90 and launched on a stub."""
    stub, previous = StubDriver(), getattr(runtime.driver, "_active", None)
    changed = {
        "PyKernelArg": lambda **given: tuple(given.values()),
        **{name: name for name in ("ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE")},
        # Triton 3.6 builds a C file for every signature
        "compile_module_from_src": lambda **how: SimpleNamespace(launch=stub.launch),
        "library_dirs": list,
    }
    kept = {name: getattr(nvidia, name) for name in changed if hasattr(nvidia, name)}
    for name in kept:
        setattr(nvidia, name, changed[name])
    runtime.driver._active = stub
    try:
        yield stub
    finally:
        runtime.driver._active = previous
        for name, value in kept.items():
            setattr(nvidia, name, value)
