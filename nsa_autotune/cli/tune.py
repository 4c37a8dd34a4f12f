"""`nsa-autotune tune`: search on the GPU at hand, or predict for a named one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.policy import get_policy
from ..cores import usable_cores
from ..errors import InvalidInput
from ..spec import DEFAULT_POLICY, KernelSpec, Problem
from . import options
from . import sweep as grid
from .console import errors
from .tries import read_tries
from .tune_run import Run, Work, execute

if TYPE_CHECKING:
    from ..search.budget import Budget

GPU_PRESET, GPU_BUDGET = "gqa16-d128", "normal"
NO_GPU_PRESET, NO_GPU_BUDGET, NO_GPU_MINUTES = "tiny", "quick", 4.0  # minutes of the whole run
DEFAULT_TARGET = "cuda:90"
EVERYTHING = 10_000_000  # configs, more than any family has


def tune(
    preset: options.PresetOption = None,
    seq: options.SeqOption = "",
    seq_q: options.SeqQOption = None,
    dtype: options.DtypeOption = None,
    locality: options.LocalityOption = None,
    batch: options.BatchesOption = None,
    heads: options.ManyHeadsOption = None,
    kv_heads: options.ManyKvHeadsOption = None,
    d_qk: options.DqkOption = None,
    d_v: options.DvOption = None,
    phi_hidden: options.PhiHiddenOption = None,
    layout: options.LayoutOption = None,
    page_size: options.PageSizeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    nsa: options.NsaOption = None,
    from_misses: Annotated[
        Path | None, typer.Option("--from-misses", help="Tune what a program missed: a file of export_misses().")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Skip illegal combinations, tune a bucket once, neighbours together.")
    ] = False,
    families: Annotated[
        list[str] | None, typer.Option("--families", help="Kernels to tune; all of them if none.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="quick, normal or full for each problem; or such as 200,30m in all.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Trials for each problem.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.01, help="Minutes of the whole run; a problem gets 3 s at least.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help=f"Predict for these, such as cuda:80,hip:gfx942; without a GPU {DEFAULT_TARGET}."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Predict for every config, however long it takes.")] = False,
    db: options.DbOption = None,
    retune: Annotated[bool, typer.Option("--retune", help="Measure tuned problems again.")] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try again what crashed twice, or hung, on this machine.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
    devices: Annotated[
        str | None, typer.Option("--devices", help="A process for each of these GPUs: cuda:0,cuda:1, or all.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="A process for each GPU of this Ray cluster (its address, or auto); on PostgreSQL."),
    ] = None,
    policy: options.PolicyOption = DEFAULT_POLICY,
    check: Annotated[
        bool,
        typer.Option(help="Without a GPU: first run small cases in Triton's interpreter, once if right."),
    ] = True,
    tries: Annotated[
        Path | None,
        typer.Option("--try", help="Measure these first: JSON lines of a family and a config, which may be partial."),
    ] = None,
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
        d_qk=d_qk,
        d_v=d_v,
        layout=layout,
        page_size=page_size,
        cache_dtype=cache_dtype,
        nsa=options.assignments(nsa, "--nsa"),
        phi_hidden=phi_hidden,
        seq_q=seq_q,
    )
    options.check_device(device)
    asked = options.split(target, "--target")
    targets = choose_targets(asked) if asked or devices is ray is None else ()
    if everything and (not targets or budget or trials or minutes):
        rule = "--all compiles every config for a --target, and takes no budget"
        given = {"--target": ",".join(targets), "--budget": budget, "--trials": trials, "--minutes": minutes}
        values = {option: value for option, value in given.items() if value}
        raise InvalidInput(rule, values, "Name a --target and leave the budget out.")
    specs = options.choose_specs(options.split(families, "--families"))
    usual = NO_GPU_PRESET if targets else GPU_PRESET
    choices = grid.shapes(choice, batch, heads, kv_heads)
    if from_misses is not None:
        work = missed_work(from_misses, specs, choices, sweep=sweep)
    elif sweep:
        work = [(step.spec, step.problem) for step in grid.plan(specs, choices, usual).steps]
    else:
        work = plan_work(specs, (problem for one in choices for problem in one.problems(usual)))
    parts = len(work) * max(1, len(targets))
    total = choose_budget(budget, EVERYTHING if everything else trials, minutes, parts, predicting=bool(targets))
    how = get_policy(policy).name
    cores = jobs or usable_cores()
    first = read_tries(tries) if tries is not None else ()
    if tries is not None and targets:
        raise _tries_unmeasured(tries, asked)
    run = Run(tuple(work), total, db, device, targets, retune, cores, check, how, retry_quarantined, tries=first)
    raise typer.Exit(start(run, devices, ray, jobs))


def _tries_unmeasured(tries: Path, asked: Sequence[str]) -> InvalidInput:
    """Why --try cannot be served: predicting was asked for, or there is nothing to measure on."""
    values: dict[str, object] = {"--try": str(tries)}
    if asked:
        values["--target"] = ",".join(asked)
        return InvalidInput("--try measures, and a --target is absent", values, "Leave one of them out.")
    return InvalidInput("--try measures, and torch finds no GPU here", values, "Leave --try out, or run on a GPU.")


def start(run: Run, devices: str | None, ray: str | None, jobs: int | None) -> int:
    """Run here, on several devices or on a cluster; the exit code."""
    if devices is None and ray is None:
        return execute(run)
    if run.targets:
        remedy = "Leave out --target, or --devices and --ray."
        raise InvalidInput("--devices and --ray measure, and a --target is absent", {"--target": run.targets}, remedy)
    if devices is not None and ray is not None:
        values = {"--devices": devices, "--ray": ray}
        raise InvalidInput("--devices is for this host, --ray for a cluster", values, "Choose one of them.")
    if ray is not None:
        from .tune_ray import execute_on_ray

        return execute_on_ray(run, ray, jobs)
    from .tune_devices import choose_devices, execute_on

    return execute_on(run, choose_devices(devices or ""))


def choose_targets(names: Sequence[str]) -> tuple[str, ...]:
    """The GPUs to predict for, none to measure: predicting is for who asks, and for who has no GPU."""
    from ..codegen.target import parse_target

    if names:
        return tuple(dict.fromkeys(parse_target(name).name for name in names))
    import torch

    return () if torch.cuda.is_available() else (DEFAULT_TARGET,)


def plan_work(specs: Sequence[KernelSpec], problems: Iterable[Problem]) -> list[Work]:
    """Each family with each problem that is a different one to it; raises InvalidProblem before anything starts."""
    from ..search.presets import tuning_problems

    work: dict[tuple[str, str], Work] = {}
    for problem in problems:
        for spec in specs:
            for part in tuning_problems(spec, problem):
                spec.check_problem(part)
                work.setdefault((spec.family, spec.problem_key(part, bucket=False)), (spec, part))
        if not work:
            specs[0].check_problem(problem)  # of another layout than all families asked for
    return list(work.values())


def missed_work(
    path: Path, specs: Sequence[KernelSpec], choices: Sequence[options.ProblemChoice], *, sweep: bool
) -> list[Work]:
    """What a file of misses names, of the chosen families; raises InvalidInput for other problem options beside it."""
    from ..dispatch.misses import read_misses

    if sweep or [replace(choice, nsa=choice.nsa or None) for choice in choices] != [options.ProblemChoice()]:
        raise InvalidInput(
            "--from-misses names its problems itself", {"file": str(path)}, "Leave out --preset, --seq ..."
        )
    chosen = {spec.family for spec in specs}
    everything = read_misses(path)
    if not everything:  # what export_misses() writes when all is well
        errors().print(f"nothing was missed: {path} names no problem", markup=False)
        raise typer.Exit
    missed = [(spec, problem) for spec, problem in everything if spec.family in chosen]
    if not missed:
        values = {"file": str(path), "families": ", ".join(sorted(chosen))}
        raise InvalidInput("the file of --from-misses names no problem of these families", values, "Name others.")
    return list({(spec.family, spec.problem_key(problem)): (spec, problem) for spec, problem in missed}.values())


def choose_budget(
    name: str | None, trials: int | None, minutes: float | None, parts: int, *, predicting: bool
) -> Budget:
    """The budget of the whole run; the minutes of a named budget are for each of its parts.

    `trials` and `minutes` take the place of the name's, or stand alone if there is no name.
    """
    from ..search.budget import NAMED_BUDGETS, Budget, parse_budget

    if name is None and (trials is not None or minutes is not None):
        return Budget(trials, minutes)
    if name is None and predicting:
        return Budget(NAMED_BUDGETS[NO_GPU_BUDGET].max_trials, NO_GPU_MINUTES)
    chosen = parse_budget(name or GPU_BUDGET)
    if chosen in NAMED_BUDGETS.values() and chosen.max_minutes is not None:
        chosen = replace(chosen, max_minutes=chosen.max_minutes * parts)
    chosen = chosen if trials is None else replace(chosen, max_trials=trials)
    return chosen if minutes is None else replace(chosen, max_minutes=minutes)
