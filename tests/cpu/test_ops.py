"""The operators on the CPU: the reference itself, checked inputs, and the backward that CUDA tensors get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from equations import Equations, reference_attention, take_the_kernels_way
from torch import Tensor

from nsa_autotune import ops, reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import InvalidInput, InvalidProblem, KernelError, NotTuned
from nsa_autotune.kernels import get_spec
from nsa_autotune.layout import PackedLayout, packed_layout
from nsa_autotune.ops import checks, launches, serve
from nsa_autotune.ops.phi import fold
from nsa_autotune.reference import PhiWeights
from nsa_autotune.spec import KernelSpec

CONFIG = NSAConfig(8, 4, 16, num_selected=4, window_size=20)
HQ, H, D_QK, D_V = 4, 2, 16, 8
FORMS = ["batched", "short_q", "packed", "packed_short_q"]
Tensors = dict[str, Tensor]


def offsets(*lengths: int) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_tensors(form: str = "batched", dtype: torch.dtype = torch.float32) -> tuple[Tensors, dict[str, Tensor]]:
    """Arguments of nsa_attention by name: tensors, and the offsets of packed forms."""
    lead_q, lead_k, cu = (2, 70), (2, 70), {}
    if form == "short_q":
        lead_q = (2, 9)
    if form.startswith("packed"):
        lead_q = lead_k = (91,)
        cu = {"cu_seqlens": offsets(0, 70, 1, 20)}
    if form == "packed_short_q":
        lead_q, cu = (14,), {"cu_seqlens": offsets(0, 9, 0, 5), "cu_seqlens_k": offsets(0, 70, 1, 20)}
    shapes = {"q": (*lead_q, HQ, D_QK), "gates": (*lead_q, HQ, 3)}
    for branch in ("", "_slc", "_win"):
        shapes |= {f"k{branch}": (*lead_k, H, D_QK), f"v{branch}": (*lead_k, H, D_V)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["gates"] = tensors["gates"].sigmoid()
    return tensors, cu


def make_phi(width: int, dtype: torch.dtype = torch.float32, hidden: int = 12) -> PhiWeights:
    """Random weights of phi."""
    fan_in = CONFIG.compress_block_size * width
    shapes = [(CONFIG.compress_block_size, width), (fan_in, hidden), (hidden,), (hidden, width), (width,)]
    return PhiWeights(*(torch.randn(shape, dtype=dtype) / shape[0] ** 0.5 for shape in shapes))


def layout_of(tensors: Tensors, cu: dict[str, Tensor]) -> PackedLayout | None:
    """The layout of packed tensors, None for batched ones."""
    if not cu:
        return None
    q, k = cu["cu_seqlens"], cu.get("cu_seqlens_k", cu["cu_seqlens"])
    return packed_layout(q, k, tensors["q"].shape[0], tensors["k"].shape[0], CONFIG)


def packed() -> tuple[Tensors, PackedLayout]:
    """Packed tensors and their layout."""
    tensors, cu = make_tensors("packed")
    layout = layout_of(tensors, cu)
    assert layout is not None
    return tensors, layout


# CPU tensors get the reference


@pytest.mark.parametrize("form", FORMS)
def test_every_operator_equals_the_reference(form: str) -> None:
    tensors, cu = make_tensors(form)
    layout = layout_of(tensors, cu)
    q, k, v, gates = (tensors[name] for name in ("q", "k", "v", "gates"))
    given: dict[str, Any] = {"layout": layout}
    lengths: dict[str, Any] = {"seq_k": k.shape[-3], "layout": layout}
    phi = make_phi(D_QK)
    k_cmp, v_cmp = ops.compress(k, CONFIG, **given), ops.compress(v, CONFIG, **given)
    assert torch.equal(k_cmp, reference.compress_mean(k, CONFIG, **given))
    assert torch.equal(ops.compress(k, CONFIG, phi, **given), reference.compress_mlp(k, phi, CONFIG, **given))
    o_cmp, lse = ops.compressed_attention(q, k_cmp, v_cmp, CONFIG, **lengths)
    for got, want in zip((o_cmp, lse), reference.compressed_attention(q, k_cmp, v_cmp, CONFIG, **lengths), strict=True):
        assert torch.equal(got, want)
    blocks = ops.select_blocks(q, k_cmp, lse, CONFIG, **lengths)
    assert torch.equal(blocks, reference.select_blocks(q, k_cmp, lse, CONFIG, **lengths))
    assert (blocks >= 0).any(-1).all()
    slc = ops.selected_attention(q, k, v, blocks, CONFIG, **given)
    win = ops.window_attention(q, k, v, CONFIG, **given)
    assert torch.equal(slc[0], reference.selected_attention(q, k, v, blocks, CONFIG, **given)[0])
    assert torch.equal(win[1], reference.window_attention(q, k, v, CONFIG, **given)[1])
    out = ops.combine(gates, o_cmp, slc[0], win[0])
    assert torch.equal(out, reference.combine(gates, o_cmp, slc[0], win[0]))
    assert torch.equal(ops.nsa_attention(q, k, v, gates, config=CONFIG, **cu), out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("learned", [False, True], ids=["mean", "phi"])
def test_branches_with_keys_of_their_own_equal_the_reference(form: str, learned: bool) -> None:
    tensors, cu = make_tensors(form)
    layout = layout_of(tensors, cu)
    phi = {"phi_k": make_phi(D_QK), "phi_v": make_phi(D_V)} if learned else {}
    out = ops.nsa_attention(**tensors, config=CONFIG, scale=0.3, **phi, **cu)

    def compress(x: Tensor, weights: PhiWeights | None) -> Tensor:
        if weights is None:
            return reference.compress_mean(x, CONFIG, layout=layout)
        return reference.compress_mlp(x, weights, CONFIG, layout=layout)

    k_cmp, v_cmp = compress(tensors["k"], phi.get("phi_k")), compress(tensors["v"], phi.get("phi_v"))
    own = [tensors[name] for name in ("k_slc", "v_slc", "k_win", "v_win")]
    want = reference.nsa_attention(tensors["q"], k_cmp, v_cmp, *own, tensors["gates"], CONFIG, scale=0.3, layout=layout)
    assert torch.equal(out, want)
    assert not torch.equal(out, ops.nsa_attention(**tensors, config=CONFIG, **phi, **cu))  # the scale matters


@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 17])
def test_short_sequences_have_an_output(tokens: int) -> None:
    """Fewer tokens than one compressed block: its branch is 0, the others see everything."""
    q, k, v = torch.randn(1, tokens, HQ, D_QK), torch.randn(1, tokens, H, D_QK), torch.randn(1, tokens, H, D_V)
    gates = torch.ones(1, tokens, HQ, 3)
    out = ops.nsa_attention(q, k, v, gates, config=CONFIG)
    assert out.isfinite().all()
    if tokens < CONFIG.compress_block_size:
        torch.testing.assert_close(out, 2 * ops.window_attention(q, k, v, CONFIG)[0])


def test_no_tokens_at_all_give_no_output() -> None:
    q, k, v = torch.randn(0, HQ, D_QK), torch.randn(0, H, D_QK), torch.randn(0, H, D_V)
    out = ops.nsa_attention(q, k, v, torch.ones(0, HQ, 3), config=CONFIG, cu_seqlens=offsets(0, 0))
    assert out.shape == (0, HQ, D_V)


def test_gradients_on_the_cpu_are_those_of_the_reference() -> None:
    tensors, _ = make_tensors(dtype=torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    ops.nsa_attention(**leaves, config=CONFIG).square().sum().backward()
    got = {name: t.grad for name, t in leaves.items()}
    again = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    reference_attention(**again, config=CONFIG).square().sum().backward()
    for name, t in again.items():
        assert t.grad is not None and got[name] is not None
        torch.testing.assert_close(got[name], t.grad, rtol=1e-12, atol=1e-14, msg=name)
        assert t.grad.abs().max() > 0


def test_the_database_stays_closed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("nsa_autotune.db.store.TuningStore.__init__", fail)
    serve.default_dispatcher.cache_clear()
    tensors, _ = make_tensors()
    ops.nsa_attention(tensors["q"], tensors["k"], tensors["v"], tensors["gates"], config=CONFIG)


# checks


def call(name: str, **changes: Any) -> Any:
    """One operator with batched tensors, some replaced."""
    tensors, _ = make_tensors()
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    k_cmp, v_cmp = reference.compress_mean(k, CONFIG), reference.compress_mean(v, CONFIG)
    lse = torch.zeros(q.shape[:-1])
    blocks = torch.zeros(2, 70, H, 4, dtype=torch.int32)
    o = torch.randn(2, 70, HQ, D_V)
    arguments: dict[str, dict[str, Any]] = {
        "compressed_attention": {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp},
        "select_blocks": {"q": q, "k_cmp": k_cmp, "lse": lse},
        "selected_attention": {"q": q, "k": k, "v": v, "blocks": blocks},
        "window_attention": {"q": q, "k": k, "v": v},
        "nsa_attention": {"q": q, "k": k, "v": v, "gates": tensors["gates"]},
        "compress": {"x": k},
        "combine": {"gates": tensors["gates"], "o_cmp": o, "o_slc": o, "o_win": o},
    }
    settings = {} if name == "combine" else {"config": CONFIG}
    return getattr(ops, name)(**{**settings, **arguments[name], **changes})


META = {"device": "meta"}


def own(branch: str, **changed: Tensor) -> dict[str, Tensor]:
    """A branch's own keys and values, one of them changed."""
    fitting = {"k": torch.randn(2, 70, H, D_QK), "v": torch.randn(2, 70, H, D_V)}
    return {f"{letter}_{branch}": x for letter, x in {**fitting, **changed}.items()}


