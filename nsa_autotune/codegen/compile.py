"""Compile a variant for a target without that GPU and read its resources from the binary."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import InvalidConfig, KernelError
from ..spec import Config, KernelSpec, Problem
from .grid import Launches, watch_launches
from .host_code import launch_sha
from .load import explain, load
from .machine_code import join_shas, machine_code_sha, usage_of
from .render import Rendered, render
from .shapes import INDEX_FILLS, is_left_out, resolve_dtype, resolve_shape, symbol_sizes
from .target import Target, absent_gpu, parse_target, shared_limit_bytes
from .warm import WithoutSympy

__all__ = ["Resources", "compile_variant", "meta_arguments", "parse_target", "shared_limit_bytes"]


@dataclass(frozen=True)
class Resources:
    """What a variant's most demanding kernel takes on a target."""

    registers: int  # a thread
    shared_bytes: int  # dynamic, a program
    spill_bytes: int  # a thread
    num_warps: int
    binary_sha: str  # identity of the machine code of all kernels of the variant
    compile_ms: float
    num_programs: int = 0  # of the kernel that starts the most; 0 if it is not known
    call_sha: str = ""  # identity of the grids and run-time arguments
    launch_sha: str = ""  # identity of what runs on the host

    def to_dict(self) -> dict[str, Any]:
        """By name, ready for JSON."""
        return asdict(self)


def meta_arguments(spec: KernelSpec, problem: Problem, scale: float = 0.125) -> dict[str, Any]:
    """Launch arguments as tensors without storage: enough to compile."""
    sizes = symbol_sizes(problem)
    values: dict[str, Any] = dict(spec.scalar_values(problem, scale))
    for argument in spec.arguments:
        if is_left_out(argument, problem):
            values[argument.name] = None
        elif argument.fill in INDEX_FILLS:
            (*_, length) = sizes[INDEX_FILLS[argument.fill]]
            values[argument.name] = torch.empty(length, dtype=torch.int32, device="meta")
        else:
            shape, dtype = resolve_shape(argument, sizes), resolve_dtype(argument, problem)
            values[argument.name] = torch.empty(shape, dtype=dtype, device="meta")
    return values


def need_compiler() -> None:
    """Raise KernelError where Triton was told to interpret kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("compilation needs the compiler", {"TRITON_INTERPRET": "1"}, "Unset TRITON_INTERPRET.")


def compile_variant(spec: KernelSpec, problem: Problem, config: Config, target: str = "cuda:90") -> Resources:
    """Compile in this process for `target`; KernelError, with template lines, if that or running there fails.

    InvalidConfig for an option that the target's compiler does not have.
    """
    need_compiler()
    goal = parse_target(target)
    _check_options(config, goal)
    rendered = render(spec, problem, config)
    launch, seen = watch_launches(load(rendered))
    arguments = meta_arguments(spec, problem)
    started = time.perf_counter()
    try:
        with absent_gpu(goal), WithoutSympy():
            kernels = launch(**arguments, warmup=True)
    except Exception as error:  # whatever the compiler raises is this variant's failure, told with its template lines
        raise KernelError(f"{spec.family} does not compile for {target}: {explain(error, rendered)}") from error
    compile_ms = (time.perf_counter() - started) * 1e3
    parts, host = [_read(kernel) for kernel in kernels], launch_sha(rendered.source)
    resources = combine_resources(parts, compile_ms, seen, host)
    _check_fits(resources, goal, rendered)
    return resources


def combine_resources(parts: list[Resources], compile_ms: float, seen: Launches, host: str) -> Resources:
    """The largest demand over a variant's kernels; `host` is the identity of its host code."""
    return Resources(
        registers=max(part.registers for part in parts),
        shared_bytes=max(part.shared_bytes for part in parts),
        spill_bytes=max(part.spill_bytes for part in parts),
        num_warps=max(part.num_warps for part in parts),
        binary_sha=join_shas([part.binary_sha for part in parts]),
        compile_ms=compile_ms,
        num_programs=max(seen.programs, default=0),
        call_sha=seen.call_sha,
        launch_sha=host,
    )


def _check_options(config: Config, target: Target) -> None:
    if target.backend == "hip" and config.get("maxnreg"):
        values = {"target": target.name, "maxnreg": config["maxnreg"]}
        raise InvalidConfig("Triton caps registers for NVIDIA only", values, "Use maxnreg=0.")
    if config.get("launch_pdl") and not target.has_dependent_launch:
        values = {"target": target.name, "launch_pdl": True}
        raise InvalidConfig("dependent launch needs an NVIDIA GPU from sm_90 on", values, "Use launch_pdl=False.")
    if target.name != "cuda:90" and config.get("gluon"):
        values = {"target": target.name, "gluon": True}
        raise InvalidConfig("gluon's products are Hopper's matrix instructions", values, "Use gluon=false.")


def _check_fits(resources: Resources, target: Target, rendered: Rendered) -> None:
    if resources.shared_bytes > target.shared_limit_bytes:
        raise KernelError(
            f"{rendered.family} needs more shared memory than {target.name} has",
            {"shared_bytes": resources.shared_bytes, "limit_bytes": target.shared_limit_bytes},
            "Use smaller tiles or fewer stages.",
        )


def _read(kernel: Any) -> Resources:
    usage = usage_of(kernel)
    return Resources(
        registers=usage.registers,
        shared_bytes=int(kernel.metadata.shared),
        spill_bytes=usage.spill_bytes,
        num_warps=int(kernel.metadata.num_warps),
        binary_sha=machine_code_sha(kernel),
        compile_ms=0.0,
    )
