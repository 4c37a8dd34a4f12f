"""Claim: to look a kernel up takes at most 1 us of the host, and to launch a prepared one at most 5 us of Python.

Measures lookup, prepared launch and Triton's own launch of each forward kernel and of some backward ones, then a whole
nsa_attention and a module; writes `results/<date>-<gpu>-dispatch.md` and `.json`. Without a GPU kernels are compiled
for cuda:90 and launched on a driver that does nothing (see stub_cuda.py), so that only the host's share is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dispatch_machine import machine
from dispatch_raw import raw_launch
from forward import positive, results_folder, without_places, write_page

from nsa_autotune import KVCache, NativeSparseAttention, NSAConfig, nsa_attention
from nsa_autotune.cli.bench_report import markdown_table
from nsa_autotune.codegen.compile import meta_arguments
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.dispatch.ladder import Choice, Step
from nsa_autotune.dispatch.triton_launch import CannotPrepareError, active_device
from nsa_autotune.kernels import get_spec
from nsa_autotune.ops import serve
from nsa_autotune.ops.append import append
from nsa_autotune.ops.decode import decode_attention
from nsa_autotune.spec import KernelSpec, Problem

RESULTS = Path(__file__).parent / "results"
PROBLEM = Problem(seq_q=128, seq_k=128, num_q_heads=16, num_kv_heads=1, d_qk=64, d_v=64)
STEP = PROBLEM.replace(layout="paged", seq_q=1)  # a decode step
HIDDEN = 64
VARIANTS: tuple[tuple[str, dict[str, Any], int], ...] = (  # family, changes of its default config, kernels
    ("cmp_pool_fwd", {}, 1),
    ("cmp_mlp_fwd", {}, 1),
    ("cmp_attn_fwd", {"use_tma": False}, 1),
    ("cmp_attn_fwd", {"use_tma": True}, 1),
    ("slc_select_fwd", {}, 1),
    ("slc_attn_fwd", {}, 1),
    ("slc_attn_fwd", {"loop_order": "union", "BLOCK_T": 4, "use_tma": True}, 2),
    ("win_attn_fwd", {"use_tma": True}, 1),
    ("gate_sum_fwd", {}, 1),
    ("win_attn_bwd_dq", {}, 1),
    ("slc_attn_bwd_dkv", {}, 7),
    ("cmp_pool_append_fwd", {}, 1),
    ("cmp_decode_fwd", {}, 1),
    ("slc_win_decode_fwd", {}, 1),
)
COLUMNS = ("work", "kernels", "us", "p20..p80", "us a kernel", "Python's us a kernel", "mark us")
NUMBERS = COLUMNS[1:]
LOOKUP_MARK_US, LAUNCH_MARK_US = 1.0, 5.0
NOTES = (
    "us: median of the host's time for one call, with the 20th and 80th percentile; a sample is the mean of its calls.",
    "Samples of all lines are taken in turns.",
    "lookup: the table's answer for a ready key. key and lookup: also the key's making, as the operators do it.",
    "prepared: Dispatcher.launch, lookup included. Triton's own: the generated launch function as it stands.",
    "what it calls: the C launcher, the driver in it, and operators between kernels; arguments ready, scratch kept.",
    "The rest of prepared is Python's share, which the mark judges.",
    "Kernels by themselves are served as winners; nsa_attention's and a module's launches are also counted as misses.",
    "Some launches also allocate scratch or run PyTorch operators between kernels; both ways pay for them.",
    "nsa_attention, module and what else runs whole: on a CPU their matrix products and PyTorch operators run.",
)


@dataclass(frozen=True)
class Line:
    """What is measured: a call, the kernels that it launches, and the most it may take, per kernel."""

    work: str
    call: Callable[[], object]
    kernels: int = 0
    mark_us: float | None = None
    without: str = ""  # the work whose time is not Python's


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with machine() as (device, facts):
        lines = [*lookup_lines(device), *kernel_lines(device), *whole_lines(device)]
        samples = measure(lines, options.samples, options.calls, device)
    command = shlex.join(["python", "benchmarks/dispatch.py", *without_places(arguments)])
    count = f"{options.samples} of {options.calls} calls a line"
    facts = {**facts, "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "samples": count}
    page = make_page(facts, lines, samples)
    print(page)
    stem = options.folder / f"{facts['date'][:10]}-{facts['slug']}-dispatch"
    rows = [
        {"work": line.work, "kernels": line.kernels, "samples_us": found}
        for line, found in zip(lines, samples, strict=True)
    ]
    data = {"facts": facts, "problem": PROBLEM.to_dict(), "rows": rows}
    write_page(stem, page, json.dumps(data, indent=1) + "\n")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=positive, default=150)
    parser.add_argument("--calls", type=positive, default=20, help="few, as kernels alternate in a model")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.samples < 2:
        parser.error(f"--samples: a spread needs at least two; got {options.samples}")
    return options


def dispatcher(device: torch.device, prepared: bool = True) -> Dispatcher:
    """One without winners; on the stub, where nothing runs, launches are trusted untested."""

    def never() -> None:
        raise CannotPrepareError("asked for Triton's own launch")

    if not prepared:
        return Dispatcher(None, trusted=never, fingerprint=None if device.type == "cuda" else for_target("cuda:90"))
    if device.type == "cuda":
        return Dispatcher(None)
    return Dispatcher(None, trusted=lambda: None, fingerprint=for_target("cuda:90"))


def lookup_lines(device: torch.device) -> list[Line]:
    """The table's answer by itself."""
    served, spec = dispatcher(device), get_spec("win_attn_fwd")
    given, config = arguments_of("win_attn_fwd", device), NSAConfig()
    q, k, v = given["q"], given["k"], given["v"]

    def key() -> tuple[Any, ...]:
        return (spec.family, device.index, q.shape, k.shape, v.shape[-1], q.dtype, config, serve.packing_of(None), 128)

    served.launch(spec, key(), lambda: PROBLEM, device, given)
    ready, find = key(), served._plans.get
    return [
        Line("lookup", lambda: find(ready), mark_us=LOOKUP_MARK_US),
        Line("key and lookup", lambda: find(key())),
    ]