BAD: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("window_attention", lambda: {"q": torch.randn(70, HQ, D_QK)}, "q must be [B, TQ, HQ, D_QK]"),
    ("window_attention", lambda: {"q": torch.randn(2, 0, HQ, D_QK)}, "q must have at least one token"),
    ("window_attention", lambda: {"k": torch.randn(2, 70, H, D_QK).half()}, "k must have the dtype of q"),
    ("window_attention", lambda: {"v": torch.randn(2, 70, H, D_V, **META)}, "v must be on the device of q"),
    ("window_attention", lambda: {"k": torch.randn(3, 70, H, D_QK)}, "k must be laid out like q"),
    ("window_attention", lambda: {"k": torch.randn(70, H, D_QK)}, "k must be laid out like q"),
    ("window_attention", lambda: {"k": torch.randn(2, 70, 3, D_QK)}, "the heads of k must divide the query heads"),
    ("window_attention", lambda: {"k": torch.randn(2, 70, 0, D_QK)}, "the heads of k must divide the query heads"),
    ("window_attention", lambda: {"k": torch.randn(2, 70, H, D_V)}, "k must have the head dim of q"),
    ("window_attention", lambda: {"v": torch.randn(2, 69, H, D_V)}, "k and v of the window branch must have equal"),
    ("window_attention", lambda: {"v": torch.randn(2, 70, 4, D_V)}, "k and v of the window branch must have equal"),
    ("window_attention", lambda: {"q": torch.randn(2, 71, HQ, D_QK)}, "so TQ <= TK must hold"),
    ("selected_attention", lambda: {"blocks": torch.zeros(2, 70, H, 5, dtype=torch.int32)}, "blocks must be int32"),
    ("selected_attention", lambda: {"blocks": torch.zeros(2, 70, H, 4)}, "blocks must be int32 (2, 70, 2, 4) on cpu"),
    ("selected_attention", lambda: {"blocks": torch.zeros(2, 70, H, 4).int().to("meta")}, "device='meta'"),
    ("select_blocks", lambda: {"lse": torch.zeros(2, 70, HQ).half()}, "lse must be float32 (2, 70, 4) on cpu"),
    ("select_blocks", lambda: {"lse": torch.zeros(2, 70, HQ).double()}, "lse must be float32 (2, 70, 4) on cpu"),
    ("select_blocks", lambda: {"lse": torch.zeros(2, 70, H)}, "Take it from compressed_attention()"),
    ("select_blocks", lambda: {"seq_k": 90}, "k_cmp must hold floor((TK - l) / d) + 1 blocks"),
    ("compressed_attention", lambda: {"seq_k": 69}, "so TQ <= TK must hold"),
    ("compressed_attention", lambda: {"k_cmp": torch.randn(2, 15, H, D_QK)}, "expected=16"),
    ("compressed_attention", lambda: {"v_cmp": torch.randn(2, 15, H, D_V)}, "k and v of the compressed branch"),
    ("compressed_attention", lambda: {"v_cmp": torch.randn(2, 16, 1, D_V)}, "k and v of the compressed branch"),
    ("compress", lambda: {"x": torch.randn(70, H, D_QK)}, "keys to compress must be [B, T, H, D]"),
    ("compress", lambda: {"phi": make_phi(D_V)}, "phi.position must be (8, 16)"),
    ("compress", lambda: {"phi": make_phi(D_QK, torch.float16)}, "phi.position must have the dtype of q"),
    ("combine", lambda: {"gates": torch.ones(2, 70, HQ)}, "gates must be [.., TQ, HQ, 3] beside q"),
    ("combine", lambda: {"gates": torch.ones(2, 70, HQ, 3, **META)}, "gates must be [.., TQ, HQ, 3] beside q"),
    ("combine", lambda: {"o_win": torch.randn(2, 70, HQ, D_QK)}, "o_win must have the shape of o_cmp"),
    ("combine", lambda: {"o_slc": torch.randn(2, 70, HQ, D_V).half()}, "o_slc must have the dtype of q"),
    ("nsa_attention", lambda: {"gates": torch.ones(2, 70, HQ, 2)}, "Apply the sigmoid first"),
    ("nsa_attention", lambda: {"k_slc": torch.randn(2, 70, H, D_QK)}, "k_slc and v_slc come together"),
    ("nsa_attention", lambda: {"v_win": torch.randn(2, 70, H, D_V)}, "k_win and v_win come together"),
    (
        "nsa_attention",
        lambda: {"k_win": torch.randn(2, 71, H, D_QK), "v_win": torch.randn(2, 71, H, D_V)},
        "k_win must have the shape of k",
    ),
    ("nsa_attention", lambda: own("slc", v=torch.randn(2, 50, H, D_V)), "v_slc must have the shape of v"),
    ("nsa_attention", lambda: own("win", v=torch.randn(2, 70, H, D_V + 16)), "v_win must have the shape of v"),
    ("nsa_attention", lambda: own("slc", k=torch.randn(2, 70, H, D_V)), "k_slc must have the shape of k"),
    ("nsa_attention", lambda: own("slc", k=torch.randn(2, 70, H, D_QK).double()), "k_slc must have the dtype of q"),
    ("nsa_attention", lambda: {"k_slc": [1], "v_slc": [1]}, "k_slc must be a torch.Tensor"),
    ("nsa_attention", lambda: {"q": torch.randn(2, 71, HQ, D_QK), "gates": torch.rand(2, 71, HQ, 3)}, "so TQ <= TK"),
    ("nsa_attention", lambda: {"cu_seqlens": [0, 70]}, "Pass cu_seqlens only with packed tensors"),
    ("nsa_attention", lambda: {"q": torch.randn(2, 70, HQ, 0)}, "q must have heads and a head dim"),
    ("nsa_attention", lambda: {"phi_k": 1}, "phi must be PhiWeights"),
    ("nsa_attention", lambda: {"dispatcher": 3}, "dispatcher must be a Dispatcher"),
    ("nsa_attention", lambda: {"cu_seqlens_k": offsets(70)}, "cu_seqlens_k needs cu_seqlens"),
    ("nsa_attention", lambda: {"cu_seqlens": offsets(2)}, "Pass cu_seqlens only with packed tensors"),
    ("nsa_attention", lambda: {"k": torch.randn(2, 70, H, D_V)}, "k must have the head dim of q"),
    ("nsa_attention", lambda: {"scale": -0.1}, "scale must be positive and finite"),
    ("nsa_attention", lambda: {"scale": float("nan")}, "scale must be positive and finite"),
]


