"""Compiled binaries of a package's kernels for named architectures, made without their GPUs."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..codegen.compile import meta_arguments, need_compiler
from ..codegen.load import explain, load
from ..codegen.render import Rendered
from ..codegen.target import Target, absent_gpu, parse_target
from ..cores import usable_cores
from ..dispatch import binaries
from ..dispatch.binaries import INDEX, NOT_OF_THE_CODE, identity
from ..dispatch.triton_launch import kernels_among
from ..errors import KernelError
from ..kernels import get_spec
from ..spec import KernelSpec, Problem
from .choice import Kernel

BRANCHES = ("cmp", "slc", "win")  # the order of the gates
Report = Callable[[str], None]
Job = tuple[str, Rendered, list[Problem], str]  # family, source, sizes and target: what another process can be told


def compile_binaries(kernels: Sequence[Kernel], targets: Sequence[str], report: Report) -> dict[str, bytes]:
    """The files of a package's `binaries/` by name: two for each compiled kernel, and their index.

    What does not compile for a target or does not fit it is left out and told to `report`: it is compiled where it is
    served, or fails there. Raises KernelError where Triton interprets or if a winner fits none of the targets.
    """
    if not targets:
        return {}
    need_compiler()
    files: dict[str, bytes] = {}
    index: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as cache, _without_paths(cache):
        _compile_in_parallel(kernels, targets)
        for target in targets:
            _add(compile_probe(parse_target(target)), "probe", files, index)
        for kernel in kernels:
            whole = [_compile_for(kernel, parse_target(target), files, index, report) for target in targets]
            if kernel.is_winner and not any(whole):
                values = {"family": kernel.spec.family, "variant": kernel.rendered.digest, "targets": list(targets)}
                raise KernelError("a winner must compile for a target of the package", values, "Name its architecture.")
    import triton

    files[INDEX] = _json({"triton": triton.__version__, "binaries": index})
    return files


def _compile_in_parallel(kernels: Sequence[Kernel], targets: Sequence[str]) -> None:
    """Fill Triton's cache on all cores; a job that fails or ends its process is judged when its turn comes."""
    jobs: list[Job] = [(k.spec.family, k.rendered, _compiled_problems(k), t) for k in kernels for t in targets]
    cores = min(usable_cores(), len(jobs))
    if cores < 2:
        return
    pool = ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))  # which keeps Triton's settings
    with pool, suppress(BrokenProcessPool):
        list(pool.map(_compile_quietly, jobs))


def _compile_quietly(job: Job) -> None:
    family, rendered, problems, target = job
    with suppress(KernelError):
        for problem in problems:
            compile_problem(get_spec(family), rendered, problem, parse_target(target))


def _compiled_problems(kernel: Kernel) -> list[Problem]:
    return list(dict.fromkeys(alike for each in kernel.problems for alike in alike_problems(each)))


def _compile_for(kernel: Kernel, goal: Target, files: dict[str, bytes], index: dict[str, str], report: Report) -> bool:
    """Add a variant's binaries for one target; False if one of its problems got none."""
    for problem in _compiled_problems(kernel):
        try:
            compiled = compile_problem(kernel.spec, kernel.rendered, problem, goal)
            _check_fits(compiled, goal)
        except KernelError as error:
            report(f"{kernel.spec.family} {kernel.rendered.digest} for {goal.name}: {error}")
            return False
        _add(compiled, kernel.spec.family, files, index)
    return True


def _add(compiled: dict[str, Any], family: str, files: dict[str, bytes], index: dict[str, str]) -> None:
    for name, binary in compiled.items():
        stem = f"{family}__{name}"
        index[name] = stem
        files |= {f"{stem}.{ending}": content for ending, content in portable(binary).items()}


def compile_probe(goal: Target) -> dict[str, Any]:
    """The two kernels on which a dispatcher tries its prepared launches, as `compile_problem`."""
    module = _fresh_probe()
    seen, size = _watch(module), module.ROWS * module.COLUMNS
    x, out = (torch.empty(size, dtype=torch.float32, device="meta") for _ in range(2))
    with absent_gpu(goal):
        module.launch(x, out, 3.0, goal.backend == "cuda" and int(goal.arch) >= 90, warmup=True)
    return seen