def kernel_lines(device: torch.device) -> list[Line]:
    """Each variant launched both ways."""
    lines: list[Line] = []
    index, stream_of = active_device()
    stream = stream_of(index)
    for family, changes, kernels in VARIANTS:
        spec = get_spec(family)
        problem = problem_of(spec)
        config = {**spec.default_config(problem), **changes}
        served, given = Fixed(device, config), arguments_of(family, device)
        launch = load(render(spec, problem, config)).launch
        name = " ".join([family, *(f"{n}={v}" for n, v in changes.items())])
        prepared = partial(served.launch, spec, (family, device.index), partial(problem_of, spec), device, given)
        prepared()
        if served.ordinary:
            raise RuntimeError(f"{name} was not prepared: {dict(served.ordinary)}")
        called = f"{name}: what it calls"
        lines += [
            Line(f"{name}: prepared", prepared, kernels, LAUNCH_MARK_US, called),
            Line(f"{name}: Triton's own", partial(launch, **given), kernels),
            Line(called, raw_launch(launch, given, stream), kernels),
        ]
    return lines


def problem_of(spec: KernelSpec) -> Problem:
    """What the family is asked for."""
    return STEP if spec.layouts == ("paged",) else PROBLEM


class Fixed(Dispatcher):
    """Serves one config as a winner."""

    def __init__(self, device: torch.device, config: dict[str, Any]) -> None:
        like = dispatcher(device)
        super().__init__(None, fingerprint=like._fingerprint, trusted=like._trusted)
        self._config = config

    def choose(self, spec: KernelSpec, problem: Problem, device: Any = "cuda:0") -> Choice:
        return Choice(self._config, Step.EXACT)


def arguments_of(family: str, device: torch.device) -> dict[str, Any]:
    """Tensors of zeros: every selected block is the first, which is legal."""
    spec = get_spec(family)
    given = meta_arguments(spec, problem_of(spec))
    given = {name: value for name, value in given.items() if value is not None}  # left to their default
    if family == "slc_win_decode_fwd":  # a cache's branches share their tokens unless it is told otherwise
        given |= {"k_win": given["k_slc"], "v_win": given["v_slc"]}
    made = {id(v): torch.zeros_like(v, device=device) for v in given.values() if isinstance(v, torch.Tensor)}
    found = {n: made.get(id(v), v) for n, v in given.items()}
    if "gate" in found:  # training passes a column of three gates, which is not aligned
        gate = found["gate"]
        found["gate"] = gate.new_zeros((*gate.shape, 3))[..., 1]
    return found


