"""What the GPU does while it is measured: clocks, heat, power, throttling, other processes. Read only, never set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger("nsa_autotune")

# nvmlClocksEventReasons: hardware slowdown, software and hardware thermal slowdown, hardware power brake
SLOWED_DOWN = 0x8 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class GpuState:
    """One reading."""

    sm_clock_mhz: int
    memory_clock_mhz: int
    temperature_c: int
    power_w: float
    throttle_reasons: int  # NVML's bits
    other_processes: int  # that compute on the same GPU

    @property
    def slowed_down(self) -> bool:
        """True while heat or the power supply hold the clocks down; the usual power cap is no such state."""
        return bool(self.throttle_reasons & SLOWED_DOWN)


class Watch(Protocol):
    """Reads the state of the device under measurement."""

    def read(self) -> GpuState | None:
        """The state now, or None where nothing tells."""


class NoWatch:
    """For devices without NVML, such as the CPU."""

    def read(self) -> GpuState | None:
        """Nothing is known."""
        return None


class NvmlWatch:
    """The state of one GPU through NVIDIA's management library."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> GpuState | None:
        """The state now; None if the driver does not answer."""
        nvml, handle = self._nvml, self._handle
        try:
            return GpuState(
                sm_clock_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                memory_clock_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                temperature_c=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                throttle_reasons=int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
                other_processes=_others([p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]),
            )
        except nvml.NVMLError:
            return None


def make_watch(device: Any) -> Watch:
    """A watch for a torch device; says once, as a warning, why nothing can be recorded."""
    if device.type != "cuda":
        return NoWatch()
    import torch

    try:
        import pynvml
    except ImportError:
        logger.warning("clocks and temperature are not recorded: pip install nvidia-ml-py")
        return NoWatch()
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        logger.warning("clocks and temperature are not recorded: %s", error)
        return NoWatch()
    return NvmlWatch(pynvml, handle)


def _others(pids: Sequence[int]) -> int:
    """Processes besides this one and the tuner that started it.

    In a container NVML may give pids of the host, of which one is ours.
    """
    ours = (os.getpid(), os.getppid())
    return len(pids) - 1 if pids and ours[0] not in pids else sum(pid not in ours for pid in pids)


def was_disturbed(before: GpuState | None, after: GpuState | None) -> str:
    """Why samples between two readings are not worth keeping; empty if nothing speaks against them."""
    if before is None or after is None:
        return ""
    if after.slowed_down:
        return f"the GPU was slowed down (reasons {after.throttle_reasons:#x}, {after.temperature_c} C)"
    if after.other_processes > before.other_processes:
        return f"{after.other_processes - before.other_processes} processes joined the GPU"
    return ""


def summarize_states(states: Sequence[GpuState]) -> dict[str, Any]:
    """Smallest and largest of what was read, ready for the database; empty without a reading."""
    if not states:
        return {}
    return {
        "sm_clock_mhz_min": min(s.sm_clock_mhz for s in states),
        "sm_clock_mhz_max": max(s.sm_clock_mhz for s in states),
        "memory_clock_mhz": states[-1].memory_clock_mhz,
        "temperature_c_max": max(s.temperature_c for s in states),
        "power_w_max": max(s.power_w for s in states),
        "slowed_down": any(s.slowed_down for s in states),
        "other_processes": max(s.other_processes for s in states),
    }
