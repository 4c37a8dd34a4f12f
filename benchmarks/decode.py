"""Claim: a decode step over a paged cache takes about the time in which the bytes that it must read are copied.

Measures a step (append and attention), its parts and its kernels beside dense attention by cuDNN and FlashAttention-2,
in a CUDA graph and launched one by one; writes `results/<date>-<gpu>-decode.md` and `.json` beside this file. With
--tune MINUTES the two kernels of attention are tuned for these problems first, by the code of `nsa-autotune tune`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode_calls import POLICY, dense_entries, our_entries
from decode_page import COMPRESSED, GATHERED, Line, markdown, size_text, to_dict
from forward import RESULTS, gpu_slug, results_folder, without_places, write_page

from nsa_autotune.bench.timing import Fn, make_clock
from nsa_autotune.cli.bench import say
from nsa_autotune.cli.bench_entries import Bench, Entry
from nsa_autotune.cli.bench_report import Report
from nsa_autotune.cli.bench_run import check_device, make_report, measure_rates, open_bench, time_group
from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, split
from nsa_autotune.cli.tune import plan_work
from nsa_autotune.cli.tune_run import EXIT_INTERRUPTED, Run, execute
from nsa_autotune.errors import InvalidInput, NSAError
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.budget import Budget
from nsa_autotune.spec import Problem

PRESET, SHAPES = "gqa16-d128", "64x8k,16x32k,8x64k,4x128k,1x64k,1x128k"
ROUNDS, MIN_ROUNDS, TARGET_MS = 20, 5, 100.0  # samples a line; at least 5 whatever they take
HOST_CALLS, HOST_ROUNDS = 50, 5
TUNED_DB = "sqlite:///decode.sqlite"  # of --tune without --db, in the current folder


def main(arguments: Sequence[str]) -> int:
    """Tune if asked to, measure and write; 0 if everything of ours ran, 1 if not, 2 after a mistake."""
    options = parse(arguments)
    command = shlex.join(["python", "benchmarks/decode.py", *without_places(arguments)])
    try:
        plan, where = make_plan(options), check_device(options.device)
        options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
        if options.tune:
            options.db = options.db or TUNED_DB
            tune(plan, options)
        report, lines = run(plan, options, where, command)
        for path in write_results(report, lines, options):
            print(path)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return int(any(line.failed for line in lines))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="batch x length, such as 8x64k,1x64k for a quick try")
    parser.add_argument("--preset", default=PRESET, help="heads and head dims, which the options below change")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--d-qk", type=int)
    parser.add_argument("--d-v", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype", help="fp8, or problem (as --dtype)")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--new", default="1", help="new tokens of every sequence")
    parser.add_argument("--phi", choices=("mean", "mlp"), default="mean", help="compression: by the mean, or learned")
    parser.add_argument("--head-major", action="store_true", help="pages in which a head's tokens lie together")
    parser.add_argument("--tune", type=float, metavar="MINUTES", help=f"tune first, in --db or {TUNED_DB}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="most samples of a line")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--db", default=None)
    parser.add_argument("--untuned", action="store_true", help="default configs only")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> list[Problem]:
    """A problem for each shape; raises InvalidInput or InvalidProblem before anything is measured."""
    if options.rounds < MIN_ROUNDS:
        values = {"--rounds": options.rounds}
        raise InvalidInput("a line has at least 5 samples", values, "Write for example --rounds 10.")
    if options.untuned and options.tune:
        raise InvalidInput("--untuned serves default configs, so it is not for --tune", {}, "Choose one of them.")
    sizes = ("heads", "kv_heads", "d_qk", "d_v", "page_size", "cache_dtype")
    changes: dict[str, Any] = {name: getattr(options, name) for name in sizes}
    plan: list[Problem] = []
    for shape in split([options.shapes], "--shapes"):
        batch, times, length = shape.partition("x")
        if not (times and length and batch.isdecimal() and int(batch)):
            raise InvalidInput("a shape is batch x length", {"--shapes": shape}, "Write for example --shapes 8x64k.")
        choice = ProblemChoice(options.preset, length, (options.dtype,), layout="paged", batch=int(batch), **changes)
        plan += replace(choice, seq_q=options.new).problems(PRESET)
    for problem in plan:
        for family in (COMPRESSED, GATHERED):
            get_spec(family).check_problem(problem)
    return plan


def tune(plan: Sequence[Problem], options: argparse.Namespace) -> None:
    """Search both kernels of attention for all problems within --tune minutes, under the policy of a graph."""
    work = plan_work([get_spec(COMPRESSED), get_spec(GATHERED)], plan)
    budget = Budget(max_minutes=options.tune)
    cores = os.cpu_count() or 1
    code = execute(Run(tuple(work), budget, options.db, options.device, (), False, cores, True, policy=POLICY))
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        say("a problem has no winner; its lines tell what serves it")


def run(
    plan: Sequence[Problem], options: argparse.Namespace, where: torch.device, command: str
) -> tuple[Report, list[Line]]:
    """Measure every shape."""
    lines: list[Line] = []
    how: dict[str, Any] = {"db": options.db, "untuned": options.untuned, "rounds": options.rounds, "say": say}
    with open_bench(where, **how, target_ms=TARGET_MS) as bench:
        rates = {plan[0].dtype: measure_rates(bench, plan[0].dtype)}
        for problem in plan:
            lines += measure(problem, bench, options.phi, options.head_major)
            if where.type == "cuda":
                torch.cuda.empty_cache()
    rows = [row for line in lines for row in (line.graph, line.eager)]
    return make_report(bench, command, options.untuned, rates, rows), lines


def measure(problem: Problem, bench: Bench, phi: str, head_major: bool = False) -> list[Line]:
    """All lines of a shape, interleaved under either clock; its tensors are freed afterwards."""
    bench.say(f"{size_text(problem)}: first calls")
    entries = [*our_entries(problem, bench, phi, head_major), *dense_entries(problem, bench)]
    graph = time_group(entries, replace(bench, clock=make_clock(bench.device, graph=True)))  # graphs hold tensors
    eager = time_group(entries, bench)
    both = zip(entries, graph, eager, strict=True)
    return [Line(g, e, host_us(entry, bench.device) if e.median_us else None) for entry, g, e in both]


def host_us(entry: Entry, device: torch.device) -> float:
    """Microseconds of a call on the host, the median of several runs that the device's queue does not slow down."""
    fn = entry.prepare()
    return statistics.median(_enqueue_us(fn, device) for _ in range(HOST_ROUNDS))


def _enqueue_us(fn: Fn, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(HOST_CALLS):
        fn()
    return (time.perf_counter() - started) * 1e6 / HOST_CALLS


def write_results(report: Report, lines: Sequence[Line], options: argparse.Namespace) -> list[Path]:
    """The dated page and the JSON behind it; returns their paths."""
    date, gpu, problem = report.created[:10], report.fingerprint["gpu"], lines[0].problem
    unusual = {
        "untuned": options.untuned,
        "mlp": options.phi == "mlp",
        "head-major": options.head_major,
        "fp8": problem.cache_dtype != "problem",
        f"q{problem.seq_q}": problem.seq_q > 1,
    }
    stem = "-".join([date, gpu_slug(gpu), "decode", *(name for name, is_so in unusual.items() if is_so)])
    text = json.dumps(to_dict(report, lines), indent=1, allow_nan=False) + "\n"
    return write_page(options.folder / stem, markdown(report, lines, f"Decode on {gpu}, {date}"), text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
