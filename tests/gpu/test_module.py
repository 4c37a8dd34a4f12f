"""Whole forwards and gradients on the device, against the equations in float32.

Tolerance: our error against the float32 equations may be twice that of the same equations in bfloat16 or float16, plus
a floor of half a unit in the last place (`bench.compare`, the policy of tests, gate and search alike).

Selections: two blocks of almost equal importance may change places between two ways of rounding, and then attention is
compared with other keys. So the float32 run chooses the blocks, and the others take them over; what the kernels select
by themselves is judged by the importance they lose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import Equations
from gpu.cases import MODULE_PROBLEMS, SELECTING_PROBLEM, problem_name
from gpu.judging import SharedBlocks, close, equations
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.bench.compare import compare_blocks
from nsa_autotune.bench.inputs import packed_offsets
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.layout import packed_layout
from nsa_autotune.nn import NativeSparseAttention
from nsa_autotune.spec import Problem

DEVICE = "cuda"
PATCH = pytest.MonkeyPatch
Tensors = dict[str, Tensor]


def make_tensors(problem: Problem) -> tuple[Tensors, Tensors]:
    """Arguments of nsa_attention in float32, rounded to the problem's dtype; and the offsets of packed ones."""
    p, cu = problem, {}
    lead_q, lead_k = (p.batch, p.seq_q), (p.batch, p.seq_k)
    if p.layout == "packed":
        offsets_q, offsets_k = packed_offsets(p, seed=0)
        cu = {
            name: torch.tensor(o, dtype=torch.int32, device=DEVICE) for name, o in (("q", offsets_q), ("k", offsets_k))
        }
        cu = {"cu_seqlens": cu["q"], "cu_seqlens_k": cu["k"]}
        lead_q, lead_k = (p.seq_q,), (p.seq_k,)
    shapes = {"q": (*lead_q, p.num_q_heads, p.d_qk), "gates": (*lead_q, p.num_q_heads, 3)}
    for branch in ("", "_slc", "_win"):
        shapes |= {f"k{branch}": (*lead_k, p.num_kv_heads, p.d_qk), f"v{branch}": (*lead_k, p.num_kv_heads, p.d_v)}
    tensors = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    tensors["gates"] = tensors["gates"].sigmoid()
    return {name: t.to(getattr(torch, p.dtype)).float() for name, t in tensors.items()}, cu


def cast(tensors: Tensors, problem: Problem, grad: bool = False) -> Tensors:
    """Copies in the problem's dtype."""
    return {name: t.to(getattr(torch, problem.dtype)).requires_grad_(grad) for name, t in tensors.items()}


def three_ways(
    run: Callable[[torch.dtype], Any], problem: Problem, blocks: SharedBlocks | None = None
) -> tuple[Any, Any, Any]:
    """(ours, float32 equations, equations in the problem's dtype), all with the float32 run's selection."""
    blocks = blocks or SharedBlocks()
    with blocks.shared():
        with equations():
            wide = run(torch.float32)
            base = run(getattr(torch, problem.dtype))
        ours = run(getattr(torch, problem.dtype))
    assert blocks.reused == 2
    return ours, wide, base


@pytest.mark.parametrize("problem", MODULE_PROBLEMS, ids=problem_name)
@torch.no_grad()
def test_attention_is_as_right_as_the_equations_in_its_dtype(problem: Problem, dispatcher: Dispatcher) -> None:
    tensors, cu = make_tensors(problem)

    def run(dtype: torch.dtype) -> Tensor:
        given = {name: t.to(dtype) for name, t in tensors.items()}
        return ops.nsa_attention(**given, config=problem.nsa, dispatcher=dispatcher, **cu)

    close("o", *three_ways(run, problem))
    assert sum(dispatcher.stats.values()) > 0


MODULES = [p for p in MODULE_PROBLEMS if p.seq_q == p.seq_k]


@pytest.mark.parametrize("problem", MODULES, ids=problem_name)
@torch.no_grad()
def test_the_module_is_as_right_as_the_equations_in_its_dtype(problem: Problem, dispatcher: Dispatcher) -> None:
    hidden = 128
    module = NativeSparseAttention(
        hidden,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.d_qk,
        problem.d_v,
        config=problem.nsa,
        phi_hidden=problem.phi_hidden,
        compression="mean" if problem.group_size % 2 else "mlp",
        share_kv=problem.group_size == 8,
        dispatcher=dispatcher,
    ).to(DEVICE)
    dtype = getattr(torch, problem.dtype)
    for parameter in module.parameters():
        parameter.data = parameter.to(dtype).float()
    lead, cu = (problem.batch, problem.seq_q), None
    if problem.layout == "packed":
        lead, cu = (problem.seq_q,), torch.tensor(packed_offsets(problem, 0)[0], dtype=torch.int32, device=DEVICE)
    x = torch.randn(*lead, hidden, device=DEVICE).to(dtype).float()

    def run(dtype: torch.dtype) -> Tensor:
        return module.to(dtype)(x.to(dtype), cu)

    close("out", *three_ways(run, problem))


