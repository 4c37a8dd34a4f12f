"""A decode step on the device against the equations in float32; see `bench.compare` for the tolerance.

The selection is judged by the importance that it loses. Everything after it is compared with the blocks that the
float32 equations select, for two blocks of almost equal importance may change places between two ways of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu.cache_fakes import fill_with_nan
from gpu.decode_cases import (
    AHEAD,
    APPEND_CASES,
    FINISH,
    REPEATED,
    STEP_CASES,
    AppendCase,
    Finishing,
    StepCase,
    StepTensors,
    step_tensors,
)
from gpu.judging import close
from torch import Tensor

from nsa_autotune import paged
from nsa_autotune.bench.compare import compare_blocks
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.nn.cache import KVCache
from nsa_autotune.nn.phi import Phi
from nsa_autotune.ops import append, decode, serve
from nsa_autotune.paged import FP8, Pages, positions_of, read_compressed, read_tokens
from nsa_autotune.spec import Problem

DEVICE = "cuda"
PATCH = pytest.MonkeyPatch


def attend(made: StepTensors, problem: Problem, dispatcher: Dispatcher, counters: Tensor) -> Tensor:
    """The operator."""
    how: dict[str, Any] = {"counters": counters, "dispatcher": dispatcher, "config": problem.nsa}
    return decode.decode_attention(made.q, made.gates, made.pools, made.table, made.lengths, **how)


def counters_of(problem: Problem) -> Tensor:
    """Zeros for a step of the problem."""
    return decode.decode_counters(problem.batch, problem.seq_q, problem.num_kv_heads, DEVICE)


class Equations:
    """Both kernels' outputs in the dtype of q: o_cmp, importance, and the gated sum over given blocks."""

    def __init__(self, made: StepTensors, problem: Problem, dtype: torch.dtype) -> None:
        self.made, self.config, self.dtype = made, problem.nsa, dtype
        pools, where = made.pools, (made.table, made.lengths)
        q = made.q.to(dtype)
        self.o_cmp, self.scores = paged.compressed_decode(q, pools.k_cmp, pools.v_cmp, *where, problem.nsa)

    def out(self, blocks: Tensor) -> Tensor:
        """The gated sum."""
        made, pools = self.made, self.made.pools
        q, gates = made.q.to(self.dtype), made.gates.to(self.dtype)
        pages = (pools.k_slc, pools.v_slc, pools.k_win, pools.v_win)
        where = (made.table, made.lengths, self.config)
        return paged.selected_window_decode(q, *pages, blocks, self.o_cmp, gates, *where)


@pytest.mark.parametrize("case", STEP_CASES, ids=[f"{i:02}-{case.name}" for i, case in enumerate(STEP_CASES)])
@torch.no_grad()
def test_a_step_is_as_right_as_the_equations_in_its_dtype(case: StepCase, compiled: Any, monkeypatch: PATCH) -> None:
    dispatcher = Finishing(case.finish)
    check_step(case, dispatcher, monkeypatch)
    assert sum(dispatcher.stats.values()) == 2


def check_step(case: StepCase, dispatcher: Dispatcher, patch: PATCH) -> None:
    """Compressed attention, the selection and the gated sum of a step of ragged sequences."""
    problem, made = case.problem, step_tensors(case, DEVICE)
    wide, base = Equations(made, problem, torch.float32), Equations(made, problem, made.q.dtype)
    exact = paged.compressed_decode(
        *(made.q.double(), made.pools.k_cmp, made.pools.v_cmp, made.table, made.lengths, problem.nsa)
    )[1]
    given = paged.select_decode(exact, made.lengths, problem.nsa)
    found: list[Tensor] = []
    real = decode._compressed

    def compressed(step: Any) -> tuple[Tensor, Tensor]:
        found.extend(real(step))
        return found[0], given

    patch.setattr(decode, "_compressed", compressed)
    counters = counters_of(problem)
    out = attend(made, problem, dispatcher, counters)
    o_cmp, blocks = found
    close("o_cmp", o_cmp, wide.o_cmp, base.o_cmp)
    rows = [x.flatten(0, 1) for x in (blocks, exact, base.scores)]  # sequences have positions of their own
    positions = positions_of(made.lengths, problem.seq_q).flatten()
    report = compare_blocks(*rows, positions, problem.nsa, problem.dtype)
    assert report.ok, report.reason
    close("out", out, wide.out(given), base.out(given))
    absent = positions.view(problem.batch, -1) < 0
    assert not out[absent].any() and absent.any()
    assert not counters.any(), "ready for the next step"


@torch.no_grad()
def test_twenty_steps_give_the_same_bits(dispatcher: Dispatcher) -> None:
    made, counters = step_tensors(REPEATED, DEVICE), counters_of(REPEATED.problem)
    first = attend(made, REPEATED.problem, dispatcher, counters)
    assert first.isfinite().all() and first.any()
    for _ in range(19):
        assert torch.equal(attend(made, REPEATED.problem, dispatcher, counters), first)
        assert not counters.any()


