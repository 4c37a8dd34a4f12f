"""The calls that `decode.py` times: a step and its parts over a cache in random pages, and dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from decode_page import APPEND, ATTENTION, COMPRESSED, GATHERED, STEP, append_bytes, keys_read, moved_bytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_autotune.bench.library import SDPA_BACKENDS, why_not
from nsa_autotune.bench.timing import Fn
from nsa_autotune.cli.bench_entries import Bench, Entry
from nsa_autotune.cli.bench_report import CUDNN, FLASH
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.errors import InvalidProblem
from nsa_autotune.kernels import get_spec
from nsa_autotune.ops.append import append
from nsa_autotune.ops.decode import decode_attention, decode_counters, pages
from nsa_autotune.ops.phi import FoldedPhi, fold
from nsa_autotune.paged import FP8, CachePools, Pages
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import Cost, Problem

POLICY = "graph-cold"  # whose winners serve, whichever clock runs
ROWS, GROUPED, EXPANDED = "heads of a group as rows", "enable_gqa", "heads repeated"


@dataclass(frozen=True)
class Filled:
    """A cache of random tokens in random pages, the tensors of one step, and the weights of phi if it is learned."""

    pools: CachePools
    table: Tensor  # [B, MP] int32
    lengths: Tensor  # [B] int32, all the problem's seq_k
    counters: Tensor
    q: Tensor  # [B, Q, HQ, D_QK]
    gates: Tensor  # [B, Q, HQ, 3]
    k: Tensor  # [B, Q, H, D_QK]
    v: Tensor  # [B, Q, H, D_V]
    phi: dict[str, Any]  # arguments of `append`

    def append(self, problem: Problem, dispatcher: Dispatcher) -> None:
        """Writes the new tokens, again where they are already, and the compressed rows that they complete."""
        where = (self.k, self.v, self.pools, self.table, self.lengths)
        append(*where, config=problem.nsa, dispatcher=dispatcher, **self.phi)

    def attend(self, problem: Problem, dispatcher: Dispatcher) -> Tensor:
        """The two kernels of attention."""
        where = (self.q, self.gates, self.pools, self.table, self.lengths)
        how: dict[str, Any] = {"counters": self.counters, "max_length": problem.seq_k, "dispatcher": dispatcher}
        return decode_attention(*where, config=problem.nsa, **how)

    def step(self, problem: Problem, dispatcher: Dispatcher) -> Tensor:
        """Both."""
        self.append(problem, dispatcher)
        return self.attend(problem, dispatcher)


def fill(problem: Problem, device: torch.device, phi: str, head_major: bool = False) -> Filled:
    """Equal for equal problems; `phi` is mean or mlp, and the branches share keys and values.

    `head_major`: the tokens of a page lie together for each head, not the heads for each token.
    """
    p, dtype = problem, getattr(torch, problem.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    each = -(-p.seq_k // p.page_size)
    count = p.batch * each
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    def pool(rows: int, width: int) -> Pages:
        inner = (p.num_kv_heads, rows) if head_major else (rows, p.num_kv_heads)
        data = draw(count, *inner, width)
        data = data.transpose(1, 2) if head_major else data
        if p.cache_dtype == "problem":
            return Pages(data)
        return Pages(data.to(FP8), torch.ones(count, p.num_kv_heads, device=device))

    cells = p.page_size // p.nsa.compress_stride
    k, v = pool(p.page_size, p.d_qk), pool(p.page_size, p.d_v)
    weights = {"phi_k": phi_weights(p, p.d_qk, draw), "phi_v": phi_weights(p, p.d_v, draw)} if phi == "mlp" else {}
    return Filled(
        pools=CachePools(pool(cells, p.d_qk), pool(cells, p.d_v), k, v, k, v, k, v),
        table=order.view(p.batch, each).to(device),
        lengths=torch.full((p.batch,), p.seq_k, dtype=torch.int32, device=device),
        counters=decode_counters(p.batch, p.seq_q, p.num_kv_heads, device),
        q=draw(p.batch, p.seq_q, p.num_q_heads, p.d_qk),
        gates=draw(p.batch, p.seq_q, p.num_q_heads, 3).sigmoid_(),
        k=draw(p.batch, p.seq_q, p.num_kv_heads, p.d_qk),
        v=draw(p.batch, p.seq_q, p.num_kv_heads, p.d_v),
        phi=weights,
    )


def phi_weights(problem: Problem, width: int, draw: Callable[..., Tensor]) -> FoldedPhi:
    """Random weights that keep the variance."""
    size, hidden = problem.nsa.compress_block_size, problem.phi_hidden
    w1, w2 = draw(size * width, hidden).mul_((size * width) ** -0.5), draw(hidden, width).mul_(hidden**-0.5)
    return fold(PhiWeights(draw(size, width).mul_(0.02), w1, draw(hidden), w2, draw(width)))


def our_entries(problem: Problem, bench: Bench, phi: str, head_major: bool = False) -> list[Entry]:
    """The step, its two parts, and the kernels of attention by themselves, each with a dispatcher of its own."""
    filled = cache(partial(fill, problem, bench.device, phi, head_major))  # shared by the entries, freed with them
    written = append_bytes(problem)
    calls: dict[str, tuple[Callable[[Dispatcher], Fn], float]] = {
        STEP: (lambda d: partial(filled().step, problem, d), moved_bytes(problem)),
        APPEND: (lambda d: partial(filled().append, problem, d), written),
        ATTENTION: (lambda d: partial(filled().attend, problem, d), moved_bytes(problem)),
        COMPRESSED: (lambda d: kernel_call(COMPRESSED, problem, filled(), d), moved_bytes(problem, (COMPRESSED,))),
        GATHERED: (lambda d: kernel_call(GATHERED, problem, filled(), d), moved_bytes(problem, (GATHERED,))),
    }
    entries = []
    for work, (make, moved) in calls.items():
        dispatcher = bench.make_dispatcher(None)
        dispatcher.policy = POLICY
        cost = Cost(0.0 if work == APPEND else operations(problem, work), moved)
        kind = "kernel" if work in (COMPRESSED, GATHERED) else "ours"
        entries.append(Entry(work, kind, problem, None, cost, cache(partial(make, dispatcher)), dispatcher))
    return entries


def operations(problem: Problem, work: str) -> float:
    """Products of the queries with the keys that a kernel, or all of attention, reads."""
    kinds = (work,) if work in (COMPRESSED, GATHERED) else (COMPRESSED, GATHERED)
    pairs = sum(keys_read(problem.replace(seq_q=1))[kind] for kind in kinds)
    return 2.0 * problem.batch * problem.seq_q * problem.num_q_heads * pairs * (problem.d_qk + problem.d_v)


def kernel_call(family: str, problem: Problem, filled: Filled, dispatcher: Dispatcher) -> Fn:
    """One launch through the dispatcher, its outputs made before."""
    p, spec = problem, get_spec(family)
    out = torch.empty(*filled.q.shape[:3], p.d_v, dtype=filled.q.dtype, device=filled.q.device)
    blocks = torch.empty(p.batch, p.seq_q, p.num_kv_heads, p.nsa.num_selected, dtype=torch.int32, device=out.device)
    tensors: dict[str, Any] = {"q": filled.q, "table": filled.table, "lengths": filled.lengths}
    tensors |= {"counters": filled.counters, "scale": p.d_qk**-0.5, "seq_k": p.seq_k, "blocks": blocks}
    compressed = {**pages("k", filled.pools.k_cmp), **pages("v", filled.pools.v_cmp), "o": out}
    if family == COMPRESSED:
        tensors |= compressed
    else:
        own = {**tensors, **compressed}  # the blocks and o_cmp that a step would have made
        dispatcher.launch(get_spec(COMPRESSED), (COMPRESSED, p), lambda: p, out.device, own)
        dispatcher.stats.clear()  # the line tells of its own kernel
        for name in ("k_slc", "v_slc", "k_win", "v_win"):
            tensors |= pages(name, getattr(filled.pools, name))
        tensors |= {"o_cmp": out, "gates": filled.gates, "out": torch.empty_like(out)}
    return partial(dispatcher.launch, spec, (family, p), lambda: p, out.device, tensors)


def dense_entries(problem: Problem, bench: Bench) -> list[Entry]:
    """Both libraries, in every way to pass groups that they may take; repeated keys only if they take no other."""
    tensors = cache(partial(dense_tensors, problem, bench.device))  # by form; freed with the entries
    pairs = float(problem.batch * problem.seq_q * problem.num_q_heads * problem.seq_k)
    cost = Cost(2.0 * pairs * (problem.d_qk + problem.d_v), moved_bytes(problem, dense=True))
    entries = []
    for provider in (CUDNN, FLASH):
        taken = False
        for form in (ROWS, GROUPED, EXPANDED):
            if form == EXPANDED and taken:
                continue
            call: Fn = partial(dense_call, provider, form, tensors)
            reason = why_not(call)
            taken = taken or reason is None
            prepare = partial(prepared, call, reason)
            entries.append(Entry(f"{provider}, {form}", "dense", problem, None, cost, prepare))
    return entries


def prepared(call: Fn, reason: str | None) -> Fn:
    """The call, or InvalidProblem with the library's reason."""
    if reason is not None:
        raise InvalidProblem(reason)
    return call