@pytest.mark.parametrize(("name", "changes", "words"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_tensors_that_do_not_fit_are_refused_with_a_sentence(
    name: str, changes: Callable[[], dict[str, Any]], words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        call(name, **changes())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        (offsets(50, 41).long(), "cu_seqlens must be int32 [S + 1] with S >= 1"),
        (torch.zeros(1, dtype=torch.int32), "cu_seqlens must be int32 [S + 1] with S >= 1"),
        (offsets(50, 41)[None], "cu_seqlens must be int32 [S + 1] with S >= 1"),
        (offsets(50, 41).to("meta"), "cu_seqlens must be on the device of the tokens"),
        (offsets(50, 40), "cu_seqlens must rise from 0 to the number of tokens"),
        (offsets(50, 41) + 1, "cu_seqlens must rise from 0 to the number of tokens"),
        (offsets(92, -1), "cu_seqlens must rise from 0 to the number of tokens"),
        ([0, 91], "cu_seqlens must be a torch.Tensor"),
    ],
    ids=["int64", "empty", "two_dims", "device", "short", "late", "falling", "list"],
)
def test_offsets_that_do_not_fit_are_refused_with_a_sentence(cu_seqlens: Tensor, words: str) -> None:
    tensors, _ = make_tensors("packed")
    given = {name: tensors[name] for name in ("q", "k", "v", "gates")}
    with pytest.raises(InvalidInput) as caught:
        ops.nsa_attention(**given, config=CONFIG, cu_seqlens=cu_seqlens)
    assert words in str(caught.value)


def test_queries_and_keys_must_come_from_the_same_sequences() -> None:
    tensors, _ = make_tensors("packed")
    given = {name: tensors[name] for name in ("q", "k", "v", "gates")}
    with pytest.raises(InvalidInput, match="packed from the same sequences"):
        ops.nsa_attention(**given, config=CONFIG, cu_seqlens=offsets(91), cu_seqlens_k=offsets(50, 41))
    with pytest.raises(InvalidInput, match="no more queries than keys"):
        ops.nsa_attention(**given, config=CONFIG, cu_seqlens=offsets(50, 41), cu_seqlens_k=offsets(41, 50))


def test_packed_compressed_rows_must_be_those_of_the_layout() -> None:
    tensors, layout = packed()
    k_cmp = ops.compress(tensors["k"], CONFIG, layout=layout)
    v_cmp = ops.compress(tensors["v"], CONFIG, layout=layout)
    assert k_cmp.shape[0] == layout.num_cmp_rows
    with pytest.raises(InvalidInput, match=f"expected={layout.num_cmp_rows}"):
        ops.compressed_attention(tensors["q"], k_cmp[1:], v_cmp[1:], CONFIG, layout=layout)


def test_kernels_refuse_float64_queries_on_cuda() -> None:
    class CudaQuery(Tensor):
        is_cuda = True

    q = torch.zeros(1, 2, 3, 4, dtype=torch.float64).as_subclass(CudaQuery)
    with pytest.raises(InvalidInput, match="kernels serve bfloat16, float16 or float32"):
        checks.check_query(q, None)


# what kernels can read


def views() -> dict[str, tuple[Tensor, bool]]:
    """Tensors [.., T, H, D] and whether kernels read them in place."""
    base = torch.randn(2, 6, H, D_QK).half()
    fused = torch.randn(2, 6, 3 * H, D_QK).half()
    bytes_off = torch.randn(2 * 6 * H * D_QK + 1).half()[1:].view(2, 6, H, D_QK)
    narrow = torch.randn(2, 6, 1, 4).half()
    return {
        "contiguous": (base, True),
        "packed": (base[0], True),
        "slice_of_fused": (fused[:, :, H : 2 * H], True),
        "every_other_token": (base[:, ::2], True),
        "one_batch_of_many": (base[1:], True),
        "one_head_of_many": (fused[:, :, 2:3], True),
        "heads_first": (base.transpose(1, 2).contiguous().transpose(1, 2), False),
        "dims_first": (base.transpose(2, 3).contiguous().transpose(2, 3), False),
        "every_other_head": (fused[:, :, ::2], False),
        "misaligned_base": (bytes_off, False),
        "misaligned_rows": (narrow, False),
        "expanded_batch": (base[:1].expand(2, -1, -1, -1), False),
        "expanded_tokens": (base[:, :1].expand(-1, 6, -1, -1), False),
        "tokens_first": (base.transpose(0, 1).contiguous().transpose(0, 1), False),
        "one_token_heads_first": (torch.randn(2, H, 1, D_QK).half().transpose(1, 2), False),
    }


@pytest.mark.parametrize("name", list(views()))
def test_a_tensor_is_copied_just_if_kernels_cannot_read_it(name: str) -> None:
    x, in_place = views()[name]
    before = x.clone()
    result = checks.readable(x)
    assert torch.equal(result, before)
    assert (result is x) == in_place
    if not in_place:
        assert result.is_contiguous() and result.data_ptr() % checks.ALIGNMENT_BYTES == 0
        assert result.stride() == torch.empty(x.shape).stride()  # of size-1 dimensions too


# from tensors to a launch: the kernels' arguments and problem, without a GPU


class Recorder(Dispatcher):
    """Fills no output; keeps what it was asked to launch."""

    def __init__(self) -> None:
        super().__init__(None, fingerprint=for_target("cuda:90"), locality=0.5)
        self.calls: list[tuple[KernelSpec, Any, Any, dict[str, Any]]] = []

    def launch(self, spec: KernelSpec, shape: Any, problem: Any, device: Any, tensors: dict[str, Any]) -> None:
        self.calls.append((spec, shape, problem(), tensors))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors take the way of CUDA tensors and end here."""
    take_the_kernels_way(monkeypatch)
    return Recorder()


@pytest.mark.parametrize("form", FORMS)
def test_each_launch_gets_the_arguments_and_the_problem_of_its_spec(form: str, recorder: Recorder) -> None:
    tensors, cu = make_tensors(form)
    phi = {"phi_k": make_phi(D_QK, hidden=16), "phi_v": make_phi(D_V, hidden=16)}
    ops.nsa_attention(**tensors, config=CONFIG, dispatcher=recorder, **phi, **cu)
    families = [spec.family for spec, *_ in recorder.calls]
    assert families == [
        *("cmp_mlp_fwd", "cmp_mlp_fwd", "cmp_attn_fwd", "slc_select_fwd", "slc_attn_fwd", "win_attn_fwd"),
        "gate_sum_fwd",
    ]
    for spec, _, problem, given in recorder.calls:
        names = {argument.name for argument in spec.arguments} | set(spec.scalars)
        assert names == set(given), spec.family
        index = [a.name for a in spec.arguments if a.fill in ("q_pos", "k_start", "cmp_start", "cmp_source")]
        assert all((given[name] is None) == (not cu) for name in index)
        assert problem.nsa == (NSAConfig() if spec.family == "gate_sum_fwd" else CONFIG)
        if "layout" in spec.problem_fields:
            assert problem.layout == ("packed" if cu else "batched")
            assert problem.batch == (4 if cu else 2)
            assert problem.seq_k == (91 if cu else 70)
        if spec.family == "slc_attn_fwd":
            assert (problem.locality, problem.d_qk, problem.d_v, problem.group_size) == (0.5, D_QK, D_V, HQ // H)
        if spec.family == "gate_sum_fwd":
            assert problem.batch * problem.seq_q == tensors["q"].shape[:-2].numel() or cu
    mlp = [problem for spec, _, problem, _ in recorder.calls if spec.family == "cmp_mlp_fwd"]
    assert [p.d_qk for p in mlp] == [D_QK, D_V] and {p.phi_hidden for p in mlp} == {16}


class Fusing(Recorder):
    """Takes one kernel for two wherever it is asked, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, list[Any]]] = []

    def fuses(self, shape: Any, asked: Any, device: Any) -> bool:
        self.asked.append((shape, asked()))
        return True


