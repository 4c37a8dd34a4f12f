"""Activations from files, with a sentence for each mistake; and those that are made up, against what they promise."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nsa_autotune.bench import synthetic
from nsa_autotune.bench.activations import Activations, from_tensors, load_activations, sha256_of
from nsa_autotune.bench.quality import dense_attention, measure_quality, spread_positions
from nsa_autotune.bench.synthetic import NEEDLE_TOKENS, SINK_TOKENS, make_activations, make_plan
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidInput

# files


def tensors(tokens: int = 6, batch: tuple[int, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (4, 8), "k": (2, 8), "v": (2, 16)}
    return {name: torch.randn(*batch, tokens, *size, generator=generator) for name, size in sizes.items()}


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_torch_file_comes_back(tmp_path: Path, batch: tuple[int, ...]) -> None:
    saved = tensors(batch=batch)
    torch.save({**saved, "more": 1}, tmp_path / "a.pt")
    found = load_activations(tmp_path / "a.pt")
    assert found.q.shape == (*(batch or (1,)), 6, 4, 8) and found.tokens == 6
    for name, x in saved.items():
        assert torch.equal(getattr(found, name), x if batch else x[None])
    assert found.origin["source"] == "file" and len(found.origin["sha256"]) == 64
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert load_activations(tmp_path / "b.pt").origin == found.origin, "a file may move"


def test_the_digest_is_of_every_value_shape_and_dtype() -> None:
    x = torch.arange(6.0)
    digests = {sha256_of(y) for y in (x, x.view(2, 3), x.half(), x + torch.eye(6)[3] * 1e-6, x.view(3, 2))}
    assert len(digests) == 5 and sha256_of(x.clone()) == sha256_of(x)
    strided = torch.arange(12.0).view(6, 2)[:, 0]
    assert sha256_of(strided) == sha256_of(strided.clone())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k": None}, r"q, k and v must be tensors in the file.*missing=\['k'\]"),
        ({"v": [1.0]}, r"missing=\['v'\]"),
        ({"q": torch.zeros(6, 4)}, "3 dimensions, or 4"),
        ({"q": torch.zeros(1, 6, 4, 8)}, "3 dimensions, or 4"),
        ({"q": torch.zeros(5, 4, 8)}, "same tokens"),
        ({"q": torch.zeros(6, 0, 8)}, "same tokens, at least one"),
        ({"q": torch.zeros(6, 3, 8)}, "q a multiple of them"),
        ({"v": torch.zeros(6, 1, 8)}, "equally many heads"),
        ({"q": torch.zeros(6, 4, 16)}, "same head dim"),
        ({"q": torch.zeros(6, 4, 8).half()}, "same dtype.*q='float16'"),
        ({name: torch.zeros(6, 4, 8, dtype=torch.int32) for name in "qkv"}, "one of bfloat16"),
        ({"k": torch.full((6, 2, 8), math.nan)}, r"finite.*\['k'\]"),
        ({"v": torch.full((6, 2, 8), math.inf)}, r"finite.*\['v'\]"),
    ],
)
def test_a_wrong_tensor_is_named(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        from_tensors({**tensors(), **changes}, "file")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"q": Path("code")}, tmp_path / "code.pt")
    for name, sentence in (
        ("absent.pt", "no such file"),
        ("a.npy", "come in a .pt or .safetensors"),
        ("text.pt", "must hold tensors and nothing that runs code"),
        ("list.pt", "holds a dict.*found='list'"),
        ("code.pt", "must hold tensors and nothing that runs code"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            load_activations(tmp_path / name)


def test_safetensors_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InvalidInput, match=r"needs the package safetensors.*pip install 'nsa-autotune\[codesign\]'"):
        load_activations(tmp_path / "a.safetensors")


def test_safetensors_with_a_package_of_that_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    def load_file(path: Path, device: str) -> dict[str, Tensor]:
        if path.stem == "broken":
            raise Broken("header too large")
        return tensors()

    package, loader = ModuleType("safetensors"), ModuleType("safetensors.torch")
    package.SafetensorError, loader.load_file = Broken, load_file  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", loader)
    for name in ("a.safetensors", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert torch.equal(load_activations(tmp_path / "a.safetensors").q, tensors()["q"][None])
    with pytest.raises(InvalidInput, match=r"cannot be read as safetensors.*header too large"):
        load_activations(tmp_path / "broken.safetensors")


def test_a_safetensors_file_comes_back(tmp_path: Path) -> None:
    saver = pytest.importorskip("safetensors.torch")
    saver.save_file(tensors(), tmp_path / "a.safetensors")
    assert torch.equal(load_activations(tmp_path / "a.safetensors").v, tensors()["v"][None])
    (tmp_path / "b.safetensors").write_bytes(b"12345678 no header")
    with pytest.raises(InvalidInput, match="cannot be read as safetensors"):
        load_activations(tmp_path / "b.safetensors")


# made up

TOKENS = 4096


@pytest.fixture(scope="module")
def made() -> Activations:
    return make_activations(TOKENS, 8, 2, 64, 32, seed=3)


def probabilities(given: Activations, positions: Tensor) -> Tensor:
    """Dense causal softmax of queries at `positions`: `[HQ, C, T]`."""
    keys = given.k[0].repeat_interleave(given.q.shape[2] // given.k.shape[2], dim=1)
    scores = torch.einsum("chd,thd->hct", given.q[0, positions], keys) / given.q.shape[-1] ** 0.5
    return scores.masked_fill(torch.arange(given.tokens) > positions[:, None], -math.inf).softmax(-1)


def test_shapes_dtype_and_seed() -> None:
    first, again, other = (make_activations(70, 4, 2, 16, 24, dtype="float16", seed=seed) for seed in (0, 0, 1))
    assert first.q.shape == (1, 70, 4, 16) and first.k.shape == (1, 70, 2, 16) and first.v.shape == (1, 70, 2, 24)
    assert {x.dtype for x in (first.q, first.k, first.v)} == {torch.float16}
    assert first.origin == again.origin and first.origin["sha256"] != other.origin["sha256"]
    assert first.origin["seed"] == 0 and first.origin["version"] == synthetic.VERSION
    assert from_tensors({"q": first.q, "k": first.k, "v": first.v}, "").origin["sha256"] == first.origin["sha256"]


def test_the_first_tokens_are_sinks(made: Activations) -> None:
    mass = probabilities(made, torch.arange(TOKENS - 256, TOKENS))[..., :SINK_TOKENS].sum(-1)
    assert 0.2 < mass.mean() < 0.7 and mass.mean() > 100 * SINK_TOKENS / TOKENS


def test_near_keys_count_more(made: Activations) -> None:
    positions = torch.arange(TOKENS - 256, TOKENS)
    p = probabilities(made, positions)
    ages = positions[:, None] - torch.arange(TOKENS)
    mass = [
        float(p[:, (ages >= low) & (ages < high)].sum() / 256 / 8) for low, high in ((0, 64), (64, 128), (1024, 1088))
    ]
    assert mass[0] > 3 * mass[1] > 9 * mass[2] and mass[0] > 0.1


def test_needles_answer_their_topic(made: Activations) -> None:
    plan = make_plan(TOKENS, seed=3)
    late = torch.arange(TOKENS * 3 // 4, TOKENS)
    asking = late[plan.topics[late] < len(plan.needles)]
    assert len(asking) > 50
    where = plan.needles[plan.topics[asking]][:, None] + torch.arange(NEEDLE_TOKENS)
    mass = probabilities(made, asking).gather(-1, where.expand(8, -1, -1)).sum(-1)
    elsewhere = plan.needles.roll(1)[plan.topics[asking]][:, None] + torch.arange(NEEDLE_TOKENS)
    others = probabilities(made, asking).gather(-1, elsewhere.expand(8, -1, -1)).sum(-1)
    assert mass.mean() > 20 * NEEDLE_TOKENS / TOKENS and mass.mean() > 2 * others.mean()


def test_neighbours_select_alike_and_selection_pays(made: Activations) -> None:
    dense = dense_attention(made, spread_positions(TOKENS, 512))
    few, usual = (measure_quality(dense, NSAConfig(num_selected=n)) for n in (3, 16))
    assert usual.locality is not None and 0.6 < usual.locality < 0.9
    assert few.mass_kept + 0.03 < usual.mass_kept < 0.999
    shuffled = Activations(made.q, made.k[:, torch.randperm(TOKENS)], made.v, made.origin)
    scattered = measure_quality(dense_attention(shuffled, spread_positions(TOKENS, 512)), NSAConfig())
    assert scattered.mass_kept < usual.mass_kept - 0.1


@pytest.mark.parametrize(
    ("heads", "dim", "sentence"),
    [((4, 2), 8, "at least 16"), ((4, 2), 18, "multiple of 4"), ((4, 3), 16, "multiple of kv heads")],
)
def test_impossible_shapes(heads: tuple[int, int], dim: int, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        make_activations(8, *heads, dim, 16)
