"""`nsa-autotune codesign`: search the constants of NSA for speed and for what they keep of dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.policy import get_policy
from ..cores import usable_cores
from ..spec import DEFAULT_POLICY
from . import codesign_plan as planning
from . import options
from .codesign_run import execute
from .db import Format
from .tune import choose_targets

GPU_PRESET, NO_GPU_PRESET = "gqa16-d128", "tiny"
SEQ = "8k"
DESIGNS = 20
GPU_TRIALS, NO_GPU_TRIALS = 40, 8  # of one kernel
QUALITY_TOKENS, QUALITY_QUERIES = "8k", 1024


def codesign(
    preset: options.PresetOption = None,
    activations: Annotated[
        Path | None,
        typer.Option("--activations", help=".pt or .safetensors with q, k, v; a documented generator if none."),
    ] = None,
    seq: Annotated[str, typer.Option("--seq", help=f"Tokens that are timed; the file's, else {SEQ}.")] = "",
    dtype: options.DtypeOption = None,
    locality: options.LocalityOption = None,
    batch: options.BatchOption = None,
    heads: options.HeadsOption = None,
    kv_heads: options.KvHeadsOption = None,
    d_qk: options.DqkOption = None,
    d_v: options.DvOption = None,
    phi_hidden: options.PhiHiddenOption = None,
    nsa: options.NsaOption = None,
    select_blocks: Annotated[str, typer.Option("--select-blocks", help="Sizes l' to try, in tokens.")] = "",
    top_n: Annotated[str, typer.Option("--top-n", help="Numbers n of selected blocks to try.")] = "",
    windows: Annotated[str, typer.Option("--windows", help="Windows w to try, in tokens.")] = "",
    strides: Annotated[str, typer.Option("--strides", help="Strides d to try, in tokens.")] = "",
    compress_blocks: Annotated[str, typer.Option("--compress-blocks", help="Sizes l to try, in tokens.")] = "",
    group_sizes: Annotated[
        str, typer.Option("--group-sizes", help="Group sizes to try; larger ones average kv heads.")
    ] = "",
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward too.")] = False,
    compression: Annotated[str, typer.Option("--compression", help="phi that is timed: mean or mlp.")] = "mean",
    families: Annotated[
        list[str] | None, typer.Option("--families", help="Kernels whose times are summed; those of a pass if none.")
    ] = None,
    quality: Annotated[
        str, typer.Option("--quality", help="What is searched besides latency: mass kept, or error of the output.")
    ] = "output",
    quality_tokens: Annotated[
        str, typer.Option("--quality-tokens", help="Tokens on which quality is judged, the first ones.")
    ] = QUALITY_TOKENS,
    quality_queries: Annotated[
        int, typer.Option("--quality-queries", min=2, help="Queries among them, evenly spread.")
    ] = QUALITY_QUERIES,
    designs: Annotated[int, typer.Option("--designs", min=1, help="Designs in all, known ones included.")] = DESIGNS,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help=f"For each kernel; {GPU_TRIALS}, or {NO_GPU_TRIALS} to predict."),
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="After these no design begins.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the search and the generator.")] = 0,
    target: Annotated[str | None, typer.Option("--target", help="Predict for this GPU; without a GPU cuda:90.")] = None,
    db: options.DbOption = None,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure on.")] = "cuda:0",
    policy: options.PolicyOption = DEFAULT_POLICY,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes that compile.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw all designs and the front into this file.")] = None,
    style: Annotated[Format, typer.Option("--format", help="The front as a table, or all designs.")] = Format.table,
) -> None:
    """Find the constants of NSA that no others beat in both latency and likeness to dense attention, each one tuned."""
    options.check_device(device)
    planning.check_plot(plot)
    goal = next(iter(choose_targets([target] if target else [])), None)
    given = planning.read_activations(activations)
    sizes = planning.shape(given, heads=heads, kv_heads=kv_heads, d_qk=d_qk, d_v=d_v)
    choice = options.ProblemChoice(
        preset=preset,
        seq=seq or (str(given.tokens) if given else SEQ),
        dtypes=tuple(options.split(dtype, "--dtype")) or planning.dtypes_of(given),
        localities=tuple(options.split(locality, "--locality")),
        batch=batch,
        nsa=options.assignments(nsa, "--nsa"),
        phi_hidden=phi_hidden,
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        d_qk=sizes["d_qk"],
        d_v=sizes["d_v"],
    )
    base = planning.one_problem(choice.problems(NO_GPU_PRESET if goal else GPU_PRESET))
    values = {
        "select_block_size": planning.numbers("--select-blocks", select_blocks),
        "num_selected": planning.numbers("--top-n", top_n),
        "window_size": planning.numbers("--windows", windows),
        "compress_stride": planning.numbers("--strides", strides),
        "compress_block_size": planning.numbers("--compress-blocks", compress_blocks),
        "group_size": planning.numbers("--group-sizes", group_sizes),
    }
    planning.check_group_sizes(base, values["group_size"])
    plan = planning.Plan(
        base=base,
        values=planning.merge_values(values, choice.nsa or {}),
        specs=planning.pass_specs(options.split(families, "--families"), compression, backward=backward),
        activations=given,
        quality_tokens=planning.one_length("--quality-tokens", quality_tokens),
        quality_queries=quality_queries,
        objective=planning.objective(quality),
        designs=designs,
        trials=trials or (NO_GPU_TRIALS if goal else GPU_TRIALS),
        minutes=minutes,
        seed=seed,
        target=goal,
        db=db,
        device=device,
        policy=get_policy(policy).name,
        jobs=jobs or usable_cores(),
        plot=plot,
        style=style,
    )
    raise typer.Exit(execute(plan))