@pytest.mark.parametrize("form", FORMS)
def test_one_kernel_may_take_the_place_of_window_and_sum(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_kernels_way(monkeypatch)
    tensors, cu = make_tensors(form)
    fusing = Fusing()
    out = ops.nsa_attention(**tensors, config=CONFIG, dispatcher=fusing, **cu)
    *_, slc, (spec, shape, problem, given) = fusing.calls
    assert [s.family for s, *_ in fusing.calls[-3:]] == ["slc_select_fwd", "slc_attn_fwd", "win_sum_fwd"]
    assert {argument.name for argument in spec.arguments} | set(spec.scalars) == set(given)
    assert given["out"].data_ptr() == out.data_ptr() and given["k"].data_ptr() == tensors["k_win"].data_ptr()
    assert given["o_slc"].data_ptr() == slc[3]["o"].data_ptr()
    ((asked_shape, asked),) = fusing.asked
    assert asked_shape == (None, *shape[1:])
    assert [s.family for s, _ in asked] == ["win_sum_fwd", "win_attn_fwd", "gate_sum_fwd"]
    assert asked[0][1] == asked[1][1] == problem
    assert (asked[2][1].layout, asked[2][1].seq_q) == ("batched", problem.seq_q)
    assert asked[2][1].batch == (1 if cu else problem.batch)


def test_parts_run_where_the_fused_kernel_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Equations):
        def launch(self, spec: KernelSpec, *rest: Any) -> None:
            super().launch(spec, *rest)
            if spec.family == "win_sum_fwd":
                raise KernelError("out of shared memory")

    tensors, _ = make_tensors()
    wanted = reference_attention(**tensors, config=CONFIG)
    take_the_kernels_way(monkeypatch)
    broken = Broken()
    monkeypatch.setattr(broken, "_fuses", lambda *_: True)
    for _ in range(2):
        out = ops.nsa_attention(**tensors, config=CONFIG, dispatcher=broken)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert broken.families.count("win_sum_fwd") == 1 and broken.families.count("gate_sum_fwd") == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "shared memory" in caplog.text