@pytest.mark.parametrize("finish", FINISH)
@torch.no_grad()
def test_kernels_that_start_early_see_what_those_before_wrote(finish: str) -> None:
    """A chain of steps, each asking with the outputs of the last and appending them, launched singly and in a graph."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    expected = run_chain(Finishing(finish))
    graph, out = torch.cuda.CUDAGraph(), run_chain(Finishing(finish, early=True))
    assert expected.isfinite().all() and expected.any() and torch.equal(out, expected)
    early, tensors = Finishing(finish, early=True), step_tensors(REPEATED, DEVICE)
    counters = counters_of(REPEATED.problem)
    chain(early, tensors, counters)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = chain(early, tensors, counters)
    for _ in range(10):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


def run_chain(dispatcher: Dispatcher) -> Tensor:
    """`chain` on fresh tensors."""
    return chain(dispatcher, step_tensors(REPEATED, DEVICE), counters_of(REPEATED.problem))


def chain(dispatcher: Dispatcher, made: StepTensors, counters: Tensor) -> Tensor:
    """The outputs of the last of 24 steps; the same tokens are written each time."""
    problem, out = REPEATED.problem, made.q
    for _ in range(24):
        news = out[:, :, : problem.num_kv_heads]
        where = (news, news, made.pools, made.table, made.lengths)
        append.append(*where, k_win=news, v_win=news, config=problem.nsa, dispatcher=dispatcher)
        out = attend(replace(made, q=out), problem, dispatcher, counters)
    return out


# appending


@pytest.mark.parametrize("case", APPEND_CASES, ids=[case.name for case in APPEND_CASES])
@torch.no_grad()
def test_appended_pages_are_those_of_the_equations(case: AppendCase, dispatcher: Dispatcher) -> None:
    check_append(case, dispatcher)


def check_append(case: AppendCase, dispatcher: Dispatcher) -> None:
    """Step by step, by kernels and by the equations; tokens grow, so that scales of fp8 pages must."""
    problem, dtype = case.problem, getattr(torch, case.problem.dtype)
    widths, num_new, fp8 = (problem.d_qk, problem.d_v), problem.seq_q, problem.cache_dtype != "problem"
    ours, theirs = (empty_cache(problem, FP8 if fp8 else dtype) for _ in "ab")
    phi: dict[str, Any] = {}
    if case.compression == "mlp":
        made = [Phi(problem.nsa.compress_block_size, w, problem.phi_hidden).to(DEVICE) for w in widths]
        phi = {name: each.weights(dtype) for name, each in zip(("phi_k", "phi_v"), made, strict=True)}

    def draw(tokens: int, size: float) -> list[Tensor]:
        heads = problem.num_kv_heads
        return [torch.randn(2, tokens, heads, w, device=DEVICE).mul_(size).to(dtype) for w in widths]

    before = draw(AHEAD, 1.0)
    for cache in (ours, theirs):
        write(cache, before, (0, AHEAD), phi, dispatcher, kernels=False)
    lengths = (0, AHEAD)
    for step in range(0, case.tokens, num_new):
        news, lengths = draw(num_new, 2.0 ** (step // 20 % 4)), (step + num_new, step + num_new + AHEAD)
        write(ours, news, lengths, phi, dispatcher, kernels=True)
        write(theirs, news, lengths, phi, dispatcher, kernels=False)
    for index, length in enumerate(lengths):
        for name in ("k_raw", "v_raw", "k_cmp", "v_cmp"):
            a, b = (rows_of(getattr(cache.pools, name), cache, index, length, name) for cache in (ours, theirs))
            assert a.isfinite().all() and a.shape == b.shape and a.any()
            if name.endswith("raw") and not fp8:
                assert torch.equal(a, b), name
                continue
            tolerance = 0.13 if fp8 else 0.02  # a step of e4m3 is an eighth
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) / 8)


def empty_cache(problem: Problem, dtype: torch.dtype) -> KVCache:
    """Two sequences, every page of NaN."""
    sizes = {"num_kv_heads": problem.num_kv_heads, "d_qk": problem.d_qk, "d_v": problem.d_v, "config": problem.nsa}
    how: dict[str, Any] = {"page_size": problem.page_size, "dtype": dtype, "device": DEVICE}
    cache = KVCache.contiguous(max_batch=problem.batch, max_tokens=problem.seq_k, **sizes, **how)
    fill_with_nan(cache.pools)
    return cache


def write(
    cache: KVCache,
    news: list[Tensor],
    lengths: Sequence[int],
    phi: dict[str, Any],
    dispatcher: Dispatcher,
    *,
    kernels: bool,
) -> None:
    """One step, by kernels or by the equations."""
    counted = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    with PATCH.context() as patch:
        if not kernels:
            patch.setattr(serve, "on_kernels", lambda x: False)
        how: dict[str, Any] = {"config": cache.config, "dispatcher": dispatcher, **phi}
        append.append(*news, cache.pools, cache.block_table, counted, **how)


def rows_of(pages: Pages, cache: KVCache, index: int, length: int, name: str) -> Tensor:
    """What a sequence holds, in float32."""
    where = (pages, cache.block_table[index], length)
    if name.endswith("cmp"):
        return read_compressed(*where, cache.config, torch.float32)
    return read_tokens(*where, torch.float32)
