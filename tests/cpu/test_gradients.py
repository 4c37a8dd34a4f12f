"""The gradients' formulas against autograd of the reference, the layout's backward indices, and the gate for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from cpu.bench_fakes import SMALL, make_spec
from torch import Tensor

from nsa_autotune import gradients, reference
from nsa_autotune.bench.accuracy import check_rows, check_variant, prepare_rows
from nsa_autotune.bench.inputs import make_inputs, make_layout
from nsa_autotune.codegen.compile import meta_arguments
from nsa_autotune.codegen.shapes import INDEX_FILLS
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import _common as common
from nsa_autotune.layout import PackedLayout, packed_layout
from nsa_autotune.search.presets import takes_one_tensor, tuning_problems
from nsa_autotune.spec import Argument, KernelSpec, Problem

CPU = torch.device("cpu")
CONFIG = NSAConfig(8, 4, 16, num_selected=3, num_initial=1, num_local=1, window_size=10)
L_IS_D = NSAConfig(8, 8, 16, num_selected=3, num_initial=0, num_local=1, window_size=1)
BATCHED = [(33, 33), (7, 50), (1, 1), (5, 6), (1, 64)]  # (queries, keys)
PACKINGS = {
    "mixed": [(0, 0), (20, 20), (1, 1), (4, 30), (0, 9), (3, 7), (0, 0)],
    "one": [(40, 40)],
    "tiny": [(1, 1), (2, 2), (0, 0), (1, 17)],
}
BRANCHES = ("cmp", "slc", "win")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def packed(lengths: list[tuple[int, int]], config: NSAConfig) -> PackedLayout:
    """Layout of sequences given as (queries, keys)."""
    cu_q, cu_k = (torch.tensor([0, *accumulate(column)], dtype=torch.int32) for column in zip(*lengths, strict=True))
    return packed_layout(cu_q, cu_k, int(cu_q[-1]), int(cu_k[-1]), config)


def forward(branch: str, q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, **how: Any) -> tuple[Tensor, Tensor]:
    """One branch of the reference; `how` holds seq_k, blocks, layout and positions."""
    seq_k, blocks = how.pop("seq_k"), how.pop("blocks")
    if branch == "cmp":
        return reference.compressed_attention(q, k, v, config, seq_k=seq_k, **how)
    if branch == "slc":
        return reference.selected_attention(q, k, v, blocks, config, **how)
    return reference.window_attention(q, k, v, config, **how)


def check_branch(branch: str, lead: tuple[int, ...], rows: int, keys: int, config: NSAConfig, **how: Any) -> None:
    """The formulas equal autograd of gate * o, with lse and delta taken from the forward."""
    q, k, v = normal(*lead, rows, 4, 6), normal(*lead, keys, 2, 6), normal(*lead, keys, 2, 5)
    gate, do = torch.rand(*lead, rows, 4, dtype=torch.float64), normal(*lead, rows, 4, 5)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, lse = forward(branch, q, k, v, config, **how)
    wanted = torch.autograd.grad((gate[..., None] * o * do).sum(), inputs)
    delta = gate * (do * o.detach()).sum(-1)
    found = gradients.attention_gradients(branch, q, k, v, do, lse.detach(), delta, gate, config, **how)
    for got, want, name in zip((found["dq"], found["dk"], found["dv"]), wanted, ("dq", "dk", "dv"), strict=True):
        assert got.dtype == torch.float64 and not got.requires_grad and got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def some_blocks(q_pos: Tensor, lead: tuple[int, ...], config: NSAConfig) -> Tensor:
    """Own block, one block of the past, the first block twice or not at all: int32, -1 last."""
    own = q_pos.long().div(config.select_block_size, rounding_mode="floor").clamp(min=0)[:, None]
    past = (torch.rand(*lead, len(q_pos), 2) * own).long().expand(*lead, len(q_pos), 2)
    slots = torch.stack([own.expand_as(past), past, torch.full_like(past, -1)], dim=-1)
    return slots.masked_fill((slots == own[..., None]) & (torch.arange(3) == 1), -1).int()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("config", [CONFIG, L_IS_D], ids=["overlap", "l_is_d"])
@pytest.mark.parametrize("lengths", BATCHED, ids=str)
@pytest.mark.parametrize("branch", BRANCHES)
def test_attention_gradients_are_those_of_autograd(
    branch: str, lengths: tuple[int, int], config: NSAConfig, scale: float | None
) -> None:
    rows, seq_k = lengths
    keys = config.num_compressed(seq_k) if branch == "cmp" else seq_k
    positions = torch.arange(seq_k - rows, seq_k)
    blocks = some_blocks(positions, (2,), config) if branch == "slc" else None
    check_branch(branch, (2,), rows, keys, config, seq_k=seq_k, blocks=blocks, scale=scale)


@pytest.mark.parametrize("branch", BRANCHES)
def test_attention_gradients_of_some_query_rows(branch: str) -> None:
    positions = torch.tensor([-3, 0, 6, 7, 31, 49])  # the first sees nothing
    keys = CONFIG.num_compressed(50) if branch == "cmp" else 50
    blocks = some_blocks(positions, (2,), CONFIG) if branch == "slc" else None
    check_branch(branch, (2,), 6, keys, CONFIG, seq_k=50, blocks=blocks, positions=positions)


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_packed_attention_gradients_are_those_of_autograd(branch: str, lengths: list[tuple[int, int]]) -> None:
    layout = packed(lengths, CONFIG)
    keys = layout.num_cmp_rows if branch == "cmp" else layout.total_k
    blocks = some_blocks(layout.q_pos, (), CONFIG) if branch == "slc" else None
    check_branch(branch, (), len(layout.q_pos), keys, CONFIG, seq_k=None, blocks=blocks, layout=layout)


def test_gradients_in_small_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.dense.CHUNK_BYTES", 4096)
    positions = torch.arange(90)
    for branch in BRANCHES:
        keys = CONFIG.num_compressed(90) if branch == "cmp" else 90
        check_branch(branch, (1,), 90, keys, CONFIG, seq_k=90, blocks=some_blocks(positions, (1,), CONFIG))


def test_a_dead_row_gives_nothing_even_where_keys_are_visible() -> None:
    q, k, v, do = normal(1, 3, 2, 6), normal(1, 3, 1, 6), normal(1, 3, 1, 5), normal(1, 3, 2, 5)
    lse, delta, gate = torch.zeros(1, 3, 2), normal(1, 3, 2), torch.ones(1, 3, 2)
    lse[:, 1] = -math.inf
    found = gradients.attention_gradients("win", q, k, v, do, lse, delta, gate, CONFIG)
    assert (found["dq"][:, 1] == 0).all() and all(x.isfinite().all() for x in found.values())


def test_what_is_missing_is_told() -> None:
    q, k, lse = normal(1, 3, 2, 6), normal(1, 3, 1, 6), normal(1, 3, 2)
    for branch, words in (("cmp", "seq_k"), ("slc", "blocks"), ("sel", "cmp, slc, win")):
        with pytest.raises(InvalidInput, match=words):
            gradients.attention_gradients(branch, q, k, k, q, lse, lse, lse, CONFIG)


@pytest.mark.parametrize("lead", [(2, 9), (17,)], ids=["batched", "packed"])
def test_gate_gradients_are_those_of_autograd(lead: tuple[int, ...]) -> None:
    gates, do = torch.rand(*lead, 4, 3, dtype=torch.float64), normal(*lead, 4, 5)
    branches = [normal(*lead, 4, 5) for _ in range(3)]
    found = gradients.gate_gradients(do, gates, *branches)
    (want,) = torch.autograd.grad((reference.combine(gates.requires_grad_(), *branches) * do).sum(), [gates])
    torch.testing.assert_close(found["dgates"], want)
    for index, (name, o) in enumerate(zip(BRANCHES, branches, strict=True)):
        torch.testing.assert_close(found[f"delta_{name}"], gates[..., index].detach() * (do * o).sum(-1))


def compressible(lengths: list[tuple[int, int]] | None, config: NSAConfig) -> tuple[Tensor, PackedLayout | None]:
    """Tokens to compress, batched of 50 tokens or packed."""
    layout = None if lengths is None else packed(lengths, config)
    return normal(*((2, 50) if layout is None else (layout.total_k,)), 2, 6).requires_grad_(), layout


@pytest.mark.parametrize("config", [CONFIG, L_IS_D], ids=["overlap", "l_is_d"])
@pytest.mark.parametrize("lengths", [None, *PACKINGS.values()], ids=["batched", *PACKINGS])
def test_compression_gradients_are_those_of_autograd(lengths: Any, config: NSAConfig) -> None:
    x, layout = compressible(lengths, config)
    shapes = {"w1": (config.compress_block_size * 6, 7), "b1": (7,), "w2": (7, 6), "b2": (6,)}
    weights = {name: normal(*shape).requires_grad_() for name, shape in shapes.items()}
    phi = reference.PhiWeights(torch.zeros(config.compress_block_size, 6, dtype=torch.float64), **weights)
    pooled = reference.compress_mean(x, config, layout=layout)
    dout = normal(*pooled.shape)  # unused rows have a gradient too, and must give nothing
    seq_k = x.shape[0] if layout is not None else x.shape[1]
    (want,) = torch.autograd.grad((pooled * dout).sum(), [x])
    torch.testing.assert_close(gradients.pool_gradient(dout, seq_k, config, layout), want)
    out = reference.compress_mlp(x, phi, config, layout=layout)
    wanted = torch.autograd.grad((out * dout).sum(), [x, *weights.values()])
    found = gradients.mlp_gradients(x, weights["w1"], weights["b1"], weights["w2"], dout, config, layout)
    for name, value in zip(("dx", "dw1", "db1", "dw2", "db2"), wanted, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_keep_the_dtype_and_stay_close(dtype: torch.dtype) -> None:
    q, k, v, do = normal(1, 30, 4, 16), normal(1, 30, 2, 16), normal(1, 30, 2, 8), normal(1, 30, 4, 8)
    gate = torch.rand(1, 30, 4)
    o, lse = reference.window_attention(q, k, v, CONFIG)
    delta = (gate * (do * o).sum(-1)).float()
    wide = gradients.attention_gradients("win", q, k, v, do, lse, delta, gate, CONFIG)
    small = [x.to(dtype) for x in (q, k, v, do)]
    found = gradients.attention_gradients("win", *small, lse.float(), delta, gate.to(dtype), CONFIG)  # type: ignore[arg-type]
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), wide[name], rtol=0.05, atol=0.05)


# the layout's indices for the backward


def seen_by(visible: Tensor) -> list[set[int]]:
    """Rows `[TQ]` that see each key, from a mask `[TQ, keys]`."""
    return [set(column.nonzero()[:, 0].tolist()) for column in visible.T]


@pytest.mark.parametrize("config", [CONFIG, L_IS_D, NSAConfig(4, 2, 4, 5, window_size=9)], ids=["a", "b", "c"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_layout_ranges_are_what_brute_force_finds(lengths: list[tuple[int, int]], config: NSAConfig) -> None:
    layout = packed(lengths, config)
    rows = sum(q for q, _ in lengths)
    window = torch.zeros(rows, layout.total_k, dtype=torch.bool)
    compressed = torch.zeros(rows, layout.num_cmp_rows, dtype=torch.bool)
    k_pos, k_cmp, blocks = [], [], {}
    row = key = 0
    for s, (len_q, len_k) in enumerate(lengths):
        slot = int(layout.cmp_offsets[s])
        for r in range(len_q):
            t = r + len_k - len_q
            window[row + r, [key + p for p in range(len_k) if t - config.window_size < p <= t]] = True
            ends = [
                i * config.compress_stride + config.compress_block_size for i in range(config.num_compressed(len_k))
            ]
            compressed[row + r, [slot + i for i, end in enumerate(ends) if end <= t + 1]] = True
        for j in range(config.num_select_blocks(len_k)):
            first = j * config.select_block_size
            number = slot // (config.select_block_size // config.compress_stride) + j
            blocks[number] = (key + first, key + min(first + config.select_block_size, len_k))
        k_pos, k_cmp = [*k_pos, *range(len_k)], [*k_cmp, *[slot] * len_k]
        row, key = row + len_q, key + len_k
    for begin, end, visible in (
        (layout.win_begin, layout.win_end, window),
        (layout.cmp_begin, layout.cmp_end, compressed),
    ):
        assert [set(range(a, b)) for a, b in zip(begin.tolist(), end.tolist(), strict=True)] == seen_by(visible)
        assert (begin.diff() >= 0).all() and (end.diff() >= 0).all() and (begin >= 0).all() and (end <= rows).all()
    assert layout.k_pos.tolist() == k_pos and layout.k_cmp.tolist() == k_cmp
    found = dict(enumerate(zip(layout.slc_first.tolist(), layout.slc_end.tolist(), strict=True)))
    assert len(found) == layout.num_cmp_rows // (config.select_block_size // config.compress_stride)
    assert {number: place for number, place in found.items() if place != (-1, -1)} == blocks
    unused = layout.cmp_source < 0
    assert torch.equal(layout.cmp_begin[unused], layout.cmp_end[unused])


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_every_index_tensor_has_the_length_that_shapes_tell(layout: str) -> None:
    assert set(INDEX_FILLS) == set(common.PACKED_ARGUMENTS)
    spec = make_spec("fake", lambda *_: {}, *common.PACKED_ARGUMENTS.values())
    problem = SMALL.replace(batch=5, layout=layout)
    meta, made = meta_arguments(spec, problem), make_inputs(spec, problem, CPU).tensors
    for name in INDEX_FILLS:
        if layout == "batched":
            assert meta[name] is None and made[name] is None
            continue
        tensor = getattr(make_layout(problem, CPU, 0), name)
        assert tensor.dtype == torch.int32 and meta[name].shape == tensor.shape and torch.equal(made[name], tensor)


def test_a_forward_pays_nothing_for_the_backward() -> None:
    assert not set(vars(packed([(3, 3)], CONFIG))) & (
        set(INDEX_FILLS) - {"q_pos", "k_start", "cmp_start", "cmp_source"}
    )


# the gate of backward families


def _keys_of(branch: str) -> tuple[str, str]:
    return ("C", "cmp_start") if branch == "cmp" else ("K", "k_start")


def attention_spec(branch: str, outputs: tuple[str, ...]) -> KernelSpec:
    """A fake backward family of a branch."""
    side, start = _keys_of(branch)
    shapes = {"dq": ("Q", "HQ", "D_QK"), "dk": (side, "H", "D_QK"), "dv": (side, "H", "D_V")}

    def run(problem: Problem, x: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
        names = ("q", "k", "v", "do", "lse", "delta", "gate")
        found = gradients.attention_gradients(
            branch,
            *(x[name] for name in names),
            problem.nsa,
            seq_k=problem.seq_k,
            blocks=x.get("blocks"),
            positions=positions,
            layout=layout,
        )
        return {name: found[name] for name in outputs}

    return make_spec(
        f"fake_{branch}_{'_'.join(outputs)}",
        run,
        Argument("q", ("Q", "HQ", "D_QK")),
        Argument("k", (side, "H", "D_QK")),
        Argument("v", (side, "H", "D_V")),
        *([Argument("blocks", ("Q", "H", "N"), "int32", fill="blocks")] if branch == "slc" else []),
        Argument("do", ("Q", "HQ", "D_V")),
        Argument("lse", ("Q", "HQ"), "float32", fill=f"lse_{branch}"),
        Argument("delta", ("Q", "HQ"), "float32", fill="delta"),
        Argument("gate", ("Q", "HQ"), fill="gates"),
        *(Argument(name, shapes[name], fill="out") for name in outputs),  # type: ignore[arg-type]
        common.PACKED_ARGUMENTS["q_pos"],
        common.PACKED_ARGUMENTS[start],
    )


def _pool(problem: Problem, x: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
    return {"dx": gradients.pool_gradient(x["dout"], problem.seq_k, problem.nsa, layout)}


def _mlp(problem: Problem, x: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
    return gradients.mlp_gradients(x["x"], x["w1"], x["b1"], x["w2"], x["dout"], problem.nsa, layout)


POOL = make_spec(
    "fake_pool_bwd",
    _pool,
    Argument("dout", ("C", "H", "D_QK")),
    Argument("dx", ("K", "H", "D_QK"), fill="out"),
    *(common.PACKED_ARGUMENTS[name] for name in ("k_pos", "k_cmp", "cmp_source")),
)
MLP = make_spec(
    "fake_mlp_bwd",
    _mlp,
    Argument("x", ("K", "H", "D_QK")),
    Argument("w1", ("L_DQK", "HIDDEN"), fill="weight"),
    Argument("b1", ("HIDDEN",), "float32", fill="bias"),
    Argument("w2", ("HIDDEN", "D_QK"), fill="weight"),
    Argument("dout", ("C", "H", "D_QK")),
    Argument("dx", ("K", "H", "D_QK"), fill="out"),
    Argument("dw1", ("L_DQK", "HIDDEN"), fill="out"),
    Argument("db1", ("HIDDEN",), "float32", fill="out"),
    Argument("dw2", ("HIDDEN", "D_QK"), fill="out"),
    Argument("db2", ("D_QK",), "float32", fill="out"),
    *(common.PACKED_ARGUMENTS[name] for name in ("cmp_source", "k_pos", "k_cmp")),
)
SPECS = [
    *(attention_spec(branch, outputs) for branch in BRANCHES for outputs in (("dq",), ("dk", "dv"))),
    *(attention_spec("win", ("dq", "dk", "dv")), POOL, MLP),
]
SUMMING = [spec for spec in SPECS if not spec.family.endswith("_dq")]
LONG = SMALL.replace(batch=5, seq_q=300, seq_k=300, dtype="float32", phi_hidden=16)
LONG_PACKED = LONG.replace(layout="packed", batch=6, seq_q=700, seq_k=900)
KINDS = {"batched": LONG, "packed": LONG_PACKED, "short_q": LONG.replace(seq_q=23), "one": LONG.replace(batch=1)}


def fake_kernel(spec: KernelSpec, problem: Problem) -> Callable[..., None]:
    """The family's reference in float32."""
    layout = make_layout(problem, CPU, 0) if problem.layout == "packed" else None

    def launch(**given: Any) -> None:
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}  # without scale and seq_k
        wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        for name, value in spec.reference(problem, wide, layout, None).items():
            tensors[name].copy_(value)

    return launch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
