"""The calls that a benchmark times: every family by itself, whole forwards, dense attention; and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .. import ops
from ..bench.fills import select_at_random
from ..bench.inputs import make_inputs, query_positions
from ..bench.library import library_call
from ..bench.timing import Clock, Fn
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidProblem
from ..kernels import get_spec
from ..ops.launches import launch_window_and_sum
from ..ops.serve import Call, scale_of
from ..search.presets import takes_one_tensor
from ..spec import ELEMENT_BYTES, Cost, KernelSpec, Problem
from .bench_report import CUDNN, END_TO_END, FLASH, GIVEN_BLOCKS

TARGET_MS = 1000.0  # of samples a line on average; at least 5 samples whatever they take
MEAN_FORWARD = ("cmp_pool_fwd", "cmp_attn_fwd", "slc_select_fwd", "slc_attn_fwd", "win_attn_fwd", "gate_sum_fwd")

MakeDispatcher = Callable[[float | None], Dispatcher]  # locality assumed of selections, None for the usual one
Forward = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, gates


@dataclass(frozen=True)
class Work:
    """One shape at one sequence length, and the localities at which its selected attention is timed."""

    problem: Problem  # at locality 0
    localities: tuple[float, ...]


@dataclass(frozen=True)
class Bench:
    """Where and how things are timed."""

    device: torch.device
    clock: Clock
    make_dispatcher: MakeDispatcher
    rounds: int
    target_ms: float = TARGET_MS
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Entry:
    """A line to be: what it is called and costs, and how to get a call of it."""

    work: str
    kind: str
    problem: Problem
    locality: float | None
    cost: Cost
    prepare: Callable[[], Fn]
    dispatcher: Dispatcher | None = None


def launches(spec: KernelSpec, problem: Problem) -> tuple[Problem, ...]:
    """What a forward asks of a family: keys and values in turn of one that takes a single tensor."""
    if not takes_one_tensor(spec):
        return (problem,)
    return tuple(problem.replace(d_qk=width, d_v=width) for width in (problem.d_qk, problem.d_v))


def cost_of(families: Sequence[str], problem: Problem) -> Cost:
    """Operations and bytes of all launches of these families."""
    return sum_costs(
        spec.cost(part, spec.default_config(part))
        for spec in map(get_spec, families)
        for part in launches(spec, problem)
    )


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """Operations and bytes of all."""
    found = list(costs)
    return Cost(sum(cost.flops for cost in found), sum(cost.bytes_moved for cost in found))


def branch_entries(spec: KernelSpec, work: Work, bench: Bench) -> list[Entry]:
    """One entry of a family, or one for each locality if that matters to it."""
    depends = "locality" in spec.problem_fields
    name = f"{spec.family}, k and v" if takes_one_tensor(spec) else spec.family
    cost, entries = cost_of([spec.family], work.problem), []
    for locality in work.localities if depends else (None,):
        problem = work.problem.replace(locality=locality or 0.0)
        dispatcher = bench.make_dispatcher(locality)
        prepare = partial(_branch_call, spec, problem, dispatcher, bench.device)
        entries.append(Entry(name, "branch", work.problem, locality, cost, prepare, dispatcher))
    return entries


def _branch_call(spec: KernelSpec, problem: Problem, dispatcher: Dispatcher, device: torch.device) -> Fn:
    """Launch the family through the dispatcher on inputs of its own."""
    calls = []
    for seed, part in enumerate(launches(spec, problem)):
        inputs = make_inputs(spec, part, device, seed)
        launch = partial(_launch, spec, part, dispatcher, device)
        calls.append(partial(inputs.call, launch))
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _launch(
    spec: KernelSpec, problem: Problem, dispatcher: Dispatcher, device: torch.device, **tensors: object
) -> None:
    dispatcher.launch(spec, (spec.family, problem), lambda: problem, device, tensors)


def whole_entries(work: Work, bench: Bench) -> list[Entry]:
    """The forward as called, and with the blocks of each locality given to selected attention."""
    problem = work.problem
    tensors = cache(partial(_forward_tensors, problem, bench.device))  # shared by the entries, freed with them
    cost, usual = cost_of(MEAN_FORWARD, problem), bench.make_dispatcher(None)

    def end_to_end() -> Fn:
        return partial(ops.nsa_attention, *tensors(), config=problem.nsa, dispatcher=usual)

    def given(locality: float, dispatcher: Dispatcher) -> Fn:
        blocks = _blocks(problem.replace(locality=locality), bench.device)
        return partial(_forward_given, *tensors(), blocks, problem, dispatcher)

    entries = [Entry(END_TO_END, "whole", problem, None, cost, end_to_end, usual)]
    for locality in work.localities:
        own = bench.make_dispatcher(locality)
        prepare = partial(given, locality, own)
        entries.append(Entry(GIVEN_BLOCKS, "whole", problem, locality, cost, prepare, own))
    return entries


def _forward_tensors(problem: Problem, device: torch.device) -> Forward:
    """Random q `[B, T, HQ, D_QK]`, k `[B, T, H, D_QK]`, v `[B, T, H, D_V]`, gates `[B, T, HQ, 3]` in (0, 1)."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (
        (problem.num_q_heads, problem.d_qk),
        (problem.num_kv_heads, problem.d_qk),
        (problem.num_kv_heads, problem.d_v),
        (problem.num_q_heads, 3),
    )
    q, k, v, gates = (
        torch.randn(
            *(problem.batch, problem.seq_q, heads, width),
            dtype=getattr(torch, problem.dtype),
            device=device,
            generator=generator,
        )
        for heads, width in sizes
    )
    return q, k, v, gates.sigmoid_()


