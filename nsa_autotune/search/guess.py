"""The cost model applied to what the database holds: a record's GPU, its compiled resources, its guessed time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codegen.target import target_of_capability
from ..db.records import TrialRecord
from ..spec import Config, KernelSpec, Problem
from .roofline import GPU_MODELS, GpuModel, Terms, gpu_model, model_terms, programs_per_sm

PERSISTENT = "programs_per_sm"  # the parameter of kernels that start as many programs as the GPU has room for


@dataclass(frozen=True)
class Compiled:
    """What a stored variant takes: the part of its resources that the model reads."""

    registers: int
    shared_bytes: int
    spill_bytes: int
    num_warps: int
    num_programs: int = 0


def target_of(fingerprint: Mapping[str, str]) -> str:
    """The compilation target of a fingerprint, of a GPU or of a prediction: such as `cuda:90`; it may be unknown."""
    name = fingerprint["gpu"]
    if name.startswith("target "):
        return name.removeprefix("target ")
    return target_of_capability(fingerprint["capability"])


def gpu_of(fingerprint: Mapping[str, str]) -> GpuModel | None:
    """The model of a fingerprint's GPU, None if there is none."""
    target = target_of(fingerprint)
    return gpu_model(target, fingerprint["gpu"]) if target in GPU_MODELS else None


def compiled_of(resources: Mapping[str, Any] | None, config: Config, gpu: GpuModel) -> Compiled | None:
    """Stored resources as numbers; None if some are missing or no program fits on a multiprocessor.

    A persistent kernel was compiled as for one multiprocessor: its programs are those of one.
    """
    names = ("registers", "shared_bytes", "spill_bytes", "num_warps")
    if resources is None or not all(isinstance(resources.get(name), int) for name in names):
        return None
    found = Compiled(
        registers=resources["registers"],
        shared_bytes=resources["shared_bytes"],
        spill_bytes=resources["spill_bytes"],
        num_warps=resources["num_warps"],
        num_programs=int(resources.get("num_programs", 0)) * (gpu.num_sms if PERSISTENT in config else 1),
    )
    return found if programs_per_sm(found, gpu) > 0 else None


def terms_of(
    spec: KernelSpec, problem: Problem, config: Config, resources: Mapping[str, Any] | None, gpu: GpuModel
) -> tuple[Compiled, Terms] | None:
    """What the model reads and what it says; None where the resources are not known."""
    compiled = compiled_of(resources, config, gpu)
    if compiled is None:
        return None
    return compiled, model_terms(spec.cost(problem, config), compiled, gpu, problem.dtype)


def model_us(spec: KernelSpec, record: TrialRecord) -> float | None:
    """The plain model's time of a record's variant in us; None where its GPU or resources are not known."""
    gpu = gpu_of(record.fingerprint)
    if gpu is None:
        return None
    found = terms_of(spec, Problem.from_dict(record.problem), record.config, record.resources, gpu)
    return found[1].time_us if found is not None else None