def test_different_calls_have_different_shapes_and_equal_ones_equal_shapes(recorder: Recorder) -> None:
    def shapes(form: str, dtype: torch.dtype = torch.float32, config: NSAConfig = CONFIG) -> list[Any]:
        recorder.calls.clear()
        tensors, cu = make_tensors(form, dtype)
        ops.nsa_attention(**tensors, config=config, dispatcher=recorder, **cu)
        return [shape for _, shape, *_ in recorder.calls]

    base = shapes("batched")
    assert shapes("batched") == base and len(set(base)) == len(base)
    others = [
        shapes("short_q"),
        shapes("packed"),
        shapes("batched", torch.float16),
        shapes("batched", config=NSAConfig(8, 4, 16, num_selected=5, window_size=21)),
    ]
    attention = slice(2, 6)
    for other in others:
        assert not set(base[attention]) & set(other[attention])


def test_phi_sees_its_position_through_the_bias(recorder: Recorder) -> None:
    phi, x = make_phi(D_QK, hidden=16), torch.randn(1, 40, H, D_QK)
    ops.compress(x, CONFIG, phi, dispatcher=recorder)
    given = recorder.calls[0][3]
    windows = x.unfold(1, 8, 4).movedim(-1, -2).flatten(-2)
    hidden = torch.nn.functional.silu(windows @ given["w1"] + given["b1"])
    torch.testing.assert_close(hidden @ given["w2"] + given["b2"], reference.compress_mlp(x, phi, CONFIG))


