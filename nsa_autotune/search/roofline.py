"""A roofline with occupancy and waves, to order compiled candidates that cannot be measured.

It knows nothing of instruction schedules, bank conflicts or cache hits. Its constants are public data sheets and, for
shares, spills and loads in flight, what the shipped winners and their defaults suggest: its microseconds say which of
two configs to try first, and are never a substitute for a measurement.
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
WARP_ROWS = 16  # of a matrix instruction: warps beyond a tile's rows share its columns out
COLUMNS_OVERHEAD = 8  # columns that a warp's part of a tile costs more than it has: the narrowest instruction
BYTES_SHARE = 0.85  # of the bandwidths likewise
HALF_RATE_WARPS = 4  # warps on a multiprocessor that reach half of the peak
HBM_IN_FLIGHT_BYTES = 32 * 1024  # on each multiprocessor, for full bandwidth at the latency of device memory
LAUNCH_US = 3.0  # from one kernel to the next
WAVE_US = 1.0  # a wave of programs after the first, however small: their start and the latency of their loads
SPILL_BYTES_PER_DOUBLING = 2048  # stack bytes a thread that are guessed to double the time
L1_MISS_SHARE = 0.6  # of on-chip bytes: neighbouring programs read the same tiles
LOADS_IN_FLIGHT_BYTES = 64  # a thread that loads without staging
LAST_WAVE_SHARE = 0.5  # of the idle part of the last wave that counts: programs drift apart and fill the other half


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
    warp_size: int = 32
    reserved_shared_bytes: int = 1024  # the driver's, a program


GPU_MODELS: Mapping[str, GpuModel] = MappingProxyType(
    {
        "cuda:80": GpuModel("A100 SXM 80GB", 312, 19.5, 2.04, 4.5, 108, 167_936),
        "cuda:86": GpuModel("RTX A6000", 154.8, 38.7, 0.768, 2.5, 84, 102_400, warps_per_sm=48, programs_per_sm=16),
        "cuda:89": GpuModel("L40S", 362, 91.6, 0.864, 4.5, 142, 102_400, warps_per_sm=48, programs_per_sm=24),
        "cuda:90": GpuModel("H100 SXM", 989, 67, 3.35, 5.5, 132, 233_472),
        "cuda:100": GpuModel("B200", 2250, 80, 8.0, 10.0, 148, 233_472),
        "cuda:120": GpuModel("RTX 5090", 209.5, 104.8, 1.79, 6.0, 170, 102_400, warps_per_sm=48, programs_per_sm=24),
        "hip:gfx942": GpuModel(
            "MI300X",
            1307.4,
            163.4,
            5.3,
            17.2,  # of the Infinity Cache
            304,
            65_536,
            registers_per_sm=131_072,
            warps_per_sm=32,
            warp_size=64,
            reserved_shared_bytes=0,
        ),
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
    @property
    def num_programs(self) -> int: ...  # of a launch; 0 if it is not known


@dataclass(frozen=True)
class Terms:
    """What a guess is made of."""

    arithmetic_us: float
    memory_us: float  # device memory
    l2_us: float
    spill_factor: float  # of the time
    tail_factor: float  # of the time: idle multiprocessors at the end, or all along in a small launch
    occupancy: float  # warps resident, 0 to 1
    waves: float  # programs over programs that fit at once; 0 if the number of programs is not known

    @property
    def time_us(self) -> float:
        """The three, which overlap but in part, made longer by spills and tail, plus the starts of waves."""
        busy_us = math.hypot(self.arithmetic_us, self.memory_us, self.l2_us)
        return busy_us * self.spill_factor * self.tail_factor + WAVE_US * max(0.0, self.waves - 1.0) + LAUNCH_US


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
    registers = max(1, math.ceil(resources.registers / 8)) * 8 * gpu.warp_size * warps  # handed out by 8 a thread
    shared = resources.shared_bytes + gpu.reserved_shared_bytes
    return min(
        gpu.programs_per_sm,
        gpu.warps_per_sm // warps,
        gpu.registers_per_sm // registers,
        gpu.shared_per_sm_bytes // max(1, shared),
    )


def occupancy(resources: ResourcesLike, gpu: GpuModel) -> float:
    """Fraction of the warps of a multiprocessor that are resident, 0 to 1."""
    return programs_per_sm(resources, gpu) * resources.num_warps / gpu.warps_per_sm


def predict_us(cost: Cost, resources: ResourcesLike, gpu: GpuModel, dtype: str = "bfloat16") -> float:
    """Guessed time of one launch in us; raises KernelError for a variant that does not fit on a multiprocessor."""
    return model_terms(cost, resources, gpu, dtype).time_us


def model_terms(cost: Cost, resources: ResourcesLike, gpu: GpuModel, dtype: str = "bfloat16") -> Terms:
    """The parts of the guess.

    `cost.mma_flops` holds the padding of the tiles. Arithmetic is slow with few resident warps, memory with few bytes
    in flight. Raises KernelError for a variant that does not fit on a multiprocessor.
    """
    fitting = programs_per_sm(resources, gpu)
    if fitting == 0:
        raise KernelError(
            "a program must fit on a multiprocessor",
            {name: getattr(resources, name) for name in ("registers", "shared_bytes", "num_warps")},
            "Use smaller tiles or fewer warps.",
        )
    share = resources.num_programs / gpu.num_sms  # programs a multiprocessor gets
    resident = min(fitting, max(1, math.ceil(share))) if share else fitting
    warps = resident * resources.num_warps
    hiding = warps / (warps + HALF_RATE_WARPS)
    in_flight = max(resident * resources.shared_bytes, warps * gpu.warp_size * LOADS_IN_FLIGHT_BYTES)
    fed = min(1.0, in_flight / HBM_IN_FLIGHT_BYTES)
    return Terms(
        arithmetic_us=_arithmetic_us(cost, gpu, dtype) / hiding / _tile_share(cost, resources.num_warps),
        memory_us=cost.bytes_moved / (gpu.hbm_tbps * BYTES_SHARE * fed) / 1e6,
        l2_us=L1_MISS_SHARE * cost.on_chip_bytes / (gpu.l2_tbps * BYTES_SHARE * fed) / 1e6,
        spill_factor=2 ** (resources.spill_bytes / SPILL_BYTES_PER_DOUBLING),
        tail_factor=_tail_factor(share, resident),
        occupancy=occupancy(resources, gpu),
        waves=share / fitting,
    )


def _tail_factor(share: float, resident: int) -> float:
    """Time over the time of a launch that keeps every multiprocessor busy to the end."""
    if share == 0:
        return 1.0
    if share <= resident:  # one wave: the fullest multiprocessor decides
        return math.ceil(share) / share
    waves = share / resident
    return 1.0 + LAST_WAVE_SHARE * (math.ceil(waves) / waves - 1.0)


def _tile_share(cost: Cost, num_warps: int) -> float:
    """Share of its rate that a tile of scores reaches: narrow parts pay for their start, sums and exponents."""
    if not cost.tile_columns:
        return 1.0
    columns = cost.tile_columns / max(1.0, WARP_ROWS * num_warps / cost.tile_rows)
    return columns / (columns + COLUMNS_OVERHEAD)


def _arithmetic_us(cost: Cost, gpu: GpuModel, dtype: str) -> float:
    """Matrix products at their rate, other operations and all of float32 on the vector units."""
    products = cost.mma_flops or cost.flops
    rate = gpu.vector_tflops if dtype == "float32" else gpu.mma_tflops
    others = max(0.0, cost.flops - products)  # 0 in a kernel of padded products
    return (products / rate + others / gpu.vector_tflops) / MMA_SHARE / 1e6
