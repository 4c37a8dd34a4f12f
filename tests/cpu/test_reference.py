"""The reference against a token-by-token oracle, against dense SDPA, and its rules at the edges."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from cpu import brute_force
from torch import Tensor
from torch.nn import functional as F

from nsa_autotune import dense, nsa_attention, reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidInput
from nsa_autotune.layout import PackedLayout, packed_layout
from nsa_autotune.reference import PhiWeights

SMALL = NSAConfig(8, 4, 16, num_selected=4, num_initial=1, num_local=2, window_size=10)
FEW_OF_DEFAULT = NSAConfig(num_selected=3, num_local=1, window_size=50)
L_IS_D = NSAConfig(8, 8, 16, num_selected=3, num_initial=0, num_local=1, window_size=1)
ALL_EQUAL = NSAConfig(8, 8, 8, num_selected=5, num_initial=2, num_local=2, window_size=7)
LONG_L = NSAConfig(16, 4, 16, num_selected=3, num_initial=1, num_local=1, window_size=16)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def make(
    *lead: int, len_q: int, len_k: int, heads: int = 1, group: int = 2, d_qk: int = 6, d_v: int = 4
) -> dict[str, Tensor]:
    """q, gates, and keys and values of the three branches, uncompressed."""
    keys = {
        f"{x}_{b}": normal(*lead, len_k, heads, d_qk if x == "k" else d_v) for b in ("cmp", "slc", "win") for x in "kv"
    }
    hq = heads * group
    return {"q": normal(*lead, len_q, hq, d_qk), "gates": torch.rand(*lead, len_q, hq, 3, dtype=torch.float64), **keys}


def run(x: dict[str, Tensor], config: NSAConfig, layout: PackedLayout | None = None) -> dict[str, Tensor]:
    """All intermediate results of the reference with phi = mean."""
    k_cmp = reference.compress_mean(x["k_cmp"], config, layout=layout)
    v_cmp = reference.compress_mean(x["v_cmp"], config, layout=layout)
    seq_k = x["k_slc"].shape[1] if layout is None else None
    o_cmp, lse_cmp = reference.compressed_attention(x["q"], k_cmp, v_cmp, config, seq_k=seq_k, layout=layout)
    scores = reference.importance(x["q"], k_cmp, lse_cmp, config, seq_k=seq_k, layout=layout)
    blocks = reference.select_blocks(x["q"], k_cmp, lse_cmp, config, seq_k=seq_k, layout=layout)
    o_slc, lse_slc = reference.selected_attention(x["q"], x["k_slc"], x["v_slc"], blocks, config, layout=layout)
    o_win, lse_win = reference.window_attention(x["q"], x["k_win"], x["v_win"], config, layout=layout)
    tensors = {name: x[name] for name in ("q", "k_slc", "v_slc", "k_win", "v_win", "gates")}
    o = reference.nsa_attention(k_cmp=k_cmp, v_cmp=v_cmp, config=config, layout=layout, **tensors)
    names = ("o_cmp", "lse_cmp", "scores", "blocks", "o_slc", "lse_slc", "o_win", "lse_win", "o")
    return dict(
        zip(names, (o_cmp, lse_cmp, scores, blocks, o_slc, lse_slc, o_win, lse_win, o), strict=True),
        k_cmp=k_cmp,
        v_cmp=v_cmp,
    )


def oracle(x: dict[str, Tensor], config: NSAConfig) -> brute_force.Answer:
    """The brute force on one unbatched sequence."""
    compressed = {name: brute_force.compress(x[name].tolist(), config) for name in ("k_cmp", "v_cmp")}
    return brute_force.nsa(**{**x, **compressed}, config=config)


def packed(lengths: list[tuple[int, int]], config: NSAConfig) -> PackedLayout:
    """Layout of sequences given as (queries, keys)."""
    cu_q, cu_k = (torch.tensor([0, *accumulate(column)], dtype=torch.int32) for column in zip(*lengths, strict=True))
    return packed_layout(cu_q, cu_k, int(cu_q[-1]), int(cu_k[-1]), config)


def close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, msg=lambda text: f"{name}: {text}")


CASES = [
    *[pytest.param(SMALL, t, t, g, id=f"small-T{t}-G{g}") for t, g in [(1, 2), (7, 1), (8, 5), (31, 1), (33, 2)]],
    *[pytest.param(SMALL, t, t, g, id=f"small-T{t}-G{g}") for t, g in [(64, 5), (100, 2), (150, 1)]],
    *[pytest.param(SMALL, q, k, 2, id=f"small-TQ{q}-TK{k}") for q, k in [(1, 97), (13, 40), (30, 31)]],
    pytest.param(FEW_OF_DEFAULT, 12, 330, 2, id="32-16-64-TK330"),
    pytest.param(NSAConfig(), 70, 70, 1, id="default-T70"),
    pytest.param(L_IS_D, 60, 60, 2, id="l=d-no-initial-w1"),
    pytest.param(ALL_EQUAL, 75, 75, 2, id="l=d=l'"),
    pytest.param(LONG_L, 70, 70, 2, id="l=4d=l'"),
]


@pytest.mark.parametrize(("config", "len_q", "len_k", "group"), CASES)
def test_every_branch_matches_the_oracle(config: NSAConfig, len_q: int, len_k: int, group: int) -> None:
    x = make(2, len_q=len_q, len_k=len_k, heads=2, group=group)
    got = run(x, config)
    for b in range(2):
        want = oracle({name: tensor[b] for name, tensor in x.items()}, config)
        for name in brute_force.Answer.__dataclass_fields__:
            close(got[name][b], want.tensor(name), f"{name}[{b}]")


def make_phi(size: int, d: int, hidden: int = 5) -> PhiWeights:
    return PhiWeights(normal(size, d), normal(size * d, hidden) / 8, normal(hidden), normal(hidden, d), normal(d))


@pytest.mark.parametrize(("config", "tokens"), [(SMALL, 31), (SMALL, 7), (LONG_L, 45), (ALL_EQUAL, 16)])
def test_compression_matches_the_oracle(config: NSAConfig, tokens: int) -> None:
    x = normal(1, tokens, 2, 6)
    phi = make_phi(config.compress_block_size, 6)
    oracle_phi = brute_force.mlp(phi.position, phi.w1, phi.b1, phi.w2, phi.b2)
    shape = (1, config.num_compressed(tokens), 2, 6)
    for got, fn in [
        (reference.compress_mean(x, config), brute_force.mean),
        (reference.compress_mlp(x, phi, config), oracle_phi),
    ]:
        want = brute_force.compress(x[0].tolist(), config, fn)
        assert got.shape == shape
        close(got, torch.tensor(want, dtype=torch.float64).reshape(shape), "compressed")


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (NSAConfig(), (1, 2, 2, 2, 1)),
        (NSAConfig(16, 16, 64), (1, 1, 1, 1)),
        (NSAConfig(64, 64, 64), (1,)),
        (NSAConfig(64, 16, 64), (1, 2, 3, 4, 3, 2, 1)),
        (NSAConfig(32, 16, 32), (1, 2, 1)),
    ],
    ids=["32-16-64", "l=d", "l=d=l'", "64-16-64", "32-16-32"],
)
def test_importance_weights(config: NSAConfig, weights: tuple[int, ...]) -> None:
    assert reference.importance_weights(config) == weights


def test_importance_is_12221_on_blocks_4j_minus_1_to_4j_plus_3() -> None:
    """One-hot keys put a known mass on one compressed block at a time."""
    config, seq_k = NSAConfig(), 64 * 4
    num_cmp = config.num_compressed(seq_k)
    keys = torch.eye(num_cmp, dtype=torch.float64)[None, :, None]
    q = 1e3 * keys  # query i attends to compressed block i alone
    lse = torch.full((1, num_cmp, 1), 1e3, dtype=torch.float64)
    last = torch.full((num_cmp,), seq_k - 1)
    scores = reference.importance(q, keys, lse, config, seq_k=seq_k, scale=1.0, positions=last)[0, :, 0]
    want = torch.zeros(num_cmp, 4, dtype=torch.float64)
    for j in range(4):
        for offset, weight in zip(range(-1, 4), (1, 2, 2, 2, 1), strict=True):
            if 0 <= 4 * j + offset < num_cmp:
                want[4 * j + offset, j] = weight
    close(scores, want, "scores")


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention, bottom-right aligned, `[B, T, H, D]`."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("len_q", [64, 63, 1])
def test_equals_dense_attention_where_the_pattern_covers_everything(len_q: int) -> None:
    x = make(2, len_q=len_q, len_k=64, heads=2, group=3)
    config = NSAConfig(8, 4, 16, num_selected=4, window_size=64)
    got = run(x, config)
    close(got["o_slc"], sdpa(x["q"], x["k_slc"], x["v_slc"]), "o_slc")
    close(got["o_win"], sdpa(x["q"], x["k_win"], x["v_win"]), "o_win")


def test_the_window_is_exactly_w_tokens() -> None:
    """Queries of zero weigh all visible keys alike, so that one-hot values count them."""
    config = NSAConfig(window_size=5)
    q, values = torch.zeros(1, 12, 1, 3), torch.eye(12)[None, :, None]
    o, lse = reference.window_attention(q, torch.zeros(1, 12, 1, 3), values, config)
    for t in range(12):
        assert o[0, t, 0].nonzero().flatten().tolist() == list(range(max(0, t - 4), t + 1))
        assert lse[0, t, 0].item() == pytest.approx(math.log(min(t + 1, 5)))


LENGTHS = [(33, 33), (0, 0), (1, 1), (64, 64), (0, 0), (7, 50), (1, 16), (0, 9), (9, 9), (0, 0)]


@pytest.mark.parametrize("config", [SMALL, ALL_EQUAL], ids=["small", "l=d=l'"])
def test_packed_equals_separate_sequences(config: NSAConfig) -> None:
    layout = packed(LENGTHS, config)
    x = make(len_q=sum(q for q, _ in LENGTHS), len_k=sum(k for _, k in LENGTHS), heads=2)
    phi = make_phi(config.compress_block_size, 6)
    got, got_mlp = run(x, config, layout), reference.compress_mlp(x["k_cmp"], phi, config, layout=layout)
    assert got["scores"].shape[-1] == config.num_select_blocks(64)
    filled = torch.zeros(layout.num_cmp_rows, dtype=torch.bool)
    start_q = start_k = 0
    for (len_q, len_k), row in zip(LENGTHS, layout.cmp_offsets.tolist(), strict=False):
        rows_q, rows_k = slice(start_q, start_q + len_q), slice(start_k, start_k + len_k)
        rows_cmp = slice(row, row + config.num_compressed(len_k))
        start_q, start_k = rows_q.stop, rows_k.stop
        filled[rows_cmp] = True
        close(got_mlp[rows_cmp], reference.compress_mlp(x["k_cmp"][None, rows_k], phi, config)[0], "phi")
        if not len_q:
            continue
        one = {name: t[None, rows_q if name in ("q", "gates") else rows_k] for name, t in x.items()}
        want = run(one, config)
        for name in ("k_cmp", "v_cmp"):
            close(got[name][rows_cmp], want[name][0], name)
        for name in brute_force.Answer.__dataclass_fields__:
            part = got[name][rows_q]
            if name == "scores":
                assert part[..., want[name].shape[-1] :].eq(-math.inf).all()
                part = part[..., : want[name].shape[-1]]
            close(part, want[name][0], name)
    assert got["k_cmp"][~filled].eq(0).all() and got_mlp[~filled].eq(0).all()


def test_packed_without_any_token() -> None:
    x = make(len_q=0, len_k=0)
    got = run(x, SMALL, packed([(0, 0), (0, 0)], SMALL))
    assert got["o"].shape == (0, 2, 4) and got["blocks"].shape == (0, 1, 4) and got["lse_cmp"].shape == (0, 2)


@pytest.mark.parametrize(
    ("config", "scores", "position", "want"),
    [
        pytest.param(SMALL, [0.0, 0, 0, 0, 0, 0, 0, 0], 127, [0, 1, 6, 7], id="all-equal"),
        pytest.param(SMALL, [0.0, 1, 3, 2, 3, 3, 0, 0], 127, [0, 2, 6, 7], id="tie-of-the-best"),
        pytest.param(FEW_OF_DEFAULT, [0.0, 1, 2, 3, 3, 3, 9, 9], 319, [0, 3, 4], id="future-not-chosen"),
        pytest.param(L_IS_D, [0.0, 5, 4, 5, 3], 79, [1, 3, 4], id="no-initial-block"),
        pytest.param(SMALL, [5.0, 5, 5, 5, 5, 5, 5, 5], 16, [0, 1, -1, -1], id="two-blocks"),
        pytest.param(SMALL, [0.0, 0, 0, 0, 0, 0, 0, 0], 0, [0, -1, -1, -1], id="first-token"),
        pytest.param(SMALL, [0.0], 15, [0, -1, -1, -1], id="fewer-blocks-than-n"),
        pytest.param(SMALL, [0.0, 0, 0, 0, 0, 0, 0, 0], -3, [-1, -1, -1, -1], id="before-the-first-key"),
    ],
)
def test_selection_rules(config: NSAConfig, scores: list[float], position: int, want: list[int]) -> None:
    got = reference.select_from_importance(torch.tensor(scores)[None, None, None], config, torch.tensor([position]))
    assert got.dtype == torch.int32
    assert got.flatten().tolist() == want


def test_equal_keys_choose_the_lower_index_end_to_end() -> None:
    x = make(1, len_q=150, len_k=150)
    x["k_cmp"].zero_()
    blocks = run(x, SMALL)["blocks"][0, :, 0]
    # all whole blocks have the same mass; 0 and the last two are forced
    assert blocks[149].tolist() == [0, 1, 8, 9]
    assert blocks[100].tolist() == [0, 1, 5, 6]


def test_given_positions_compute_rows_of_a_longer_problem() -> None:
    x = make(1, len_q=150, len_k=150, heads=2)
    full = run(x, SMALL)
    rows = torch.tensor([149, 0, 77, 3, 76])
    q, at = x["q"][:, rows], {"positions": rows}
    o_cmp, lse = reference.compressed_attention(q, full["k_cmp"], full["v_cmp"], SMALL, seq_k=150, **at)
    blocks = reference.select_blocks(q, full["k_cmp"], lse, SMALL, seq_k=150, **at)
    o_slc, lse_slc = reference.selected_attention(q, x["k_slc"], x["v_slc"], blocks, SMALL, **at)
    o_win, lse_win = reference.window_attention(q, x["k_win"], x["v_win"], SMALL, **at)
    got = {"o_cmp": o_cmp, "lse_cmp": lse, "blocks": blocks, "o_slc": o_slc, "lse_slc": lse_slc}
    for name, value in {**got, "o_win": o_win, "lse_win": lse_win}.items():
        close(value, full[name][:, rows], name)


@pytest.mark.parametrize("bound", [1, 3000], ids=["a-row-at-a-time", "a-few-rows"])
def test_chunks_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    x = leaves(make(2, len_q=19, len_k=33))
    want = run(x, SMALL)
    want_grads = torch.autograd.grad(want["o"].square().sum(), list(x.values()))
    pairs: list[tuple[int, int]] = []  # (rows, bytes) of every tensor of scores
    scaled_scores = dense.scaled_scores

    def spy(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        scores = scaled_scores(q, k, scale)
        pairs.append((q.shape[1], scores.nbytes))
        return scores

    monkeypatch.setattr(dense, "CHUNK_BYTES", bound)
    monkeypatch.setattr(dense, "scaled_scores", spy)
    got = run(x, SMALL)
    assert len(pairs) > 3 and all(rows == 1 or size <= bound for rows, size in pairs)
    for name in want:
        close(got[name], want[name], name)
    grads = torch.autograd.grad(got["o"].square().sum(), list(x.values()))
    for grad, want_grad, name in zip(grads, want_grads, x, strict=True):
        close(grad, want_grad, f"gradient of {name}")


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def nsa_of_raw(x: dict[str, Tensor], config: NSAConfig, phi: PhiWeights, layout: PackedLayout | None) -> Tensor:
    k_cmp = reference.compress_mlp(x["k_cmp"], phi, config, layout=layout)
    v_cmp = reference.compress_mean(x["v_cmp"], config, layout=layout)
    rest = {name: x[name] for name in ("q", "k_slc", "v_slc", "k_win", "v_win", "gates")}
    return reference.nsa_attention(k_cmp=k_cmp, v_cmp=v_cmp, config=config, layout=layout, **rest)


@pytest.mark.parametrize("lengths", [None, [(3, 3), (0, 0), (6, 9)]], ids=["batched", "packed"])
def test_gradcheck(lengths: list[tuple[int, int]] | None) -> None:
    config = NSAConfig(4, 2, 4, num_selected=2, num_initial=1, num_local=1, window_size=3)
    layout = packed(lengths, config) if lengths else None
    lead, shape = ((), {"len_q": 9, "len_k": 12}) if lengths else ((1,), {"len_q": 9, "len_k": 9})
    x = leaves(make(*lead, **shape, d_qk=3, d_v=2))
    phi = make_phi(4, 3, hidden=2)
    weights = [w.requires_grad_() for w in (phi.position, phi.w1, phi.b1, phi.w2, phi.b2)]
    names = list(x)

    def fn(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors, strict=False))
        return nsa_of_raw(values, config, PhiWeights(*tensors[len(names) :]), layout)

    assert torch.autograd.gradcheck(fn, (*x.values(), *weights), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_rows_without_visible_block_are_zero_and_give_no_nan(dtype: torch.dtype, tokens: int) -> None:
    x = {name: tensor.to(dtype).requires_grad_() for name, tensor in make(1, len_q=tokens, len_k=tokens).items()}
    got = run(x, SMALL)
    blind = slice(0, SMALL.compress_block_size - 1)
    assert got["o_cmp"][:, blind].eq(0).all() and got["lse_cmp"][:, blind].eq(-math.inf).all()
    assert got["o_cmp"].dtype == dtype and got["o"].dtype == dtype
    assert got["lse_cmp"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got["o"].isfinite().all() and not got["scores"].isnan().any()
    grads = torch.autograd.grad(got["o_cmp"].sum() + got["lse_cmp"][got["lse_cmp"].isfinite()].sum(), x["q"])
    assert grads[0][:, blind].eq(0).all() and grads[0].isfinite().all()
    for name, grad in zip(x, torch.autograd.grad(run(x, SMALL)["o"].sum(), list(x.values())), strict=True):
        assert grad.isfinite().all(), name


def test_blocks_of_no_row_give_zero() -> None:
    x = leaves(make(1, len_q=20, len_k=20))
    blocks = torch.full((1, 20, 1, 4), -1, dtype=torch.int32)
    o, lse = reference.selected_attention(x["q"], x["k_slc"], x["v_slc"], blocks, SMALL)
    assert o.eq(0).all() and lse.eq(-math.inf).all()
    for grad in torch.autograd.grad(o.sum(), [x["q"], x["k_slc"], x["v_slc"]]):
        assert grad.eq(0).all()


def test_importance_has_finite_gradients_with_huge_future_scores() -> None:
    q, k = normal(1, 40, 2, 6).requires_grad_(), normal(1, 9, 1, 6)
    k[:, 5:] *= 1e5  # what early tokens must not see
    _, lse = reference.compressed_attention(q, k, k, SMALL, seq_k=40)
    scores = reference.importance(q, k, lse, SMALL, seq_k=40)
    (grad,) = torch.autograd.grad(scores[scores.isfinite()].square().sum(), q)
    assert grad.isfinite().all()


def test_wrong_heads_and_missing_length_raise() -> None:
    q, k = normal(1, 5, 3, 4), normal(1, 5, 2, 4)
    with pytest.raises(InvalidInput, match=r"q_heads=3, k_heads=2.*HQ % H == 0"):
        reference.window_attention(q, k, k, SMALL)
    with pytest.raises(InvalidInput, match="v_heads=1"):
        reference.window_attention(q[:, :, :2], k, k[:, :, :1], SMALL)
    with pytest.raises(InvalidInput, match="Give seq_k"):
        reference.compressed_attention(q[:, :, :2], k, k, SMALL, seq_k=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_beyond_float16_are_finite_and_right(dtype: torch.dtype) -> None:
    """A product of large float16 queries and keys passes 65504 before it is scaled."""
    q, gates = (30_000 * torch.randn(1, 40, 4, 16)).clamp(-60_000, 60_000).to(dtype), torch.rand(1, 40, 4, 3).to(dtype)
    k, v = torch.randn(1, 40, 2, 16).to(dtype), torch.randn(1, 40, 2, 8).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    out = nsa_attention(*leaves, config=SMALL)
    wide = nsa_attention(*(x.detach().double() for x in leaves), config=SMALL)
    assert out.isfinite().all() and (q.float() @ k.float().repeat_interleave(2, 2).transpose(2, 3)).abs().max() > 65504
    torch.testing.assert_close(out.double(), wide, rtol=0.05, atol=0.05 if dtype != torch.float32 else 1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum(), leaves[2:]))
