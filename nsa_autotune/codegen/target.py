"""GPUs to compile for, and a driver that stands in for an absent one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownName

# largest dynamic shared memory of one program, bytes (CUDA programming guide, table of compute capabilities; CDNA3 ISA)
SHARED_LIMITS_BYTES = {
    "cuda:80": 166_912,
    "cuda:86": 101_376,
    "cuda:89": 101_376,
    "cuda:90": 232_448,
    "cuda:100": 232_448,
    "cuda:120": 101_376,
    "hip:gfx942": 65_536,
}


@dataclass(frozen=True)
class Target:
    """What to compile for: `cuda:90` is compute capability 9.0, `hip:gfx942` an MI300."""

    backend: str
    arch: int | str

    @property
    def name(self) -> str:
        """The form that users type."""
        return f"{self.backend}:{self.arch}"

    @property
    def warp_size(self) -> int:
        """Threads a warp."""
        return 64 if self.backend == "hip" else 32

    @property
    def has_dependent_launch(self) -> bool:
        """True where a kernel may start before the one ahead of it has ended (griddepcontrol, PTX ISA)."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def shared_limit_bytes(self) -> int:
        """Largest dynamic shared memory of one program."""
        return SHARED_LIMITS_BYTES[self.name]


def target_of_capability(capability: str) -> str:
    """The target of a CUDA GPU, which need not be a known one: `cuda:90` of "9.0"."""
    return f"cuda:{capability.replace('.', '')}"


def parse_target(name: str) -> Target:
    """`cuda:90` to a Target; raises UnknownName with the known ones."""
    if name not in SHARED_LIMITS_BYTES:
        known = ", ".join(SHARED_LIMITS_BYTES)
        raise UnknownName("no such compilation target", {"target": name}, f"Known targets: {known}.")
    backend, arch = name.split(":")
    return Target(backend, int(arch) if backend == "cuda" else arch)


def shared_limit_bytes(name: str) -> int:
    """Largest dynamic shared memory of one program on a target."""
    return parse_target(name).shared_limit_bytes


class _AbsentDriver:
    """Answers what Triton's compiler asks of a driver, for a GPU that is not there."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self._target.backend, self._target.arch, self._target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


@contextmanager
def absent_gpu(target: Target) -> Iterator[None]:
    """Within it, `kernel.run(..., warmup=True)` compiles for the target; nothing can be launched."""
    from triton.runtime import driver

    previous = getattr(driver, "_active", None)
    driver._active = _AbsentDriver(target)  # set_active and reset_active look for a real driver first
    try:
        yield
    finally:
        driver._active = previous
