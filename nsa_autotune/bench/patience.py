"""How long a child may be silent in each stage: a compiler may take its time, a kernel on the device may not."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import Config, KernelSpec, Problem

LAUNCH_STAGES = ("launch", "timing")  # the host only waits for the device
LAUNCH_S = 2.0  # no launch counts as hung before
TIMES_EXPECTED = 50.0
MODEST_TFLOPS, MODEST_GB_S = 50.0, 500.0  # what any GPU with tensor cores reaches, for launches never timed


@dataclass(frozen=True)
class Patience:
    """Seconds of silence that are allowed: `host_s` while the host works, `launch_s` at least while a kernel runs."""

    host_s: float
    launch_s: float = LAUNCH_S

    def seconds(self, stage: str, expected_us: float) -> float:
        """The limit of one stage: for a launch 50 times what is expected of it, within both bounds."""
        if stage not in LAUNCH_STAGES:
            return self.host_s
        return min(self.host_s, max(self.launch_s, TIMES_EXPECTED * expected_us * 1e-6))


def guess_us(spec: KernelSpec, problem: Problem, config: Config) -> float:
    """Microseconds that a modest GPU would take for a launch, by its work alone; the config must be legal."""
    cost = spec.cost(problem, config)
    return cost.flops / (MODEST_TFLOPS * 1e6) + cost.bytes_moved / (MODEST_GB_S * 1e3)
