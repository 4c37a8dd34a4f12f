"""The example generates the same tokens on every path, and its cache knows all that the forward knows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("activations", "cached", "curves", "decoder", "generate", "options", "tasks", "train")
SIZES = "--device cpu --hidden 32 --layers 2 --heads 2 --kv-heads 1 --head-dim 16 --window 16 --num-selected 4"
SMALL = [*SIZES.split(), "--seq", "400"]


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are imported as they are when it runs."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.syspath_prepend(str(EXAMPLES))
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    import generate as module

    yield module
    torch.set_num_threads(threads)
    patch.undo()
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=["mlp", "mean"])
def model(generate: ModuleType, request: pytest.FixtureRequest) -> Any:
    """Random weights with an output of its own size, so that it repeats itself less; selection leaves blocks out."""
    words = [*SMALL, "--task", "text", "--compression", request.param, "--rope-theta", "1e4"]
    torch.manual_seed(0)
    made = generate.train.make_model(generate.train.parse(words), 40).eval().requires_grad_(False)
    for layer in made.layers:  # else a token's own embedding outshouts everything before it
        layer.attention.out_proj.weight.mul_(8.0)
    return made


def full_forward(model: Any, prompt: list[int], count: int) -> list[int]:
    """No cache at all."""
    found = list(prompt)
    for _ in range(count):
        found.append(int(model(torch.tensor([found]))[0, -1].argmax()))
    return found


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_greedy_tokens_are_the_same_on_every_path(generate: ModuleType, model: Any, monkeypatch: Any) -> None:
    prompt, count = tokens(350), 40
    want = full_forward(model, prompt, count)
    assert len(set(want[350:])) > 5  # no constant answer

    def run(**how: Any) -> Any:
        return generate.greedy(generate.CachedDecoder(model, 400, page_size=16), prompt, count, **how)

    for how in ({"chunk": 512}, {"chunk": 47}, {"chunk": 1}, {"chunk": 64, "draft": 4}, {"chunk": 5, "draft": 7}):
        assert run(**how).tokens == want, how
    assert run(chunk=47).steps == count - 1
    guesses = iter(range(10_000))

    def guess(found: list[int], draft: int) -> list[int]:
        """The truth, one token of which is spoilt in most steps."""
        truth, spoilt = want[len(found) : len(found) + draft], next(guesses) % (draft + 2)
        return [token if i != spoilt else (token + 1) % 40 for i, token in enumerate(truth)]

    monkeypatch.setattr(generate, "lookup", guess)
    speculated = run(chunk=64, draft=4)
    assert speculated.tokens == want and count / 5 <= speculated.steps < count / 2


@pytest.mark.parametrize("parts", [[400], [300, 1, 1, 98], [8, 7, 3, 1, 2, 90, 8, 8, 273]], ids=str)
def test_a_cache_gives_the_forwards_logits(generate: ModuleType, model: Any, parts: list[int]) -> None:
    said = torch.tensor([tokens(400, 1), tokens(400, 2)])
    decoder = generate.CachedDecoder(model, 400, batch=2, page_size=32)
    got = torch.cat([decoder(part) for part in said.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(got, model(said), rtol=2e-4, atol=2e-4)
    assert decoder.length == 400


def test_tokens_that_were_taken_back_leave_no_trace(generate: ModuleType, model: Any) -> None:
    said = torch.tensor([tokens(370, 3), tokens(370, 4)])
    decoder = generate.CachedDecoder(model, 384, batch=2)
    decoder(said[:, :350])
    decoder(torch.tensor([tokens(8, 5), tokens(8, 6)]))
    for sequence in (0, 1):
        decoder.truncate(350, sequence)
    got: list[Tensor] = [decoder(said[:, 350:353])]
    decoder(torch.tensor([tokens(2, 7), tokens(2, 8)]))
    decoder.truncate(353, 1), decoder.truncate(353)
    got.append(decoder(said[:, 353:]))
    torch.testing.assert_close(torch.cat(got, dim=1), model(said)[:, 350:], rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="up to 8 tokens"):
        decoder.truncate(350)


def test_guesses_are_what_followed_before(generate: ModuleType) -> None:
    assert generate.lookup([1, 2, 3, 9, 1, 2, 4, 5, 6, 1, 2], 2) == [4, 5]
    assert generate.lookup([1, 2, 3, 4], 3) == [] and generate.lookup([7, 7, 7], 3) == [7]
    assert generate.lookup([5], 3) == []


def test_a_trained_model_is_loaded_and_speaks(generate: ModuleType, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "--task", "text", "--steps", "2", "--batch", "1", "--out", str(out)]
    generate.train.train(generate.train.parse(words), Console(quiet=True))
    assert json.loads((out / "options.json").read_text())["task"] == "text"
    how = ["--run", str(out), "--device", "cpu", "--tokens", "12", "--prompt", "The License", "--draft", "3"]
    generate.main(how)
    said = capsys.readouterr().out
    assert said.startswith("The License") and "[12 tokens in " in said
    generate.main([*how, "--cache-dtype", "fp8"])
    assert capsys.readouterr().out.startswith("The License")
    with pytest.raises(SystemExit, match="no token for"):
        generate.main([*how, "--prompt", "\u2603"])
    (out / "model.pt").unlink()
    with pytest.raises(SystemExit, match=r"no model\.pt"):
        generate.main(how)


def test_the_cache_is_judged_on_recall(generate: ModuleType, capsys: Any) -> None:
    words = [
        *SMALL,
        "--task",
        "recall",
        "--pairs",
        "4",
        "--repeats",
        "2",
        "--keys",
        "8",
        "--evaluate",
        "--batches",
        "1",
    ]
    generate.main(words)
    said = capsys.readouterr().out
    forward, cache = (float(part.split()[-1]) for part in said.split(": ")[1].split(", "))
    assert said.startswith("accuracy of 4 answers: ") and forward == cache
    generate.main([*[word for word in words if word != "--evaluate"], "--tokens", "3"])
    assert "[3 tokens in 2 steps" in capsys.readouterr().out


def test_what_cannot_work_is_told_in_a_sentence(generate: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--attention nsa"):
        generate.main([*SMALL, "--attention", "dense"])
    with pytest.raises(SystemExit, match=r"^generate\.py: --prompt must have at least one character$"):
        generate.main([*SMALL, "--prompt", ""])
    with pytest.raises(SystemExit, match="--device must be one that torch can use"):
        generate.main([*SMALL, "--device", "cuda:99"])


@pytest.mark.parametrize(
    ("option", "number", "range_"),
    [
        ("tokens", -3, "at least 1"),
        ("batches", 0, "at least 1"),
        ("chunk", 0, "at least 1"),
        ("draft", 9, "from 0 to 7"),
        ("draft", -1, "from 0 to 7"),
    ],
)
def test_a_number_out_of_its_range_is_told_with_the_range(
    generate: ModuleType, option: str, number: int, range_: str
) -> None:
    with pytest.raises(SystemExit, match=rf"^generate\.py: --{option} must be {range_}, not {number}$"):
        generate.main([*SMALL, f"--{option}", str(number)])
