"""Decode steps that tests/gpu checks: problems, the variants to compile for them, and pages to attend to.

Thinned as in `gpu.cases`: every value of every axis is met equally often, pairs of values by chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu.cases import CACHE_DTYPES, NEW_TOKENS, deal, forward_jobs
from torch import Tensor

from nsa_autotune.bench.paged import trial_table
from nsa_autotune.codegen.pool import CompileJob
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.ladder import Choice, Step
from nsa_autotune.kernels import all_specs
from nsa_autotune.paged import FP8, CachePools, Pages, first_cell
from nsa_autotune.spec import PAGE_SIZES, Config, KernelSpec, Problem

LONG = (131_072, 1, 0, 65, 1000, 17, 4097, 40_000)  # tokens of the sequences of a batch
SHORT = (3000, 1, 0, 65, 2500, 31)
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
GROUPS = (1, 4, 8, 16)
KINDS = (("bfloat16", "problem"), ("float16", "problem"), ("bfloat16", "float8_e4m3fn"))
FINISH = ("ticket", "kernel")
COUNT, HEADS, SCALES = 20, 2, (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class StepCase:
    """A step, the lengths of its sequences, and who joins the splits."""

    problem: Problem
    lengths: tuple[int, ...]
    finish: str

    @property
    def name(self) -> str:
        """A readable test name."""
        p = self.problem
        sizes = f"g{p.group_size}-d{p.d_qk}_{p.d_v}-q{p.seq_q}-k{p.seq_k}-page{p.page_size}"
        return f"{sizes}-{p.dtype}-{p.cache_dtype}-{self.finish}"


def step_cases() -> list[StepCase]:
    """COUNT of them, every fifth with a sequence of 128k tokens."""
    axes: Sequence[Sequence[Any]] = (DIMS, GROUPS, NEW_TOKENS, PAGE_SIZES, KINDS, FINISH)
    columns = [deal(axis, COUNT, f"decode {number}") for number, axis in enumerate(axes)]
    cases = []
    for number, (dims, group, new_tokens, page_size, (dtype, cache_dtype), finish) in enumerate(
        zip(*columns, strict=True)
    ):
        lengths = LONG if number % 5 == 0 else SHORT
        problem = make_step(dims, group, new_tokens, lengths, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype)
        cases.append(StepCase(problem, lengths, finish))
    return cases


def make_step(
    dims: tuple[int, int], group: int, new_tokens: int, lengths: Sequence[int], heads: int = HEADS, **rest: Any
) -> Problem:
    """The problem of a step over sequences of these lengths."""
    sizes = {"num_q_heads": heads * group, "num_kv_heads": heads, "d_qk": dims[0], "d_v": dims[1]}
    return Problem(batch=len(lengths), seq_q=new_tokens, seq_k=max(lengths), layout="paged", **{**sizes, **rest})


STEP_CASES = step_cases()
REPEATED = StepCase(make_step((128, 128), 16, 2, LONG[:4]), LONG[:4], "ticket")


class Finishing(Dispatcher):
    """Serves default configs, in which `finish` joins the splits; `early`: with dependent launches."""

    def __init__(self, finish: str, early: bool = False) -> None:
        super().__init__(None)
        self.finish, self.early = finish, early

    def choose(self, spec: KernelSpec, problem: Problem, device: Any = "cuda:0") -> Choice:
        """The default config, these values replaced."""
        return Choice(finishing(spec, problem, self.finish, self.early), Step.DEFAULT)


def finishing(spec: KernelSpec, problem: Problem, finish: str, early: bool = False) -> Config:
    """The default config with this `finish` and `launch_pdl`, in families that have them."""
    config = spec.default_config(problem)
    config |= {"finish": finish} if "finish" in config else {}
    config |= {"launch_pdl": early} if "launch_pdl" in config else {}
    spec.check_config(problem, config)
    return config


@dataclass(frozen=True)
class AppendCase:
    """Steps that fill several pages of two sequences, the second AHEAD tokens before the first."""

    problem: Problem
    compression: str
    tokens: int = 96

    @property
    def name(self) -> str:
        """A readable test name."""
        p = self.problem
        return f"{p.dtype}-{p.cache_dtype}-{self.compression}-q{p.seq_q}-page{p.page_size}"


def append_case(compression: str, new_tokens: int, **rest: Any) -> AppendCase:
    """One with room for all its tokens."""
    return AppendCase(make_step((128, 64), 1, new_tokens, (160, 160), phi_hidden=32, **rest), compression)


AHEAD = 40
APPEND_CASES = (
    append_case("mlp", 1),
    append_case("mean", 3, page_size=16, dtype="float16"),
    append_case("mean", 1, page_size=16, cache_dtype="float8_e4m3fn"),
    append_case("mlp", 8, cache_dtype="float8_e4m3fn"),
)


@dataclass(frozen=True)
class ModuleCase:
    """A module of one group size, head dims and compression, and how its tokens come."""

    group: int
    dims: tuple[int, int]
    dtype: str
    page_size: int = 64
    new_tokens: int = 1
    cache_dtype: str = "problem"
    compression: str = "mlp"
    share_kv: bool = False
    hidden: int = 128
    phi_hidden: int = 32
    prompt: int = 500
    tokens: int = 1500
    capacity: int = 2048  # tokens that the cache is reserved for
    config: NSAConfig = field(default_factory=NSAConfig)

    @property
    def name(self) -> str:
        """A readable test name."""
        kv = "shared" if self.share_kv else "apart"
        sizes = f"g{self.group}-d{self.dims[0]}_{self.dims[1]}-q{self.new_tokens}-page{self.page_size}"
        return f"{sizes}-{self.dtype}-{self.cache_dtype}-{self.compression}-{kv}"

    @property
    def problem(self) -> Problem:
        """A step of a batch of two."""
        how = {"page_size": self.page_size, "dtype": self.dtype, "cache_dtype": self.cache_dtype, "nsa": self.config}
        lengths = (self.capacity,) * 2
        return make_step(self.dims, self.group, self.new_tokens, lengths, phi_hidden=self.phi_hidden, **how)


MODULE_CASES = (
    ModuleCase(16, (128, 128), "bfloat16", prompt=1),
    ModuleCase(4, (64, 64), "float16", 16, 3, share_kv=True),
    ModuleCase(8, (192, 128), "bfloat16", 256, 8, compression="mean"),
    ModuleCase(1, (256, 256), "bfloat16", 32, 2, compression="mean", share_kv=True),
    ModuleCase(16, (128, 128), "bfloat16", 64, 1, "float8_e4m3fn"),
)
# from token 8192 on the blocks of a sequence are ranked in two chunks, by programs of a second kernel
GRAPH_CASE = ModuleCase(16, (128, 128), "bfloat16", prompt=6000, tokens=4096, capacity=16_384)


def cache_problems() -> list[Problem]:
    """The steps of `gpu.test_cache`, and its prefill."""
    steps = [
        make_step((64, 64), 16, new_tokens, (640, 640), heads=1, cache_dtype=cache_dtype)
        for new_tokens, cache_dtype in itertools.product((1, 3, 5, 8), CACHE_DTYPES)
    ]
    return [*steps, steps[0].replace(layout="batched", seq_q=100, seq_k=640)]


def step_jobs() -> list[CompileJob]:
    """The variants of all cases."""
    jobs = [job for problem in cache_problems() for job in forward_jobs(problem) if "_bwd" not in job.family]
    for case in (*STEP_CASES, REPEATED):
        for family in ("cmp_decode_fwd", "slc_win_decode_fwd"):
            spec = all_specs()[family]
            jobs.append(CompileJob(family, case.problem.to_dict(), finishing(spec, case.problem, case.finish)))
    for append in APPEND_CASES:
        jobs += [job for job in forward_jobs(append.problem) if "append" in job.family]
    for module in (*MODULE_CASES, GRAPH_CASE):
        jobs += forward_jobs(module.problem)
        first = module.problem.replace(layout="batched", seq_q=module.prompt, seq_k=module.prompt)
        jobs += [job for job in forward_jobs(first) if "_bwd" not in job.family]
    unique = {(job.family, repr(job.problem), repr(job.config)): job for job in jobs}
    return list(unique.values())


@dataclass(frozen=True)
class StepTensors:
    """A cache of random tokens in shuffled pages, NaN where no token is, and what asks it."""

    pools: CachePools
    table: Tensor
    lengths: Tensor
    q: Tensor
    gates: Tensor


def step_tensors(case: StepCase, device: str, seed: int = 0) -> StepTensors:
    """Branches have pools of their own; an unused entry of the table names a page of NaN."""
    p, generator = case.problem, torch.Generator(device).manual_seed(seed)
    each = -(-p.seq_k // p.page_size)
    table, num_pages = _table(case, each, seed)
    fp8 = p.cache_dtype != "problem"
    dtype = FP8 if fp8 else getattr(torch, p.dtype)
    like: dict[str, Any] = {"device": device, "generator": generator}

    def pool(rows: int, width: int, compressed: bool) -> Pages:
        data = torch.full((num_pages, rows, p.num_kv_heads, width), math.nan, device=device)
        flat = data.view(-1, p.num_kv_heads, width)
        for length, pages in zip(case.lengths, table, strict=True):
            first = first_cell(p.nsa) if compressed else 0
            place = torch.arange(first, first + p.nsa.num_compressed(length) if compressed else length)
            index = (pages.long()[place // rows] * rows + place % rows).to(device)
            flat[index] = torch.randn(len(index), p.num_kv_heads, width, **like)
        picked = torch.randint(len(SCALES), (num_pages, p.num_kv_heads), **like)
        return Pages(data.to(dtype), torch.tensor(SCALES, device=device)[picked] if fp8 else None)

    k_cmp, v_cmp = (pool(p.page_size // p.nsa.compress_stride, width, True) for width in (p.d_qk, p.d_v))
    branches = [pool(p.page_size, width, False) for width in (p.d_qk, p.d_v) * 2]
    return StepTensors(
        pools=CachePools(k_cmp, v_cmp, branches[0], branches[1], *branches),
        table=table.to(device),
        lengths=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        q=torch.randn(p.batch, p.seq_q, p.num_q_heads, p.d_qk, **like).to(getattr(torch, p.dtype)),
        gates=torch.rand(p.batch, p.seq_q, p.num_q_heads, 3, **like).to(getattr(torch, p.dtype)),
    )


def _table(case: StepCase, each: int, seed: int) -> tuple[Tensor, int]:
    """The pages of every sequence, as many as it needs, in random order; page 0 belongs to nobody."""
    p = case.problem
    needed = [-(-length // p.page_size) for length in case.lengths]
    order = trial_table(p.replace(batch=1), sum(needed), sum(needed), seed)[0] + 1
    table = torch.zeros(p.batch, each, dtype=torch.int32)
    for row, count, start in zip(table, needed, torch.tensor([0, *needed]).cumsum(0).tolist(), strict=False):
        row[:count] = order[start : start + count]
    return table, sum(needed) + 1