def test_a_right_backward_passes_whole_and_in_sampled_rows(spec: KernelSpec, kind: str) -> None:
    small = KINDS[kind].replace(seq_q=min(63, KINDS[kind].seq_q), seq_k=63, dtype="bfloat16")
    report = check_variant(spec, small, fake_kernel(spec, small), CPU)
    assert report.ok, report.reason
    report = check_rows(spec, KINDS[kind], fake_kernel(spec, KINDS[kind]), CPU)
    assert report.ok, report.reason


@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (1, 150)], ids=["first", "last", "middle"])
@pytest.mark.parametrize("spec", SUMMING, ids=lambda spec: spec.family)
def test_an_error_in_any_chosen_or_silent_sequence_is_caught(spec: KernelSpec, place: tuple[int, int]) -> None:
    right = fake_kernel(spec, LONG)
    output = "dk" if "dk" in spec.family else "dx"

    def wrong(**tensors: Any) -> None:
        right(**tensors)
        batch, row = place
        tensors[output][batch, min(row, tensors[output].shape[1] - 1)] += 1e-3

    report = check_rows(spec, LONG, wrong, CPU)
    tested = output == "dk" or place != (1, 150)  # windows are sampled at both ends of some sequences
    assert report.ok != tested


def test_weights_and_lost_rows_are_caught() -> None:
    def wrong(**tensors: Any) -> None:
        fake_kernel(MLP, LONG)(**tensors)
        tensors["dw1"][3, 2] *= 1.5

    assert "dw1" in check_rows(MLP, LONG, wrong, CPU).reason

    spec = attention_spec("cmp", ("dk", "dv"))

    def forgets_the_last_query(**tensors: Any) -> None:
        tensors["do"], tensors["delta"] = tensors["do"].clone(), tensors["delta"].clone()
        tensors["do"][:, -1], tensors["delta"][:, -1] = 0, 0
        fake_kernel(spec, LONG)(**tensors)

    assert not check_rows(spec, LONG, forgets_the_last_query, CPU).ok


