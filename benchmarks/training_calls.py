"""The differentiable calls that `training.py` times: nsa_attention and dense attention, tried once for their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from forward import MLP_FORWARD, make_module, projections_cost
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from training_page import BACKWARD, BOTH, FORWARD, NOT_SUPPORTED, SAVING, Memory

from nsa_autotune import ops
from nsa_autotune.bench.library import SDPA_BACKENDS, why_not
from nsa_autotune.bench.timing import Fn
from nsa_autotune.cli.bench_entries import MEAN_FORWARD, Bench, Entry, cost_of, dense_cost, sum_costs
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.errors import InvalidProblem
from nsa_autotune.kernels import all_specs
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import Cost, Problem


@dataclass(frozen=True)
class Contender:
    """A forward, its leaves, and the gradient of its output."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    do: Tensor | None = None  # none where no backward is asked for

    def call(self, stage: str) -> Fn:
        """What is timed; the backward alone keeps the graph of one forward."""
        if stage == BACKWARD:
            return partial(torch.autograd.grad, self.forward(), self.leaves, self.do, retain_graph=True)
        return {FORWARD: self._no_grad, SAVING: self.forward, BOTH: self._both}[stage]

    def _no_grad(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def _both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.do)

    @property
    def input_bytes(self) -> int:
        """What is held before a call."""
        return sum(x.numel() * x.element_size() for x in (*self.leaves, self.do) if x is not None)


Made = Contender | str  # or why there is none


def our_contender(
    problem: Problem, device: torch.device, phi: str, dispatcher: Dispatcher, learns: bool = True
) -> Contender:
    """nsa_attention with keys and values of every branch; `phi` is mean or mlp."""
    draw = _drawer(problem, device, learns)
    lead, kv = (problem.batch, problem.seq_q), problem.num_kv_heads
    given: dict[str, Any] = {"q": draw(*lead, problem.num_q_heads, problem.d_qk)}
    for branch in ("", "_slc", "_win"):
        given |= {f"k{branch}": draw(*lead, kv, problem.d_qk), f"v{branch}": draw(*lead, kv, problem.d_v)}
    with torch.no_grad():
        given["gates"] = draw(*lead, problem.num_q_heads, 3).sigmoid_()
    weights: dict[str, Any] = {}
    if phi == "mlp":
        weights = {"phi_k": _phi(problem, problem.d_qk, draw), "phi_v": _phi(problem, problem.d_v, draw)}
    call = partial(ops.nsa_attention, **given, **weights, config=problem.nsa, dispatcher=dispatcher)
    leaves = (*given.values(), *chain.from_iterable(vars(each).values() for each in weights.values()))
    do = draw(*lead, problem.num_q_heads, problem.d_v).detach() if learns else None
    return Contender(call, leaves, do)


def _drawer(problem: Problem, device: torch.device, learns: bool) -> Callable[..., Tensor]:
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, problem.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).requires_grad_(learns)

    return draw


def _phi(problem: Problem, width: int, draw: Callable[..., Tensor]) -> PhiWeights:
    size, hidden = problem.nsa.compress_block_size, problem.phi_hidden
    found = PhiWeights(draw(size, width), draw(size * width, hidden), draw(hidden), draw(hidden, width), draw(width))
    with torch.no_grad():
        found.w1.mul_((size * width) ** -0.5)
        found.w2.mul_(hidden**-0.5)
    return found


def module_contender(problem: Problem, device: torch.device, hidden_size: int, dispatcher: Dispatcher) -> Contender:
    """NativeSparseAttention on random tokens; the leaves are they and its weights."""
    draw, module = _drawer(problem, device, True), make_module(problem, hidden_size, dispatcher, device)
    x, do = (draw(problem.batch, problem.seq_q, hidden_size) for _ in range(2))
    return Contender(partial(module, x), (x, *module.parameters()), do.detach())


def dense_contender(provider: str, problem: Problem, device: torch.device, grouped: bool) -> Contender:
    """Dense causal attention; kv heads are repeated once, before the clock starts, unless `grouped`."""
    draw, backend = _drawer(problem, device, True), getattr(SDPBackend, SDPA_BACKENDS[provider])
    kv = problem.num_kv_heads if grouped else problem.num_q_heads  # random, so drawn as many as repeated
    q = draw(problem.batch, problem.num_q_heads, problem.seq_q, problem.d_qk)
    k, v = (draw(problem.batch, kv, problem.seq_k, width) for width in (problem.d_qk, problem.d_v))

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped and problem.group_size > 1)

    return Contender(forward, (q, k, v), draw(*q.shape[:-1], problem.d_v).detach())