@pytest.mark.parametrize("problem", MODULE_PROBLEMS, ids=problem_name)
def test_one_kernel_for_window_and_sum_gives_what_two_give(
    problem: Problem, dispatcher: Dispatcher, monkeypatch: PATCH
) -> None:
    """The sum is of the same rounded outputs; only the order of a multiply-add may differ."""
    tensors, cu = make_tensors(problem)
    given, out = cast(tensors, problem), {}
    for fuses in (False, True):
        monkeypatch.setattr(Dispatcher, "fuses", lambda *_, fuses=fuses: fuses)
        out[fuses] = ops.nsa_attention(**given, config=problem.nsa, dispatcher=dispatcher, **cu)
    unit = torch.finfo(out[True].dtype).eps
    torch.testing.assert_close(out[True], out[False], rtol=unit, atol=unit)


GRADIENTS = [p for p in MODULE_PROBLEMS if p.seq_k in (63, 1000, 1500) and p.d_qk < 256]


def farther(wide: Tensor, *baselines: Tensor) -> Tensor:
    """Of each value the baseline that is farther from `wide`."""
    stack = torch.stack([x.float() for x in baselines])
    worst = (stack - wide).abs().argmax(0, keepdim=True)
    return stack.gather(0, worst)[0]


@pytest.mark.parametrize("problem", GRADIENTS, ids=problem_name)
def test_gradients_are_as_right_as_the_equations_in_its_dtype(problem: Problem, dispatcher: Dispatcher) -> None:
    """Baselines: autograd, and the kernels' own formulas, which take delta from outputs rounded to the dtype.

    Rows that see few keys have gradients that nearly cancel; there the rounding of the saved outputs shows.
    """
    tensors, cu = make_tensors(problem)
    weight = torch.randn(*tensors["q"].shape[:-1], problem.d_v, device=DEVICE)

    def run(dtype: torch.dtype, served: Dispatcher = dispatcher) -> Tensors:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        out = ops.nsa_attention(**leaves, config=problem.nsa, dispatcher=served, **cu)
        (out.float() * weight).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    blocks, formulas = SharedBlocks(), Equations()
    if cu:
        sizes = (tensors["q"].shape[0], tensors["k"].shape[0])
        formulas.layout = packed_layout(cu["cu_seqlens"], cu["cu_seqlens_k"], *sizes, problem.nsa)
    ours, wide, base = three_ways(run, problem, blocks)
    with blocks.shared():
        saved = run(getattr(torch, problem.dtype), formulas)
    assert set(ours) == set(tensors) and "gate_sum_bwd" in formulas.families
    for name in tensors:
        assert ours[name].dtype == getattr(torch, problem.dtype)
        baseline = farther(wide[name], base[name], saved[name])
        close(f"gradient of {name}", ours[name], wide[name], baseline, rows=name != "gates")


@pytest.mark.parametrize("problem", [GRADIENTS[-1], SELECTING_PROBLEM], ids=problem_name)
def test_two_backward_passes_give_the_same_bits(problem: Problem, dispatcher: Dispatcher) -> None:
    tensors, cu = make_tensors(problem)

    def run() -> Tensors:
        leaves = cast(tensors, problem, grad=True)
        ops.nsa_attention(**leaves, config=problem.nsa, dispatcher=dispatcher, **cu).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    first = run()
    for _ in range(3):
        again = run()
        assert all(torch.equal(first[name], again[name]) for name in first)


