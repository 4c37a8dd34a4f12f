"""`nsa-autotune tune`: search on the GPU at hand, or predict for a named one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.policy import get_policy
from ..spec import DEFAULT_POLICY, KernelSpec, Problem
from . import options
from .tune_run import Run, Work, execute

if TYPE_CHECKING:
    from ..search.budget import Budget

GPU_PRESET, GPU_BUDGET = "gqa16-d128", "normal"
NO_GPU_PRESET, NO_GPU_BUDGET, NO_GPU_MINUTES = "tiny", "quick", 4.0  # minutes of the whole run
DEFAULT_TARGET = "cuda:90"


def tune(
    preset: options.PresetOption = None,
    seq: options.SeqOption = "",
    seq_q: options.SeqQOption = None,
    dtype: options.DtypeOption = None,
    locality: options.LocalityOption = None,
    batch: options.BatchOption = None,
    heads: options.HeadsOption = None,
    kv_heads: options.KvHeadsOption = None,
    d_qk: options.DqkOption = None,
    d_v: options.DvOption = None,
    phi_hidden: options.PhiHiddenOption = None,
    layout: options.LayoutOption = None,
    nsa: options.NsaOption = None,
    families: Annotated[
        list[str] | None, typer.Option("--families", help="Kernels to tune; all of them if none.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="quick, normal or full for each problem; or such as 200,30m in all.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Trials for each problem.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="Minutes of the whole run.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help=f"Predict for this GPU; without a GPU {DEFAULT_TARGET}.")
    ] = None,
    db: options.DbOption = None,
    retune: Annotated[bool, typer.Option("--retune", help="Measure tuned problems again.")] = False,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
    policy: options.PolicyOption = DEFAULT_POLICY,
    check: Annotated[
        bool, typer.Option(help="Without a GPU: run small cases in Triton's interpreter before predicting.")
    ] = True,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that compile; all cores if none.")
    ] = None,
) -> None:
    """Find the fastest config of each kernel and problem, and store it with every measurement."""
    choice = options.ProblemChoice(
        preset=preset,
        seq=seq,
        dtypes=tuple(options.split(dtype, "--dtype")),
        localities=tuple(options.split(locality, "--locality")),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        d_qk=d_qk,
        d_v=d_v,
        layout=layout,
        nsa=options.assignments(nsa, "--nsa"),
        phi_hidden=phi_hidden,
        seq_q=seq_q,
    )
    options.check_device(device)
    goal = choose_target(target)
    specs = options.choose_specs(options.split(families, "--families"))
    work = plan_work(specs, choice.problems(NO_GPU_PRESET if goal else GPU_PRESET))
    total = choose_budget(budget, trials, minutes, len(work), predicting=goal is not None)
    run = Run(tuple(work), total, db, device, goal, retune, jobs or os.cpu_count() or 1, check, get_policy(policy).name)
    raise typer.Exit(execute(run))


def choose_target(target: str | None) -> str | None:
    """The GPU to predict for, None to measure: predicting is for who asks, and for who has no GPU."""
    from ..codegen.target import parse_target

    if target is not None:
        return parse_target(target).name
    import torch

    return None if torch.cuda.is_available() else DEFAULT_TARGET


def plan_work(specs: Sequence[KernelSpec], problems: Iterable[Problem]) -> list[Work]:
    """Each family with each problem that is a different one to it; raises InvalidProblem before anything starts."""
    from ..search.presets import tuning_problems

    work: dict[tuple[str, str], Work] = {}
    for problem in problems:
        for spec in specs:
            for part in tuning_problems(spec, problem):
                spec.check_problem(part)
                work.setdefault((spec.family, spec.problem_key(part, bucket=False)), (spec, part))
    return list(work.values())


def choose_budget(
    name: str | None, trials: int | None, minutes: float | None, parts: int, *, predicting: bool
) -> Budget:
    """The budget of the whole run; the minutes of a named budget are for each of its parts."""
    from ..search.budget import NAMED_BUDGETS, Budget, parse_budget

    if trials is not None or minutes is not None:
        return Budget(trials, minutes)
    if name is None and predicting:
        return Budget(NAMED_BUDGETS[NO_GPU_BUDGET].max_trials, NO_GPU_MINUTES)
    chosen = parse_budget(name or GPU_BUDGET)
    if chosen in NAMED_BUDGETS.values() and chosen.max_minutes is not None:
        return replace(chosen, max_minutes=chosen.max_minutes * parts)
    return chosen