def _blocks(problem: Problem, device: torch.device) -> Tensor:
    """Synthetic blocks of the problem's locality: int32 `[B, T, H, n]`."""
    positions = query_positions(problem, None, device)
    generator = torch.Generator(device).manual_seed(1)
    return select_at_random(positions, problem.batch, problem.num_kv_heads, problem.nsa, problem.locality, generator)


def _forward_given(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, given: Tensor, problem: Problem, dispatcher: Dispatcher
) -> Tensor:
    """The lines of `ops.nsa_attention`; the selection runs, and then `given` blocks are attended to."""
    config, seq_k = problem.nsa, problem.seq_k
    k_cmp = ops.compress(k, config, dispatcher=dispatcher)
    v_cmp = ops.compress(v, config, dispatcher=dispatcher)
    o_cmp, lse = ops.compressed_attention(q, k_cmp, v_cmp, config, seq_k=seq_k, dispatcher=dispatcher)
    ops.select_blocks(q, k_cmp, lse, config, seq_k=seq_k, dispatcher=dispatcher)
    o_slc, _ = ops.selected_attention(q, k, v, given, config, dispatcher=dispatcher)
    call = Call(config, seq_k, scale_of(q, None), None, dispatcher)
    return launch_window_and_sum(gates, q, k, v, o_cmp, o_slc, call)[-1]


def dense_entries(problem: Problem, bench: Bench) -> list[Entry]:
    """Dense causal attention by each library."""

    def prepare(provider: str) -> Fn:
        call, reason = library_call(provider, problem, bench.device)
        if call is None:
            raise InvalidProblem(reason)
        return call

    cost = dense_cost(problem)
    return [Entry(name, "dense", problem, None, cost, partial(prepare, name)) for name in (CUDNN, FLASH)]


def dense_cost(problem: Problem) -> Cost:
    """QK and PV products over the causal triangle; q, k, v are read and o is written once."""
    tokens, width = problem.batch * problem.seq_q, problem.d_qk + problem.d_v
    pairs = tokens * (problem.seq_k + 1) / 2
    moved = ELEMENT_BYTES[problem.dtype] * tokens * width * (problem.num_q_heads + problem.num_kv_heads)
    return Cost(flops=2.0 * pairs * problem.num_q_heads * width, bytes_moved=float(moved))