def test_the_clock_gets_the_inputs_as_they_are() -> None:
    spec = attention_spec("win", ("dk", "dv"))
    inputs = make_inputs(spec, LONG, CPU)
    case = prepare_rows(spec, LONG, inputs)
    do, sparse = case.inputs.tensors["do"], case.checked.tensors["do"]
    assert do is inputs.tensors["do"] and case.checked.tensors["dk"] is inputs.tensors["dk"]
    assert do is not None and sparse is not None and (do != 0).any(-1).all()
    kept = (sparse != 0).any(-1).any(-1)
    assert kept[0, 0] and kept[-1, -1] and not kept[3].any() and torch.equal(sparse[kept], do[kept])
    dq = attention_spec("win", ("dq",))
    assert not prepare_rows(dq, LONG, make_inputs(dq, LONG, CPU)).replaced


@pytest.mark.parametrize("fill", ["lse_cmp", "lse_slc", "lse_win"])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_filled_lse_is_about_that_of_the_branch(fill: str, layout: str) -> None:
    problem = Problem(batch=3, seq_q=900, seq_k=900, num_q_heads=4, num_kv_heads=2, d_qk=64, d_v=16, layout=layout)
    problem = problem.replace(dtype="float32", nsa=NSAConfig(num_selected=4, window_size=100))
    branch = fill.removeprefix("lse_")
    inputs = make_inputs(attention_spec(branch, ("dq",)), problem, CPU)
    x = inputs.tensors
    how = {"seq_k": 900, "blocks": x.get("blocks"), "layout": inputs.layout}
    _, lse = forward(branch, x["q"], x["k"], x["v"], problem.nsa, **how)  # type: ignore[arg-type]
    assert torch.equal(x["lse"] == -math.inf, lse == -math.inf)  # type: ignore[arg-type, operator]
    seen = lse > 3.0
    assert (x["lse"] - lse)[seen].abs().mean() < 0.4  # type: ignore[operator]
    assert x["delta"].std().item() == pytest.approx(0.1, rel=0.1)  # type: ignore[union-attr]
    gate = x["gate"]
    assert gate is not None and gate.dim() == x["lse"].dim() and gate.min() > 0 and gate.max() < 1  # type: ignore[union-attr]


def test_vectors_of_a_backward_are_tuned_like_those_of_its_forward() -> None:
    fields = ("batch", "seq_k", "num_kv_heads", "d_qk", "dtype", "layout", "phi_hidden")
    problem = Problem(d_qk=192, d_v=128)
    for spec in (POOL, MLP):
        object.__setattr__(spec, "problem_fields", fields)
        assert takes_one_tensor(spec)
        assert [(p.d_qk, p.d_v) for p in tuning_problems(spec, problem)] == [(192, 192), (128, 128)]