def test_weights_of_phi_reach_the_kernel_contiguous(recorder: Recorder) -> None:
    """It takes no strides of them."""
    phi, x = make_phi(D_QK, hidden=16), torch.randn(1, 40, H, D_QK)
    odd = PhiWeights(*(getattr(phi, f.name).repeat_interleave(2, -1)[..., ::2] for f in fields(phi)))
    ops.compress(x, CONFIG, odd, dispatcher=recorder)
    given = recorder.calls[0][3]
    assert all(given[name].is_contiguous() for name in ("w1", "b1", "w2", "b2"))
    assert all(getattr(fold(odd), f.name).is_contiguous() for f in fields(fold(odd)))
    torch.testing.assert_close(given["b2"], phi.b2)


def test_too_short_sequences_launch_no_compressed_attention(recorder: Recorder) -> None:
    q, k, v = torch.randn(1, 5, HQ, D_QK), torch.randn(1, 5, H, D_QK), torch.randn(1, 5, H, D_V)
    ops.nsa_attention(q, k, v, torch.ones(1, 5, HQ, 3), config=CONFIG, dispatcher=recorder)
    assert [spec.family for spec, *_ in recorder.calls] == ["slc_attn_fwd", "win_attn_fwd", "gate_sum_fwd"]
    blocks = recorder.calls[0][3]["blocks"]
    assert torch.equal(blocks, reference.select_blocks(q, k[:, :0], torch.zeros(1, 5, HQ), CONFIG, seq_k=5))