def dense_tensors(problem: Problem, device: torch.device, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, HQ, Q, D_QK]`, or as rows `[B, H, G * Q, D_QK]`; k `[B, H or HQ, T, D_QK]`, v `[B, H or HQ, T, D_V]`."""
    p, generator = problem, torch.Generator(device).manual_seed(1)
    how: dict[str, Any] = {"dtype": getattr(torch, p.dtype), "device": device, "generator": generator}
    heads = p.num_q_heads if form == EXPANDED else p.num_kv_heads  # random, so drawn as many as repeated
    rows = (p.num_kv_heads, p.group_size * p.seq_q) if form == ROWS else (p.num_q_heads, p.seq_q)
    k, v = (torch.randn(p.batch, heads, p.seq_k, width, **how) for width in (p.d_qk, p.d_v))
    return torch.randn(p.batch, *rows, p.d_qk, **how), k, v


def dense_call(provider: str, form: str, tensors: Callable[[str], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Attention of the new tokens to all keys, without a mask: the last of them sees all of them anyway."""
    q, k, v = tensors(form)
    with sdpa_kernel(getattr(SDPBackend, SDPA_BACKENDS[provider])):
        return scaled_dot_product_attention(q, k, v, enable_gqa=form == GROUPED and q.shape[1] > k.shape[1])