@torch.no_grad()
def test_what_the_kernels_select_loses_no_importance(dispatcher: Dispatcher) -> None:
    """From queries to blocks with kernels only: compression, log-sum-exp and selection together."""
    problem = SELECTING_PROBLEM
    tensors, _ = make_tensors(problem)
    config, given = problem.nsa, cast(tensors, problem)
    how: dict[str, Any] = {"seq_k": problem.seq_k}
    k_cmp, v_cmp = (ops.compress(given[name], config, dispatcher=dispatcher) for name in ("k", "v"))
    _, lse = ops.compressed_attention(given["q"], k_cmp, v_cmp, config, dispatcher=dispatcher, **how)
    blocks = ops.select_blocks(given["q"], k_cmp, lse, config, dispatcher=dispatcher, **how)
    exact = reference.importance(given["q"].double(), k_cmp.double(), lse.double(), config, **how)
    rounded = reference.importance(given["q"], k_cmp, lse, config, **how)
    positions = torch.arange(problem.seq_k, device=DEVICE)
    report = compare_blocks(blocks, exact, rounded, positions, config, problem.dtype)
    assert report.ok, report.reason
    assert (blocks[:, -1] >= 0).all() and config.num_select_blocks(problem.seq_k) > config.num_selected


@torch.no_grad()
def test_views_of_a_fused_projection_give_the_same_bits(dispatcher: Dispatcher) -> None:
    problem = SELECTING_PROBLEM
    p, dtype = problem, getattr(torch, problem.dtype)
    heads = [p.num_q_heads, p.num_kv_heads, p.num_kv_heads]
    fused = torch.randn(p.batch, p.seq_k, sum(heads), p.d_qk, dtype=dtype, device=DEVICE)
    q, k, v = fused.split(heads, dim=2)
    gates = torch.rand(p.batch, p.seq_k, p.num_q_heads, 3, dtype=dtype, device=DEVICE)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    how: dict[str, Any] = {"config": p.nsa, "dispatcher": dispatcher}
    out = ops.nsa_attention(q, k, v, gates, **how)
    assert not q.is_contiguous() and not heads_first.is_contiguous()
    assert torch.equal(out, ops.nsa_attention(q.contiguous(), k.contiguous(), v.contiguous(), gates, **how))
    assert torch.equal(out, ops.nsa_attention(q, heads_first, v, gates, **how))