def test_no_tokens_launch_nothing(recorder: Recorder) -> None:
    q, k, v = torch.randn(0, HQ, D_QK), torch.randn(0, H, D_QK), torch.randn(0, H, D_V)
    ops.nsa_attention(q, k, v, torch.ones(0, HQ, 3), config=CONFIG, cu_seqlens=offsets(0), dispatcher=recorder)
    assert recorder.calls == []


def test_fields_of_phi_are_passed_in_order() -> None:
    assert [field.name for field in fields(PhiWeights)] == ["position", "w1", "b1", "w2", "b2"]


def test_a_problem_without_a_kernel_is_refused_before_a_launch() -> None:
    x = torch.randn(1, 40, H, 24)
    problem = serve.describe(None, x, CONFIG, None, seq_k=40, d_v=24)
    with pytest.raises(InvalidProblem, match="multiple of 16"):
        get_spec("cmp_pool_fwd").default_config(problem)


def test_strict_reaches_the_dispatcher(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = make_tensors(dtype=torch.float16)
    given = {name: tensors[name] for name in ("q", "k", "v", "gates")}
    served = Dispatcher(None, fingerprint=for_target("cuda:90"))
    with pytest.raises(NotTuned, match="--families cmp_pool_fwd"):
        ops.nsa_attention(**given, config=CONFIG, dispatcher=served, strict=True)
    assert not served.strict and launches.rows(None, "q_pos") == {"q_pos": None}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "torch.Tensor"),
        ([1.0], "torch.Tensor"),
        (torch.zeros(1, 4, 2, 8, dtype=torch.int64), "floating-point"),
        (torch.zeros(1, 4, 2, 8, dtype=torch.complex64), "floating-point"),
        (torch.zeros(1, 4, 2, 8, device="meta"), "on the (CPU or a CUDA )?device|beside q"),
    ],
    ids=["none", "list", "int", "complex", "meta"],
)
@pytest.mark.parametrize("place", range(4))
def test_what_no_kernel_reads_is_refused(bad: object, words: str, place: int) -> None:
    good: list[Any] = [torch.zeros(1, 4, heads, 8) for heads in (2, 1, 1)] + [torch.zeros(1, 4, 2, 3)]
    good[place] = bad
    with pytest.raises(InvalidInput, match=words):
        ops.nsa_attention(*good, config=NSAConfig())
