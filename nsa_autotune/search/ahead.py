"""Compile a batch of configs in parallel before they are measured: the worker then finds them in Triton's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..bench.result import TrialResult
from ..codegen.pool import CompileJob, compile_many
from ..codegen.target import SHARED_LIMITS_BYTES
from ..spec import Config, KernelSpec, Problem
from .space import config_key

MAX_SPILL_BYTES = 512  # a thread; more was never near the best
TIMEOUT_S = 90.0


class CompileAhead:
    """Compiles for the GPU that measures, in `batch` child processes; none of them touches it."""

    def __init__(self, target: str, processes: int) -> None:
        self.target = target
        self.batch = max(1, processes)

    def prepare(self, spec: KernelSpec, problem: Problem, configs: Sequence[Config]) -> Mapping[str, TrialResult]:
        """Failures by config key; what compiled is left to the measurement."""
        jobs = [CompileJob(spec.family, problem.to_dict(), config) for config in configs]
        refused: dict[str, TrialResult] = {}
        for outcome in compile_many({spec.family: spec}, jobs, self.target, self.batch, TIMEOUT_S):
            key = config_key(outcome.job.config)
            if outcome.status != "ok":
                refused[key] = TrialResult(outcome.status, outcome.reason)  # type: ignore[arg-type]
            elif outcome.resources is not None and outcome.resources.spill_bytes > MAX_SPILL_BYTES:
                reason = f"{outcome.resources.spill_bytes} bytes of registers spill a thread, over {MAX_SPILL_BYTES}"
                refused[key] = TrialResult("resource", reason)
        return refused


def compile_ahead(capability: str, processes: int) -> CompileAhead | None:
    """For a GPU of this capability ("9.0"), or None where one core or an unknown target makes it pointless."""
    target = f"cuda:{capability.replace('.', '')}"
    return CompileAhead(target, processes) if processes > 1 and target in SHARED_LIMITS_BYTES else None
