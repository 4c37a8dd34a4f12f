"""Run variants in Triton's interpreter on small problems: it tells right from wrong, not fast from slow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from ..bench.result import TrialResult
from ..bench.worker import MeasureWorker
from ..codegen.paths import cache_dir
from ..codegen.render import template_digest
from ..kernels import get_spec
from ..spec import Config, KernelSpec, Problem, digest
from .space import ConfigSpace, config_key

TRIAL_TIMEOUT_S = 300.0  # of silence; the interpreter takes milliseconds for each program and tile
SAFE_DTYPES = ("float16", "float32")  # bfloat16 products are silently wrong in the interpreter


class Runner(Protocol):
    """Runs one variant through the accuracy gate; `MeasureWorker` on the CPU does."""

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult: ...


@dataclass(frozen=True)
class Check:
    """One variant on one small problem, right or wrong."""

    family: str
    problem: Problem
    config: Config
    ok: bool
    reason: str  # empty if ok


class Remembering:
    """A runner that does not run again what was right before with the same sources and versions.

    A file of the cache keeps a line for each variant that was right; without `recall` it is written, not read.
    """

    def __init__(self, runner: Runner, *, recall: bool = True) -> None:
        self.runner, self.file, self.recalled = runner, cache_dir() / "interpreted.txt", 0
        known = self.file.read_text(encoding="utf-8", errors="replace") if recall and self.file.is_file() else ""
        self._known = set(known.split())

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """What the runner finds, or found."""
        facts = [judge_digest(), template_digest(get_spec(family)), family, problem.to_dict(), config]
        key = digest(facts)
        if key in self._known:
            self.recalled += 1
            return TrialResult("ok", "")
        result = self.runner.measure(family, problem, config)
        if result.ok:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(key + "\n")
        return result


@cache
def judge_digest() -> str:
    """Digest of what decides if a variant is right: this package's Python, and the versions of torch and Triton."""
    import torch
    import triton

    found = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def interpreter_worker() -> MeasureWorker:
    """A child process that interprets kernels on the CPU."""
    return MeasureWorker(device="cpu", timeout_s=TRIAL_TIMEOUT_S, env={"TRITON_INTERPRET": "1"})


def check_in_interpreter(
    spec: KernelSpec,
    configs: Sequence[Config] | None = None,
    *,
    runner: Runner | None = None,
    max_cases: int | None = None,
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Check `configs`, or the default and its structural variants, on the spec's small cases in a child process.

    The default runs on every case (at most `max_cases`), the others on the first case that they are legal for. A
    config that no case takes is left out. `runner` may stay open for several families; `tell` hears of each check.
    """
    if runner is None:
        with interpreter_worker() as worker:
            return check_in_interpreter(spec, configs, runner=worker, max_cases=max_cases, tell=tell)
    found = []
    for problem, config in planned_checks(spec, configs, max_cases):
        result = runner.measure(spec.family, problem, config)
        reason = "" if result.ok else f"{result.status}: {result.reason}"
        found.append(Check(spec.family, problem, config, result.ok, reason))
        tell(found[-1])
    return found


def planned_checks(
    spec: KernelSpec, configs: Sequence[Config] | None = None, max_cases: int | None = None
) -> list[tuple[Problem, Config]]:
    """What `check_in_interpreter` runs, each pair once."""
    cases = [case for case in spec.cases if case.dtype in SAFE_DTYPES][:max_cases]
    pairs = list(_given_pairs(spec, cases, configs) if configs is not None else _default_pairs(spec, cases))
    return list({(spec.problem_key(p, bucket=False), config_key(c)): (p, c) for p, c in pairs}.values())


def _given_pairs(spec: KernelSpec, cases: list[Problem], configs: Sequence[Config]) -> Iterator[tuple[Problem, Config]]:
    for config in configs:
        takers = (case for case in cases if spec.broken_constraint(case, config) is None)
        yield from ((case, config) for case in list(takers)[:1])


def _default_pairs(spec: KernelSpec, cases: list[Problem]) -> Iterator[tuple[Problem, Config]]:
    wanted = {(param.name, value) for param in spec.params if param.structural for value in param.values}
    for case in cases:
        default = spec.default_config(case)
        yield case, default
        wanted -= set(default.items())
    for case in cases:
        for variant in structural_variants(ConfigSpace(spec, case)):
            new = wanted & set(variant.items())
            if new:
                wanted -= new
                yield case, variant


def structural_variants(space: ConfigSpace) -> Iterator[Config]:
    """The default with each other value of each structural parameter, others changed as far as they must be.

    Where a value needs a switch that is off by default, the variants before have it on.
    """
    default = space.spec.default_config(space.problem)
    found = [default]
    for param in space.spec.params:
        for value in param.values if param.structural else ():
            if value != default[param.name]:
                tries = (space.repair({**base, param.name: value}, keep=param.name) for base in (default, *found[::-1]))
                variant = next((config for config in tries if config is not None), None)
                if variant is not None:
                    found.append(variant)
                    yield variant
