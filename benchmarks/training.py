"""Claim: training with Native Sparse Attention's kernels is faster than with dense attention at long contexts.

Measures forward, backward and both of `nsa_attention`, every backward family by itself, dense causal attention by cuDNN
and FlashAttention-2, and peak memory; writes `results/<date>-<gpu>-training.md` and `.json` beside this file.
With --module also NativeSparseAttention with its projections, learned compression and keys and values of every branch.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forward import RESULTS, asked_dtypes, check_hidden_size, gpu_slug, results_folder, without_places, write_page
from training_calls import dense_entries, module_entries, our_entries
from training_page import (
    BOTH,
    COMPRESSED,
    FAMILIES,
    FORWARD,
    GROUP_KV_HEADS,
    GROUP_TOKENS,
    GROUPS,
    SELECTED,
    WINDOW,
    Memory,
    markdown,
    sum_of,
    to_dict,
)

from nsa_autotune.cli.bench import plan_work, say
from nsa_autotune.cli.bench_entries import Bench, Work, branch_entries
from nsa_autotune.cli.bench_report import CUDNN, FLASH, Report, Row, seq_text
from nsa_autotune.cli.bench_run import check_device, check_plan, make_report, measure_rates, open_bench, time_group
from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, split
from nsa_autotune.cli.tune_run import EXIT_INTERRUPTED
from nsa_autotune.errors import InvalidInput, NSAError
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import Problem

PRESETS, SEQ, LOCALITIES = "gqa16-d128,paper-27b", "8k,32k,64k,128k", ("0", "0.8")
ROUNDS, MIN_ROUNDS, TARGET_MS = 10, 5, 500.0  # samples a line; at least 5 whatever they take
LONG_TOKENS, LONG_ROUNDS = 131072, 3  # of FlashAttention-2, whose backward takes seconds there
MEMORY_PLAN = ((262144, BOTH), (524288, FORWARD))  # tokens, and what is asked of them
BRANCHES = {COMPRESSED: "cmp_attn_bwd", SELECTED: "slc_attn_bwd", WINDOW: "win_attn_bwd"}

Found = tuple[list[Row], list[Memory]]


def main(arguments: Sequence[str]) -> int:
    """Measure and write; 0 if everything of ours ran, 1 if not, 2 after a mistake."""
    options = parse(arguments)
    command = shlex.join(["python", "benchmarks/training.py", *without_places(arguments)])
    try:
        plan, where = make_plan(options), check_device(options.device)
        options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
        report, memory, whole = run(plan, options, where, command)
        for path in write_results(report, memory, options, whole):
            print(path)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    if not whole:
        errors().print("interrupted: the page holds the lengths that were measured before", style="yellow")
        return EXIT_INTERRUPTED
    return int(any(row.failed for row in report.rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help=f"one or more, with commas; {PRESETS} unless only sections are asked for")
    parser.add_argument("--seq", default=SEQ)
    parser.add_argument("--dtype", default="", help="one or more; as the preset if none; then named in the page's file")
    parser.add_argument("--phi", choices=("mean", "mlp"), default="mean", help="compression: by the mean, or learned")
    parser.add_argument("--small-groups", action="store_true", help="selected attention for groups of 1, 2, 4, 8")
    parser.add_argument("--memory", action="store_true", help="a step on 256k tokens and a forward on 512k, once each")
    parser.add_argument("--module", action="store_true", help="also the module with its projections")
    parser.add_argument("--hidden-size", type=int, default=4096, help="of the module")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="most samples of a line")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--db", default=None)
    parser.add_argument("--untuned", action="store_true", help="default configs only")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> list[Work]:
    """The shapes to measure as a whole; none if only sections are asked for."""
    if options.rounds < MIN_ROUNDS:
        values = {"--rounds": options.rounds}
        raise InvalidInput("a line has at least 5 samples", values, "Write for example --rounds 10.")
    check_hidden_size(options.hidden_size)
    dtypes = asked_dtypes(options.dtype)
    only_sections = options.preset is None and (options.small_groups or options.memory)
    if only_sections and options.module:
        raise InvalidInput("the sections have no module", {"--module": True}, "Name a --preset, or leave it out.")
    names = [] if only_sections else split([options.preset or PRESETS])
    choices = [ProblemChoice(name, options.seq, dtypes, LOCALITIES) for name in names]
    plan = plan_work(problem for choice in choices for problem in choice.problems(PRESETS))
    check_plan(plan)
    return plan


def run(
    plan: Sequence[Work], options: argparse.Namespace, where: torch.device, command: str
) -> tuple[Report, list[Memory], bool]:
    """Measure the plan and the sections asked for; False if Ctrl-C ended it, which keeps the lengths measured."""
    how: dict[str, Any] = {"db": options.db, "untuned": options.untuned, "rounds": options.rounds, "say": say}
    with open_bench(where, **how, target_ms=TARGET_MS) as bench:
        dtypes = dict.fromkeys([*(work.problem.dtype for work in plan), *section_dtypes(options)])
        rates = {dtype: measure_rates(bench, dtype) for dtype in dtypes}
        rows: list[Row] = []
        memory: list[Memory] = []
        whole = True
        try:
            gather(sections(plan, options, bench), where, rows, memory)
        except KeyboardInterrupt:
            if not rows:
                raise
            whole = False
    return make_report(bench, command, options.untuned, rates, rows), memory, whole


def sections(plan: Sequence[Work], options: argparse.Namespace, bench: Bench) -> list[Callable[[], Found]]:
    """What is measured, one after the other."""
    hidden_size = options.hidden_size if options.module else None
    found: list[Callable[[], Found]] = [partial(measure, work, bench, options.phi, hidden_size) for work in plan]
    for dtype in section_dtypes(options):
        if options.small_groups:
            found += [partial(small_group, group, dtype, bench) for group in GROUPS]
        if options.memory:
            found += [partial(long_context, tokens, stage, dtype, bench, options.phi) for tokens, stage in MEMORY_PLAN]
    return found


def section_dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    """The dtypes in which the sections are measured; none without sections."""
    return (asked_dtypes(options.dtype) or (Problem().dtype,)) if options.small_groups or options.memory else ()


def write_results(report: Report, memory: Sequence[Memory], options: argparse.Namespace, whole: bool) -> list[Path]:
    """The dated page and the JSON behind it, under a name of their own if they are not whole; returns their paths."""
    date, gpu = report.created[:10], report.fingerprint["gpu"]
    asked = {"small-groups": options.small_groups, "memory": options.memory}
    only = [] if options.preset else [name for name, wanted in asked.items() if wanted]  # pages of their own
    variant = [*(["mlp"] if options.phi == "mlp" else []), *asked_dtypes(options.dtype)]
    stem = "-".join([date, gpu_slug(gpu), "training", *variant, *only, *([] if whole else ["interrupted"])])
    page = markdown(report, memory, f"Training on {gpu}, {date}")
    return write_page(
        options.folder / stem, page, json.dumps(to_dict(report, memory), indent=1, allow_nan=False) + "\n"
    )


def measure(work: Work, bench: Bench, phi: str, hidden_size: int | None) -> Found:
    """Whole calls beside cuDNN, FlashAttention-2 and the module by themselves, and the families of the backward."""
    parts = [partial(beside_cudnn, work.problem, bench, phi), partial(flash, work.problem, bench)]
    if hidden_size is not None:
        parts.append(partial(module, work.problem, bench, hidden_size))
    rows: list[Row] = []
    memory: list[Memory] = []
    gather(parts, bench.device, rows, memory)
    return rows + backward_rows(work, bench, phi), memory


def gather(parts: Iterable[Callable[[], Found]], device: torch.device, rows: list[Row], memory: list[Memory]) -> None:
    """Add what each part finds, as soon as it has; its memory is given back before the next."""
    for part in parts:
        more_rows, more_memory = part()
        rows += more_rows
        memory += more_memory
        free(device)


def backward_rows(work: Work, bench: Bench, phi: str) -> list[Row]:
    """Every family of the backward, the sums of the branches, and that of all."""
    rows = [row for name in BRANCHES for row in branch_rows(name, work, bench)]
    for family in ("gate_sum_bwd", "cmp_mlp_bwd" if phi == "mlp" else "cmp_pool_bwd"):
        rows += time_group(branch_entries(get_spec(family), work, bench), bench)
    families = [row for row in rows if row.kind == "branch"]
    return rows + [
        sum_of(FAMILIES, "sum", [row for row in families if row.locality in (locality, None)], locality)
        for locality in work.localities
    ]


def beside_cudnn(problem: Problem, bench: Bench, phi: str) -> Found:
    """Ours in four ways and cuDNN in two, interleaved."""
    bench.say(f"{seq_text(problem.seq_k)}: first calls")
    ours, memory = our_entries(problem, bench, phi)
    dense, held = dense_entries(CUDNN, problem, bench)
    rows = time_group([*ours, *dense], bench)
    return [*rows, sum_of(f"{CUDNN} {BOTH}", "dense", rows[len(ours) :])], memory + held


def flash(problem: Problem, bench: Bench) -> Found:
    """FlashAttention-2, in fewer rounds where a call takes seconds."""
    few = problem.seq_k >= LONG_TOKENS
    entries, memory = dense_entries(FLASH, problem, bench)
    rows = time_group(entries, replace(bench, rounds=LONG_ROUNDS) if few else bench)
    return [*rows, sum_of(f"{FLASH} {BOTH}", "dense", rows)], memory


def module(problem: Problem, bench: Bench, hidden_size: int) -> Found:
    """NativeSparseAttention with its projections."""
    entries, memory = module_entries(problem, bench, hidden_size)
    return time_group(entries, bench), memory


def branch_rows(name: str, work: Work, bench: Bench) -> list[Row]:
    """Every family of a branch's backward, and their sum at each locality."""
    specs = [spec for family, spec in all_specs().items() if family.startswith(BRANCHES[name])]
    rows = time_group([entry for spec in specs for entry in branch_entries(spec, work, bench)], bench)
    found = dict.fromkeys(row.locality for row in rows)
    localities: list[float | None] = [locality for locality in found if locality is not None] or [None]
    sums = [sum_of(name, "sum", [r for r in rows if r.locality in (x, None)], x) for x in localities]
    return rows + sums


def small_group(group: int, dtype: str, bench: Bench) -> Found:
    """Selected attention of one group size, forward and backward."""
    heads = GROUP_KV_HEADS * group
    sizes = {"seq_q": GROUP_TOKENS, "seq_k": GROUP_TOKENS, "num_q_heads": heads, "num_kv_heads": GROUP_KV_HEADS}
    problem = Problem(**sizes, dtype=dtype)
    work = Work(problem.replace(locality=0.0), tuple(map(float, LOCALITIES)))
    forward = time_group(branch_entries(get_spec("slc_attn_fwd"), work, bench), bench)
    return forward + branch_rows(SELECTED, work, bench), []


def long_context(tokens: int, stage: str, dtype: str, bench: Bench, phi: str) -> Found:
    """One sample, after a first call that tells the memory."""
    problem = Problem(seq_q=tokens, seq_k=tokens, locality=0.0, dtype=dtype)
    bench.say(f"{seq_text(tokens)}: {stage}")
    entries, memory = our_entries(problem, bench, phi, (stage,))
    return time_group(entries, replace(bench, rounds=1)), memory


def free(device: torch.device) -> None:
    """Give back what the last measurement held, what only a cycle of references keeps too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