def _fresh_probe() -> ModuleType:
    """The probe's module once more: one that serves is left as it is."""
    name = "nsa_autotune_generated.probe"
    found = importlib.util.spec_from_file_location(name, Path(binaries.__file__).with_name("probe.py"))
    if found is None or found.loader is None:
        raise KernelError("the probe must be importable", {"module": name}, "Reinstall nsa-autotune.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # Triton looks the kernel's module up by name
    found.loader.exec_module(module)
    return module


def alike_problems(problem: Problem) -> list[Problem]:
    """The problem, also with odd lengths and several sequences: Triton compiles anew where 16 divides no more sizes."""
    found = []
    for fewer in (0, 1):
        for batch in (problem.batch, max(2, problem.batch)):
            lengths = {"seq_q": max(1, problem.seq_q - fewer), "seq_k": max(1, problem.seq_k - fewer)}
            found.append(problem.replace(batch=batch, **lengths))
    return list(dict.fromkeys(found))


def call_arguments(spec: KernelSpec, problem: Problem) -> list[dict[str, Any]]:
    """Arguments without storage of each way in which the operators call a family: strides and switches differ.

    The backward of the whole attention passes a branch's gate as a view of all gates, and adds to dq but once.
    """
    plain = meta_arguments(spec, problem)
    if "gate" not in plain:
        return [plain]
    branch, gate = spec.family.partition("_")[0], plain["gate"]
    gates = torch.empty((*gate.shape, len(BRANCHES)), dtype=gate.dtype, device="meta")
    fused = {**plain, "gate": gates[..., BRANCHES.index(branch)]}
    if "dq" in plain:
        fused["accumulate"] = branch != "win"
    return [plain, fused]


def compile_problem(spec: KernelSpec, rendered: Rendered, problem: Problem, goal: Target) -> dict[str, Any]:
    """Triton's compiled kernels of one variant for a problem's sizes, by their `identity`; raises KernelError."""
    module = load(rendered)
    seen = _watch(module)
    with absent_gpu(goal):
        try:
            for arguments in call_arguments(spec, problem):
                module.launch(**arguments, warmup=True)
        except Exception as error:  # whatever the compiler raises is this variant's failure
            raise KernelError(f"does not compile: {explain(error, rendered)}") from error
    return seen


def _watch(module: ModuleType) -> dict[str, Any]:
    """What the module's kernels compile from now on, by identity."""
    seen: dict[str, Any] = {}

    def watched(kernel: Any, compile_anew: Callable[..., Any]) -> Callable[..., Any]:
        def compile_and_note(
            key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
        ) -> Any:
            target = kernel.device_caches[device][2]
            compiled = compile_anew(key, signature, device, constants, options, attributes, warmup)
            seen[identity(kernel, target, signature, constants, options, attributes)] = compiled
            return compiled

        return compile_and_note

    for kernel in kernels_among(vars(module)).values():
        kernel._do_compile = watched(kernel, kernel._do_compile)
    return seen


@contextmanager
def _without_paths(cache: str) -> Iterator[None]:
    """Within it, binaries hold no line tables, which name files of this machine, and come from no older cache."""
    from triton import knobs

    with knobs.compilation.scope(), knobs.cache.scope():
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = cache
        yield


def portable(compiled: Any) -> dict[str, bytes]:
    """The binary and its metadata by file ending, without what names files of this machine."""
    forms = [form for form in ("cubin", "hsaco") if form in compiled.asm]
    if not forms:
        raise KernelError("a compiled kernel must carry its binary", {"forms": sorted(compiled.asm)})
    known = {name: value for name, value in compiled.metadata._asdict().items() if name not in NOT_OF_THE_CODE}
    return {forms[0]: bytes(compiled.asm[forms[0]]), "json": _json(known)}


def _check_fits(compiled: dict[str, Any], goal: Target) -> None:
    shared_bytes = max(int(one.metadata.shared) for one in compiled.values())
    if shared_bytes > goal.shared_limit_bytes:
        values = {"shared_bytes": shared_bytes, "limit_bytes": goal.shared_limit_bytes}
        raise KernelError("needs more shared memory than the target has", values)


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, default=vars) + "\n").encode()  # vars: of a target, as Triton does
