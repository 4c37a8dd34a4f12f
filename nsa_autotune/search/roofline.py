"""A roofline with occupancy, to order compiled candidates that cannot be measured.

It knows nothing of instruction schedules, bank conflicts, cache hits or tails, and its constants are public data sheets
and guesses: its microseconds say which of two configs to try first, and are never a substitute for a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from ..errors import KernelError
from ..spec import Cost
from .presets import unknown_name

MMA_SHARE = 0.7  # of the peak that a good kernel with many warps reaches
BYTES_SHARE = 0.85  # of the bandwidths likewise
HALF_RATE_WARPS = 4  # warps on a multiprocessor that reach half of the peak
HBM_IN_FLIGHT_BYTES = 32 * 1024  # on each multiprocessor, for full bandwidth at the latency of device memory
LAUNCH_US = 3.0  # from one kernel to the next
SPILL_BYTES_PER_DOUBLING = 256  # stack bytes a thread that are guessed to double the time
RESERVED_SHARED_BYTES = 1024  # the driver's, a program


@dataclass(frozen=True)
class GpuModel:
    """What the model knows of a GPU; rates are dense and without sparsity."""

    name: str
    mma_tflops: float  # bf16 products with fp32 sums
    vector_tflops: float  # fp32 outside the matrix units
    hbm_tbps: float  # device memory, 1e12 bytes/s
    l2_tbps: float  # L2 to the multiprocessors, 1e12 bytes/s; a guess
    num_sms: int
    shared_per_sm_bytes: int
    registers_per_sm: int = 65_536
    warps_per_sm: int = 64
    programs_per_sm: int = 32


GPU_MODELS: Mapping[str, GpuModel] = MappingProxyType(
    {
        "cuda:80": GpuModel("A100 SXM 80GB", 312, 19.5, 2.04, 4.5, 108, 167_936),
        "cuda:86": GpuModel("RTX A6000", 154.8, 38.7, 0.768, 2.5, 84, 102_400, warps_per_sm=48, programs_per_sm=16),
        "cuda:89": GpuModel("L40S", 362, 91.6, 0.864, 4.5, 142, 102_400, warps_per_sm=48, programs_per_sm=24),
        "cuda:90": GpuModel("H100 SXM", 989, 67, 3.35, 5.5, 132, 233_472),
        "cuda:100": GpuModel("B200", 2250, 80, 8.0, 10.0, 148, 233_472),
        "cuda:120": GpuModel("RTX 5090", 209.5, 104.8, 1.79, 6.0, 170, 102_400, warps_per_sm=48, programs_per_sm=24),
    }
)


class ResourcesLike(Protocol):
    """What a compiled variant takes: the part of codegen's report that the model reads."""

    @property
    def registers(self) -> int: ...  # a thread
    @property
    def shared_bytes(self) -> int: ...  # a program
    @property
    def spill_bytes(self) -> int: ...  # a thread
    @property
    def num_warps(self) -> int: ...  # a program


def gpu_model(target: str, gpu: str = "") -> GpuModel:
    """The model of a target such as `cuda:90`; `gpu` is a device name that tells H200 from H100."""
    if target not in GPU_MODELS:
        raise unknown_name("GPU model", target, GPU_MODELS)
    if target == "cuda:90" and "H200" in gpu.upper():
        return replace(GPU_MODELS[target], name="H200 SXM", hbm_tbps=4.8)
    return GPU_MODELS[target]


def programs_per_sm(resources: ResourcesLike, gpu: GpuModel) -> int:
    """Programs that fit on one multiprocessor at once; 0 if the variant cannot run."""
    warps = resources.num_warps
    registers = max(1, math.ceil(resources.registers / 8)) * 8 * 32 * warps  # handed out by 8 a thread
    shared = resources.shared_bytes + RESERVED_SHARED_BYTES
    return min(
        gpu.programs_per_sm,
        gpu.warps_per_sm // warps,
        gpu.registers_per_sm // registers,
        gpu.shared_per_sm_bytes // shared,
    )


def occupancy(resources: ResourcesLike, gpu: GpuModel) -> float:
    """Fraction of the warps of a multiprocessor that are resident, 0 to 1."""
    return programs_per_sm(resources, gpu) * resources.num_warps / gpu.warps_per_sm


def predict_us(cost: Cost, resources: ResourcesLike, gpu: GpuModel, dtype: str = "bfloat16") -> float:
    """Guessed time of one launch in us: the slowest of arithmetic, device memory and L2, plus the launch.

    `cost.mma_flops` holds the padding of the tiles. Arithmetic is slow with few resident warps, memory with few bytes
    in flight, both with spills. Raises KernelError for a variant that does not fit on a multiprocessor.
    """
    programs = programs_per_sm(resources, gpu)
    if programs == 0:
        raise KernelError(
            "a program must fit on a multiprocessor",
            {name: getattr(resources, name) for name in ("registers", "shared_bytes", "num_warps")},
            "Use smaller tiles or fewer warps.",
        )
    warps = programs * resources.num_warps
    hiding = warps / (warps + HALF_RATE_WARPS)
    in_flight = max(programs * resources.shared_bytes, warps * 32 * 16)  # staged tiles, or 16 bytes a thread
    fed = min(1.0, in_flight / HBM_IN_FLIGHT_BYTES)
    busy_us = max(
        _arithmetic_us(cost, gpu, dtype) / hiding,
        cost.bytes_moved / (gpu.hbm_tbps * BYTES_SHARE * fed) / 1e6,
        cost.on_chip_bytes / (gpu.l2_tbps * BYTES_SHARE * fed) / 1e6,
    )
    return busy_us * 2 ** (resources.spill_bytes / SPILL_BYTES_PER_DOUBLING) + LAUNCH_US


def _arithmetic_us(cost: Cost, gpu: GpuModel, dtype: str) -> float:
    """Matrix products at their rate, other operations and all of float32 on the vector units."""
    products = cost.mma_flops or cost.flops
    rate = gpu.vector_tflops if dtype == "float32" else gpu.mma_tflops
    others = max(0.0, cost.flops - products)  # 0 in a kernel of padded products
    return (products / rate + others / gpu.vector_tflops) / MMA_SHARE / 1e6
