"""What a measurement depends on besides the problem: the GPU and the software that drives it."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache

from ..errors import InvalidInput
from ..spec import digest


@dataclass(frozen=True)
class Fingerprint:
    """GPU name and capability; versions of driver, CUDA, torch, Triton and the assembler that Triton calls."""

    gpu: str
    capability: str  # "9.0"; "gfx942" of a target by AMD
    driver: str
    cuda: str
    torch: str
    triton: str
    assembler: str = ""  # "ptxas 12.8": TRITON_PTXAS_PATH, which torch.compile sets, exchanges Triton's own

    def to_dict(self) -> dict[str, str]:
        """By name, ready for JSON."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Short name of the whole fingerprint."""
        return digest(self.to_dict())


def _driver_version() -> str:
    """The NVIDIA driver's version, from NVML; "" where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return ""
    found = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)) == 0
    nvml.nvmlShutdown()
    return text.value.decode() if found else ""


def _assembler_version(arch: int) -> str:
    """The version of the ptxas that Triton would call for compute capability `arch` (90 is 9.0)."""
    from triton.backends.nvidia.compiler import get_ptxas

    return f"ptxas {get_ptxas(arch).version}"


@cache
def current(device: str = "cuda:0") -> Fingerprint:
    """The fingerprint of a CUDA device; raises InvalidInput where there is none."""
    import torch
    import triton

    if not torch.cuda.is_available():
        raise InvalidInput("a fingerprint needs a CUDA device", {"device": device}, "Use for_target() without a GPU.")
    properties = torch.cuda.get_device_properties(device)
    return Fingerprint(
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        driver=_driver_version(),
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        triton=triton.__version__,
        assembler=_assembler_version(10 * properties.major + properties.minor),
    )


def for_target(target: str) -> Fingerprint:
    """The fingerprint under which predictions for an absent GPU are stored."""
    import triton

    arch = target.split(":")[-1]
    capability = f"{arch[:-1]}.{arch[-1]}" if arch.isdigit() else arch
    return Fingerprint(f"target {target}", capability, driver="", cuda="", torch="", triton=triton.__version__)
