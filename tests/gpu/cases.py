"""What tests/gpu runs: problems and configs, thinned from a grid that would take days. Nothing here touches a GPU.

The grid of the families: head dims x group sizes x tokens x queries x dtypes x layouts x NSA constants x configs;
of a decode step new tokens, dtypes of the cache and page sizes in place of queries and layouts.
Thinning rule: a family gets a fixed number of cases; along each axis the values are dealt out evenly and shuffled
(seeded by family and axis), so that every family meets every value of every axis equally often, and pairs of values by
chance. Configs are dealt likewise: a quarter of the cases run the default, a half every combination of the structural
switches in turn, a quarter a legal config drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nsa_autotune.codegen.golden import structural_configs
from nsa_autotune.codegen.pool import CompileJob
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import all_specs
from nsa_autotune.search.presets import takes_one_tensor
from nsa_autotune.spec import PAGE_SIZES, Config, KernelSpec, Problem

DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
GROUPS = (1, 2, 4, 5, 8, 16)
TOKENS = (1, 31, 63, 64, 1000)
QUERIES = ("all", "all", "third", "one")
DTYPES = ("bfloat16", "float16")
LAYOUTS = ("batched", "packed")
CACHED = (7, 64, 530, 1000, 2063)  # tokens of the longest sequence in a decode step
NEW_TOKENS = (1, 2, 3, 8)
CACHE_DTYPES = ("problem", "float8_e4m3fn")
CONSTANTS = (
    NSAConfig(),
    NSAConfig(),
    NSAConfig(),
    NSAConfig(8, 4, 16, num_selected=4, window_size=20),
    NSAConfig(16, 16, 32, num_selected=5, num_local=1, window_size=100),
    NSAConfig(32, 8, 32, num_selected=1, num_initial=0, num_local=1, window_size=1),
)
CASES_A_FAMILY = {
    "cmp_pool_fwd": 12,
    "cmp_mlp_fwd": 14,
    "gate_sum_fwd": 10,
    "cmp_pool_bwd": 12,
    "cmp_mlp_bwd": 14,
    "gate_sum_bwd": 10,
}
CASES_OF_ATTENTION = 24
CASES_OF_PAGED = 12
RANDOM_TRIES = 5000


@dataclass(frozen=True)
class FamilyCase:
    """One variant and the problem it is checked on."""

    family: str
    problem: Problem
    config: Config
    kind: str  # default, structure or random

    @property
    def name(self) -> str:
        """A readable test name."""
        p = self.problem
        sizes = f"q{p.seq_q}-k{p.seq_k}-g{p.group_size}-d{p.d_qk}_{p.d_v}-{p.dtype}-{p.layout}-n{p.nsa.num_selected}"
        sizes += f"-{p.page_size}-{p.cache_dtype}" if p.layout == "paged" else ""
        return f"{self.family}-{sizes}-{self.kind}"


def deal(values: Sequence[Any], count: int, seed: str) -> list[Any]:
    """`count` values, each as often as the others, in random order."""
    dealt = [values[i % len(values)] for i in range(count)]
    random.Random(seed).shuffle(dealt)
    return dealt


def random_config(spec: KernelSpec, problem: Problem, seed: str) -> Config:
    """A legal config, every parameter drawn at random."""
    generator = random.Random(seed)
    for _ in range(RANDOM_TRIES):
        config = {param.name: generator.choice(param.values) for param in spec.params}
        if spec.broken_constraint(problem, config) is None:
            return config
    return spec.default_config(problem)


def make_problem(
    spec: KernelSpec,
    dims: tuple[int, int],
    group: int,
    tokens: int,
    queries: str,
    dtype: str,
    layout: str,
    nsa: NSAConfig,
) -> Problem:
    """A problem of the grid; families over compressed blocks get at least one block."""
    if layout == "packed":
        tokens *= 3
    if any(argument.shape[:1] == ("C",) for argument in spec.arguments):
        tokens = max(tokens, nsa.compress_block_size)
    seq_q = {"all": tokens, "third": max(1, tokens // 3), "one": 1 if layout == "batched" else max(1, tokens // 2)}[
        queries
    ]
    return Problem(
        batch=4 if layout == "packed" else 2,
        seq_q=seq_q,
        seq_k=tokens,
        num_q_heads=2 * group,
        num_kv_heads=2,
        d_qk=dims[0],
        d_v=dims[1],
        dtype=dtype,
        layout=layout,
        locality=0.5,
        nsa=nsa,
    )


def make_step(
    spec: KernelSpec,
    dims: tuple[int, int],
    group: int,
    tokens: int,
    new_tokens: int,
    dtype: str,
    cache_dtype: str,
    page_size: int,
    nsa: NSAConfig,
) -> Problem:
    """A decode step of the grid; its four sequences differ in length (`bench.paged.trial_lengths`)."""
    return Problem(
        batch=4,
        seq_q=new_tokens,
        seq_k=max(tokens, new_tokens),
        num_q_heads=2 * group,
        num_kv_heads=2,
        d_qk=dims[0],
        d_v=dims[1],
        dtype=dtype,
        layout="paged",
        locality=0.5,
        nsa=nsa,
        page_size=page_size,
        cache_dtype=cache_dtype,
    )


def grid_problems(spec: KernelSpec) -> list[Problem]:
    """Those of a family."""
    paged = spec.layouts == ("paged",)
    count = CASES_OF_PAGED if paged else CASES_A_FAMILY.get(spec.family[:-4], CASES_OF_ATTENTION)
    axes: list[Sequence[Any]] = [DIMS, GROUPS, TOKENS, QUERIES, DTYPES, LAYOUTS, CONSTANTS]
    if paged:
        axes = [DIMS, GROUPS, CACHED, NEW_TOKENS, DTYPES, CACHE_DTYPES, PAGE_SIZES, CONSTANTS]
    columns = [deal(axis, count, f"{spec.family} {number}") for number, axis in enumerate(axes)]
    make = make_step if paged else make_problem
    return [make(spec, *row) for row in zip(*columns, strict=True)]


def family_cases() -> list[FamilyCase]:
    """About 150 cases, by the rule at the top."""
    cases = []
    for family, spec in all_specs().items():
        problems = grid_problems(spec)
        kinds = deal(("default", "structure", "random", "structure"), len(problems), f"{family} kinds")
        structure = 0
        for number, problem in enumerate(problems):
            kind = kinds[number]
            config = spec.default_config(problem)
            if kind == "structure":
                choices = list(structural_configs(spec, problem))
                config, structure = choices[structure % len(choices)], structure + 1
            elif kind == "random":
                config = random_config(spec, problem, f"{family} {number}")
            cases.append(FamilyCase(family, problem, config, kind))
    return cases


def module_problem(
    tokens: int, group: int, dims: tuple[int, int], dtype: str, layout: str, queries: int = 0
) -> Problem:
    """Problem of a whole forward; packed ones have four sequences: none, one token, two real ones."""
    return Problem(
        batch=4 if layout == "packed" else 2,
        seq_q=queries or tokens,
        seq_k=tokens,
        num_q_heads=2 * group,
        num_kv_heads=2,
        d_qk=dims[0],
        d_v=dims[1],
        dtype=dtype,
        layout=layout,
        phi_hidden=32,
    )


MODULE_PROBLEMS = (
    module_problem(1, 4, (64, 64), "bfloat16", "batched"),
    module_problem(31, 2, (128, 128), "float16", "batched"),
    module_problem(63, 5, (96, 96), "bfloat16", "batched"),
    module_problem(64, 16, (192, 128), "float16", "batched"),
    module_problem(1000, 1, (64, 64), "float16", "batched"),
    module_problem(1000, 2, (96, 96), "bfloat16", "batched"),
    module_problem(1000, 4, (128, 128), "bfloat16", "batched"),
    module_problem(1000, 5, (192, 128), "float16", "batched"),
    module_problem(1000, 8, (256, 256), "bfloat16", "batched"),
    module_problem(1000, 16, (128, 128), "float16", "batched"),
    module_problem(31, 1, (64, 64), "bfloat16", "packed"),
    module_problem(64, 8, (128, 128), "float16", "packed"),
    module_problem(1000, 5, (96, 96), "float16", "packed"),
    module_problem(1000, 16, (192, 128), "bfloat16", "packed"),
    module_problem(3000, 4, (128, 128), "bfloat16", "packed"),
    module_problem(1500, 4, (128, 128), "bfloat16", "batched", queries=77),
    module_problem(1500, 16, (192, 128), "float16", "batched", queries=1),
    module_problem(1500, 2, (64, 64), "bfloat16", "packed", queries=400),
    module_problem(8192, 16, (128, 128), "bfloat16", "batched").replace(batch=1),
    module_problem(8192, 4, (192, 128), "bfloat16", "packed"),
)
SELECTING_PROBLEM = module_problem(2500, 4, (128, 128), "bfloat16", "batched")  # tokens leave blocks out


def problem_name(problem: Problem) -> str:
    """A readable test name."""
    p = problem
    return f"q{p.seq_q}-k{p.seq_k}-g{p.group_size}-d{p.d_qk}_{p.d_v}-{p.dtype}-{p.layout}"


def forward_jobs(problem: Problem) -> list[CompileJob]:
    """The default variants that a whole forward launches."""
    jobs = []
    for family, spec in all_specs().items():
        if problem.layout not in spec.layouts:
            continue
        parts = [problem]
        if takes_one_tensor(spec):  # keys and values in separate launches
            parts = [problem.replace(d_qk=dim, d_v=dim) for dim in {problem.d_qk, problem.d_v}]
        if problem.layout == "batched" and problem.seq_k < problem.nsa.compress_block_size and "cmp" in family:
            continue
        if problem.layout == "batched" and problem.seq_k < problem.nsa.compress_block_size and "select" in family:
            continue
        jobs += [CompileJob(family, part.to_dict(), spec.default_config(part)) for part in parts]
    return jobs


def all_jobs() -> list[CompileJob]:
    """Everything that tests/gpu compiles, long compilations first."""
    jobs = [CompileJob(case.family, case.problem.to_dict(), case.config) for case in family_cases()]
    for problem in (*MODULE_PROBLEMS, SELECTING_PROBLEM):
        jobs += forward_jobs(problem)
    return sorted(jobs, key=lambda job: job.family != "slc_select_fwd")