def try_out(
    who: str, work: str, problem: Problem, kv_heads: str, device: torch.device, make: Callable[[], Contender]
) -> tuple[Made, list[Memory]]:
    """The contender after a first call and its memory, or why it does not run."""
    found: list[tuple[Contender, Memory]] = []

    def attempt() -> None:
        contender = make()
        peak = peak_bytes(contender.call(work), device)
        found.append((contender, Memory(who, work, problem, kv_heads, contender.input_bytes, peak)))

    reason = why_not(attempt)
    return (reason, []) if reason is not None else (found[0][0], [found[0][1]])


def peak_bytes(call: Fn, device: torch.device) -> int | None:
    """The most that one call allocates beyond what is allocated already; None where nobody counts."""
    if device.type != "cuda":
        call()
        return None
    gc.collect()  # what is freed during the call would be taken off its peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def our_cost(problem: Problem, phi: str) -> dict[str, Cost]:
    """Operations and bytes of each stage: those of its kernels."""
    pool = "cmp_mlp_bwd" if phi == "mlp" else "cmp_pool_bwd"
    attention = [family for family in all_specs() if "_attn_bwd" in family]
    forward = cost_of(MLP_FORWARD if phi == "mlp" else MEAN_FORWARD, problem)
    backward = cost_of(["gate_sum_bwd", *attention, pool], problem)
    return {FORWARD: forward, SAVING: forward, BACKWARD: backward, BOTH: sum_costs([forward, backward])}


def our_entries(
    problem: Problem, bench: Bench, phi: str, stages: Sequence[str] = (FORWARD, SAVING, BACKWARD, BOTH)
) -> tuple[list[Entry], list[Memory]]:
    """nsa_attention, in the stages of a training step; the last stage tells the memory."""
    dispatcher, costs = bench.make_dispatcher(None), our_cost(problem, phi)
    learns = any(stage != FORWARD for stage in stages)
    make = partial(our_contender, problem, bench.device, phi, dispatcher, learns)
    made, memory = try_out("nsa", stages[-1], problem, "grouped", bench.device, make)
    note = ", learned phi" if phi == "mlp" else ""
    entries = [
        Entry(f"{stage}{note}", "ours", problem, None, costs[stage], partial(_prepare, made, stage), dispatcher)
        for stage in stages
    ]
    return entries, memory


def module_entries(problem: Problem, bench: Bench, hidden_size: int) -> tuple[list[Entry], list[Memory]]:
    """The module with its projections, in the same stages."""
    dispatcher, inner = bench.make_dispatcher(None), our_cost(problem, "mlp")
    make = partial(module_contender, problem, bench.device, hidden_size, dispatcher)
    made, memory = try_out("nsa module", BOTH, problem, "grouped", bench.device, make)
    once = projections_cost(problem, hidden_size)
    entries = [
        Entry(
            f"{stage}, module of hidden size {hidden_size}",
            "module",
            problem,
            None,
            sum_costs([inner[stage], *[once] * times]),
            partial(_prepare, made, stage),
            dispatcher,
        )
        for stage, times in ((FORWARD, 1), (BACKWARD, 2), (BOTH, 3))
    ]
    return entries, memory


def dense_entries(provider: str, problem: Problem, bench: Bench) -> tuple[list[Entry], list[Memory]]:
    """Forward and backward of a library, grouped heads if it takes them."""
    made: Made = ""
    memory: list[Memory] = []
    for grouped in (True, False) if problem.group_size > 1 else (True,):
        make = partial(dense_contender, provider, problem, bench.device, grouped)
        made, memory = try_out(provider, BOTH, problem, "grouped" if grouped else "expanded", bench.device, make)
        if isinstance(made, Contender):
            break
        made = made if "out of memory" in made else f"{NOT_SUPPORTED}: {made}"
    forward = dense_cost(problem)
    wide, narrow = 3 * problem.d_qk + 2 * problem.d_v, problem.d_qk + problem.d_v  # five products, and two
    costs = {FORWARD: forward, BACKWARD: Cost(forward.flops * wide / narrow, 2 * forward.bytes_moved)}
    entries = [
        Entry(f"{provider} {stage}", "dense", problem, None, cost, partial(_prepare, made, stage))
        for stage, cost in costs.items()
    ]
    return entries, memory


def _prepare(made: Made, stage: str) -> Fn:
    if isinstance(made, str):
        raise InvalidProblem(made)
    return made.call(stage)
