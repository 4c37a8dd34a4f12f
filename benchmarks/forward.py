"""Claim: the forward of Native Sparse Attention on tuned kernels is faster than dense attention at long contexts.

Measures what `nsa-autotune bench` measures and writes `results/<date>-<gpu>-forward.md` and `.json` beside this file.
With --module also NativeSparseAttention with its projections, learned compression and keys and values of every branch.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from nsa_autotune import NativeSparseAttention
from nsa_autotune.bench.timing import Fn
from nsa_autotune.cli.bench import LOCALITIES, PRESET, ROUNDS, json_text, plan_work, say, show
from nsa_autotune.cli.bench_entries import MEAN_FORWARD, Bench, Entry, cost_of, sum_costs
from nsa_autotune.cli.bench_report import Report, markdown
from nsa_autotune.cli.bench_run import Extra, run
from nsa_autotune.cli.console import errors, write_text
from nsa_autotune.cli.options import ProblemChoice, parse_dtype, split
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.errors import InvalidInput, NSAError
from nsa_autotune.spec import ELEMENT_BYTES, Cost, Problem

RESULTS = Path(__file__).parent / "results"
MLP_FORWARD = ("cmp_mlp_fwd", *MEAN_FORWARD[1:])


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; 0 if everything of ours ran, 2 after a mistake."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
    command = shlex.join(["python", "benchmarks/forward.py", *without_places(arguments)])
    localities = tuple(split([options.locality]))
    extras: list[Extra] = [partial(module_entry, hidden_size=options.hidden_size)] if options.module else []
    try:
        check_hidden_size(options.hidden_size)
        dtypes = asked_dtypes(options.dtype)
        choices = (ProblemChoice(preset, options.seq, dtypes, localities) for preset in split([options.preset]))
        plan = plan_work(problem for choice in choices for problem in choice.problems(PRESET))
        report = run(
            plan,
            device=options.device,
            db=options.db,
            untuned=options.untuned,
            rounds=options.rounds,
            command=command,
            extras=extras,
            say=say,
        )
        show(report)
        for path in write_results(report, options.folder, dtypes):
            print(path)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return int(any(row.failed for row in report.rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET, help="one or more, with commas between them")
    parser.add_argument("--seq", default="8k,32k,64k")
    parser.add_argument("--dtype", default="", help="one or more; as the preset if none; then named in the page's file")
    parser.add_argument("--locality", default=",".join(LOCALITIES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--db", default=None)
    parser.add_argument("--untuned", action="store_true", help="default configs only")
    parser.add_argument("--module", action="store_true", help="also the module with its projections")
    parser.add_argument("--hidden-size", type=int, default=4096, help="of the module")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A number from 1 on, as an option's type."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed; got {text}")
    return int(text)


def results_folder(text: str) -> Path:
    """A folder that there is or can be, as an option's type."""
    path = Path(text)
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"a folder is needed; {nearest} is a file")
    return path


def asked_dtypes(text: str) -> tuple[str, ...]:
    """The dtypes of --dtype by their full names; none if it was not given."""
    return tuple(dict.fromkeys(map(parse_dtype, split([text]))))


def check_hidden_size(size: int) -> None:
    """Raise InvalidInput for a module of no width, before anything is measured."""
    if size < 1:
        raise InvalidInput("a module has a width", {"--hidden-size": size}, "Write for example --hidden-size 4096.")


def without_places(arguments: Sequence[str]) -> list[str]:
    """The arguments but for paths of this machine, which say nothing to others."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.partition("=")[0] not in ("--db", "--folder", "--file"):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def write_results(report: Report, folder: Path, dtypes: Sequence[str]) -> list[Path]:
    """The dated page and the JSON behind it; returns their paths."""
    date, gpu = report.created[:10], report.fingerprint["gpu"]
    stem = "-".join([date, gpu_slug(gpu), "forward", *dtypes])
    return write_page(folder / stem, markdown(report, f"Forward on {gpu}, {date}"), json_text(report))


def write_page(stem: Path, page: str, data: str) -> list[Path]:
    """`<stem>.md` and `<stem>.json`; returns their paths."""
    texts = {stem.with_name(f"{stem.name}.md"): page, stem.with_name(f"{stem.name}.json"): data}
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def gpu_slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` as h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def module_entry(bench: Bench, problem: Problem, *, hidden_size: int) -> Entry:
    """The whole module on random tokens, timed beside the whole forward."""
    dispatcher = bench.make_dispatcher(None)
    prepare = partial(module_call, problem, hidden_size, dispatcher, bench.device)
    name = f"module, hidden size {hidden_size}"
    return Entry(name, "module", problem, None, module_cost(problem, hidden_size), prepare, dispatcher)


def module_call(problem: Problem, hidden_size: int, dispatcher: Dispatcher, device: torch.device) -> Fn:
    """A forward of NativeSparseAttention with random weights."""
    module = make_module(problem, hidden_size, dispatcher, device).requires_grad_(False)
    dtype = getattr(torch, problem.dtype)
    return partial(module, torch.randn(problem.batch, problem.seq_q, hidden_size, device=device, dtype=dtype))


def make_module(
    problem: Problem, hidden_size: int, dispatcher: Dispatcher, device: torch.device
) -> NativeSparseAttention:
    """The module of a problem's shape."""
    module = NativeSparseAttention(
        hidden_size,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.d_qk,
        problem.d_v,
        config=problem.nsa,
        phi_hidden=problem.phi_hidden,
        dispatcher=dispatcher,
    )
    return module.to(device, getattr(torch, problem.dtype))


def module_cost(problem: Problem, hidden_size: int) -> Cost:
    """The branches and the projections; rotary and gates' sigmoid are left out."""
    return sum_costs([cost_of(MLP_FORWARD, problem), projections_cost(problem, hidden_size)])


def projections_cost(problem: Problem, hidden_size: int) -> Cost:
    """The projections of a forward; a backward costs them twice."""
    p, tokens = problem, problem.batch * problem.seq_q
    width = p.num_q_heads * (p.d_qk + p.d_v + 3) + 3 * p.num_kv_heads * (p.d_qk + p.d_v)  # of all projections
    moved = ELEMENT_BYTES[p.dtype] * (hidden_size * width + tokens * (2 * hidden_size + width))
    return Cost(2.0 * tokens * hidden_size * width, float(moved))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