def whole_lines(device: torch.device) -> list[Line]:
    """nsa_attention and the module, with prepared launches and without."""
    p = PROBLEM
    like: dict[str, Any] = {"device": device, "dtype": getattr(torch, p.dtype)}
    q = torch.randn(1, p.seq_q, p.num_q_heads, p.d_qk, **like)
    k, v = (torch.randn(1, p.seq_k, p.num_kv_heads, d, **like) for d in (p.d_qk, p.d_v))
    gates, x = torch.rand(1, p.seq_q, p.num_q_heads, 3, **like), torch.randn(1, p.seq_q, HIDDEN, **like)
    lines: list[Line] = []
    for name, prepared in (("prepared", True), ("Triton's own", False)):
        served = dispatcher(device, prepared)
        module = NativeSparseAttention(HIDDEN, p.num_q_heads, p.num_kv_heads, p.d_qk, dispatcher=served)
        module = module.to(**like).requires_grad_(False)
        attend = partial(nsa_attention, q, k, v, gates, config=p.nsa, dispatcher=served)
        lines += [
            Line(f"nsa_attention, mean compression: {name}", attend, 7),
            Line(f"module with rotary and learned compression: {name}", partial(module, x), 7),
            Line(f"decode step, mean compression: {name}", decode_step(device, served), 3),
            Line(f"forward and gradients, mean compression: {name}", training_step(served, q, k, v, gates), 22),
        ]
    return lines


def training_step(served: Dispatcher, *tensors: torch.Tensor) -> Callable[[], object]:
    """The output of nsa_attention and the gradients of its tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    do, attend = torch.ones_like(leaves[0]), partial(nsa_attention, *leaves, config=PROBLEM.nsa, dispatcher=served)
    return lambda: torch.autograd.grad(attend(), leaves, do)


def decode_step(device: torch.device, served: Dispatcher) -> Callable[[], object]:
    """Append a token and attend, over a cache whose lengths stay as they are."""
    p = STEP
    sizes: dict[str, Any] = {"num_kv_heads": p.num_kv_heads, "d_qk": p.d_qk, "d_v": p.d_v, "config": p.nsa}
    cache = KVCache.paged(num_pages=16, max_batch=1, max_tokens=1024, device=device, **sizes)
    cache.reserve(1024)
    like: dict[str, Any] = {"device": device, "dtype": getattr(torch, p.dtype)}
    q, gates = torch.randn(1, 1, p.num_q_heads, p.d_qk, **like), torch.rand(1, 1, p.num_q_heads, 3, **like)
    k, v = (torch.randn(1, 1, p.num_kv_heads, d, **like) for d in (p.d_qk, p.d_v))
    where = (cache.pools, cache.block_table, cache.lengths.fill_(100))

    def step() -> None:
        append(k, v, *where, config=p.nsa, dispatcher=served)
        decode_attention(q, gates, *where, config=p.nsa, counters=cache.counters, dispatcher=served)

    return step


def measure(lines: Sequence[Line], samples: int, calls: int, device: torch.device) -> list[list[float]]:
    """Microseconds a call, `samples` of each line, all lines in turns."""
    found: list[list[float]] = [[] for _ in lines]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for turn in range(-2, samples):  # the first two warm up
        for line, times in zip(lines, found, strict=True):
            count = min(calls, 20) if line.kernels > 6 else calls  # a GPU's queue holds about a thousand launches
            wait()
            start = time.perf_counter_ns()
            for _ in range(count):
                line.call()
            if turn >= 0:
                times.append((time.perf_counter_ns() - start) / 1e3 / count)
    wait()
    return found


def make_page(facts: dict[str, str], lines: Sequence[Line], samples: Sequence[Sequence[float]]) -> str:
    """The dated page."""
    shown = [(name, value) for name, value in facts.items() if name != "slug"]
    medians = {line.work: statistics.median(found) for line, found in zip(lines, samples, strict=True)}
    rows = [row_of(line, found, medians) for line, found in zip(lines, samples, strict=True)]
    p = PROBLEM
    shape = f"batch 1, {p.seq_q} tokens, {p.num_q_heads} query heads, {p.num_kv_heads} kv head, d {p.d_qk}, {p.dtype}"
    text = [f"# Host cost of a launch, {facts['slug']}, {facts['date'][:10]}", ""]
    text += [*markdown_table(("what", "found"), shown, ()), "", f"## {shape}", ""]
    text += [*markdown_table(COLUMNS, rows, NUMBERS), "", *(f"- {note}" for note in NOTES)]
    return "\n".join(text) + "\n"


def row_of(line: Line, found: Sequence[float], medians: Mapping[str, float]) -> tuple[object, ...]:
    """The cells of a line."""
    middle, quantiles = medians[line.work], statistics.quantiles(found, n=5)
    each = middle / line.kernels if line.kernels else None
    python = (middle - medians[line.without]) / line.kernels if line.without else None
    judged = next(value for value in (python, each, middle) if value is not None)
    mark = "" if line.mark_us is None else f"{line.mark_us:g} ({'met' if judged <= line.mark_us else 'missed'})"
    shown = ["" if value is None else f"{value:.2f}" for value in (each, python)]
    return (line.work, line.kernels or "", f"{middle:.2f}", f"{quantiles[0]:.2f}..{quantiles[3]:.2f}", *shown, mark)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