@pytest.mark.parametrize("problem", [MODULE_PROBLEMS[6], MODULE_PROBLEMS[13], MODULE_PROBLEMS[1]], ids=problem_name)
@torch.no_grad()
def test_nothing_reads_memory_that_nobody_wrote(problem: Problem, dispatcher: Dispatcher, monkeypatch: PATCH) -> None:
    tensors, cu = make_tensors(problem)
    given = cast(tensors, problem)
    how: dict[str, Any] = {"config": problem.nsa, "dispatcher": dispatcher, **cu}
    clean = ops.nsa_attention(**given, **how)
    poisoned: list[int] = []

    def poison(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            made = maker(*args, **kwargs)
            poisoned.append(made.numel())
            return made.fill_(float("nan") if made.is_floating_point() else -7777)

        return make

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    out = ops.nsa_attention(**given, **how)
    monkeypatch.undo()
    assert len(poisoned) >= 5
    assert torch.equal(out, clean)


@pytest.mark.parametrize("problem", [MODULE_PROBLEMS[6], MODULE_PROBLEMS[13]], ids=problem_name)
@torch.no_grad()
def test_a_second_call_waits_for_nobody(problem: Problem, dispatcher: Dispatcher) -> None:
    tensors, cu = make_tensors(problem)
    given = cast(tensors, problem)
    ops.nsa_attention(**given, config=problem.nsa, dispatcher=dispatcher, **cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.nsa_attention(**given, config=problem.nsa, dispatcher=dispatcher, **cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("problem", [MODULE_PROBLEMS[6], MODULE_PROBLEMS[13]], ids=problem_name)
@torch.no_grad()
def test_a_captured_graph_replays_on_new_values(problem: Problem, dispatcher: Dispatcher) -> None:
    first, cu = make_tensors(problem)
    second, _ = make_tensors(problem)
    static, other = cast(first, problem), cast(second, problem)

    def run(given: Tensors) -> Tensor:
        return ops.nsa_attention(**given, config=problem.nsa, dispatcher=dispatcher, **cu)

    expected = [run(static), run(other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for values, want in zip((cast(first, problem), other), expected, strict=True):
        for name, tensor in static.items():
            tensor.copy_(values[name])
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    assert not torch.equal(*expected)


# more elements than an int32 can count


LONG = 270_336  # tokens: 64 heads of 128 make 2.2e9 elements
HEADS, KV_HEADS, DIM = 64, 4, 128
SAMPLED = 5


@pytest.fixture
def large(much_memory: None) -> Tensors:
    """q, k, v of 270k tokens."""
    shapes = {"q": (1, LONG, HEADS, DIM), "k": (1, LONG, KV_HEADS, DIM), "v": (1, LONG, KV_HEADS, DIM)}
    tensors = {name: torch.empty(s, dtype=torch.bfloat16, device=DEVICE).normal_() for name, s in shapes.items()}
    assert tensors["q"].numel() > 2**31
    return tensors


def ends(x: Tensor) -> Tensor:
    """The last rows, in float32."""
    return x[:, -SAMPLED:].float()


@pytest.mark.slow
@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens_first", "heads_first"])
@torch.no_grad()
def test_windows_reach_beyond_int32(large: Tensors, heads_first: bool, dispatcher: Dispatcher) -> None:
    config, (q, k, v) = NSAConfig(), (large[name] for name in ("q", "k", "v"))
    if heads_first:  # strides between heads times heads overflow too
        del large["q"]
        q = torch.empty(1, HEADS, LONG, DIM, dtype=q.dtype, device=DEVICE).copy_(q.transpose(1, 2)).transpose(1, 2)
    o, lse = ops.window_attention(q, k, v, config, dispatcher=dispatcher)
    keys = slice(-config.window_size - SAMPLED, None)
    near = [q[:, -SAMPLED:], k[:, keys], v[:, keys]]
    wide = reference.window_attention(*(x.float() for x in near), config)
    base = reference.window_attention(*near, config)
    close("o", o[:, -SAMPLED:], wide[0], base[0])
    close("lse", lse[:, -SAMPLED:], wide[1], base[1], rows=False)
    start = [q[:, :SAMPLED], k[:, :SAMPLED], v[:, :SAMPLED]]
    close(
        "first o",
        o[:, :SAMPLED],
        reference.window_attention(*(x.float() for x in start), config)[0],
        reference.window_attention(*start, config)[0],
    )


@pytest.mark.slow
@torch.no_grad()
def test_selections_reach_beyond_int32(large: Tensors, dispatcher: Dispatcher) -> None:
    """Every token selects its own block and those before it, so that its keys are near."""
    config, (q, k, v) = NSAConfig(), (large[name] for name in ("q", "k", "v"))
    size, n = config.select_block_size, config.num_selected
    own = torch.arange(LONG, device=DEVICE, dtype=torch.int32) // size
    index = own[:, None] - torch.arange(n, device=DEVICE, dtype=torch.int32)
    index = index.masked_fill(index < 0, 1 << 30).sort(dim=-1).values
    blocks = index.masked_fill(index == 1 << 30, -1)[None, :, None].expand(1, LONG, KV_HEADS, n).contiguous()
    o, _ = ops.selected_attention(q, k, v, blocks, config, dispatcher=dispatcher)
    near = [q[:, -SAMPLED:], k[:, -size * n :], v[:, -size * n :]]
    cut = blocks[:, -SAMPLED:] - (LONG // size - n)
    wide = reference.selected_attention(*(x.float() for x in near), cut, config)[0]
    close("o", o[:, -SAMPLED:], wide, reference.selected_attention(*near, cut, config)[0])


@pytest.mark.slow
@torch.no_grad()
def test_gated_sums_reach_beyond_int32(large: Tensors, dispatcher: Dispatcher) -> None:
    branches = [large.pop("q"), *(torch.empty(1, LONG, HEADS, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")]
    for branch in branches[1:]:
        branch.normal_()
    gates = torch.rand(1, LONG, HEADS, 3, dtype=torch.bfloat16, device=DEVICE)
    out = ops.combine(gates, *branches, dispatcher=dispatcher)
    narrow = [x[:, -SAMPLED:] for x in (gates, *branches)]
    close("out", out[:, -SAMPLED:], reference.combine(*(x.float() for x in narrow)), reference.combine(*narrow))
    assert not out.isnan().any()


def test_every_value_of_the_grid_is_met() -> None:
    """The module's problems cover the group sizes, head dims, lengths, dtypes and layouts that are promised."""
    found = [(p.group_size, (p.d_qk, p.d_v), p.seq_k, p.dtype, p.layout) for p in MODULE_PROBLEMS]
    groups, dims, lengths, dtypes, layouts = (set(column) for column in zip(*found, strict=True))
    assert groups == {1, 2, 4, 5, 8, 16}
    assert dims == {(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)}
    assert {1, 31, 63, 64, 1000, 8192} <= lengths
    assert set(itertools.product(dtypes, layouts)) == {
        (dtype, layout) for dtype in ("bfloat16", "float16") for layout in ("batched", "packed")
    }
