"""The example trains on a CPU with tiny sizes: its loss falls, its log is complete, its tasks ask what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("activations", "curves", "decoder", "tasks", "train")
SMALL = "--device cpu --batch 4 --hidden 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --pairs 4"
TINY = [*SMALL.split(), "--repeats", "1", "--window", "16", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are imported as they are when it runs."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.syspath_prepend(str(EXAMPLES))
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    import train as module

    yield module
    torch.set_num_threads(threads)
    patch.undo()
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("task", "attention", "steps"), [("recall", "nsa", 12), ("recall", "dense", 12), ("text", "nsa", 8)]
)
def test_the_loss_falls(train: ModuleType, tmp_path: Path, task: str, attention: str, steps: int) -> None:
    out = tmp_path / "run"
    words = f"--task {task} --attention {attention} --seq 96 --steps {steps} --log-every 4".split() + TINY
    console = Console(record=True, width=400)
    records = train.train(train.parse([*words, "--out", str(out)]), console)
    assert [r["step"] for r in records] == list(range(4, steps + 1, 4))
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == records
    assert set(records[0]) == {"step", "seq", "loss", "accuracy", "tokens_per_s", "peak_memory_bytes"}
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == steps and abs(result["evaluation_loss"] - records[-1]["loss"]) < 1
    assert json.loads((out / "options.json").read_text())["attention"] == attention
    assert (out / "curves.png").exists() or "matplotlib is not installed" in console.export_text()


def test_a_run_ends_when_it_is_accurate_enough(train: ModuleType, tmp_path: Path) -> None:
    words = f"--seq 64 --steps 9 --log-every 2 --stop-at 0.0 --out {tmp_path}".split() + TINY
    assert [r["step"] for r in train.train(train.parse(words), Console(quiet=True))] == [2]


def test_sequences_double_until_they_are_whole(train: ModuleType, tmp_path: Path) -> None:
    words = f"--start-seq 64 --seq 200 --double-at 0 --steps 4 --log-every 1 --out {tmp_path}".split() + TINY
    records = train.train(train.parse(words), Console(quiet=True))
    assert [r["seq"] for r in records] == [64, 128, 200, 200]
    words[words.index("--double-at") + 1] = "1.1"
    assert [r["seq"] for r in train.train(train.parse(words), Console(quiet=True))] == [64] * 4


def test_a_shorter_sequence_has_as_many_pairs_to_a_token(train: ModuleType) -> None:
    task = train.recall_task(train.Recall(seq=400, pairs=40, window=40, repeats=2))
    for seq, pairs in ((400, 40), (200, 20), (50, 5), (16, 1)):
        tokens, targets = task.batch(3, seq, torch.Generator().manual_seed(0))
        assert tokens.shape == (3, seq) and (targets != train.IGNORED).sum(-1).tolist() == [pairs] * 3


def test_equal_seeds_give_equal_runs(train: ModuleType, tmp_path: Path) -> None:
    words = f"--seq 64 --steps 2 --log-every 1 --out {tmp_path}".split() + TINY
    runs = [train.train(train.parse(words), Console(quiet=True)) for _ in range(2)]
    assert [r["loss"] for r in runs[0]] == [r["loss"] for r in runs[1]]


def test_recall_asks_for_values_told_before_the_window(train: ModuleType) -> None:
    recall = train.Recall(seq=200, pairs=9, window=40, repeats=3)
    tokens, targets = recall.batch(5, torch.Generator().manual_seed(0))
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        asked = [i for i, value in enumerate(target) if value != train.IGNORED]
        assert len(asked) == 9 and asked[0] >= 140
        for place in asked:
            told = row.index(row[place])  # the key's first place
            assert row[told : told + 6] == 3 * row[place : place + 2] and row[place + 1] == target[place]
            assert row.count(row[place]) == 4 and place - told - 4 > 40


def test_what_cannot_work_is_told_in_a_sentence(train: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="use a shorter --seq"):
        train.make_task(train.parse(["--task", "text", "--text", str(tmp_path / "short.txt")]))
    with pytest.raises(ValueError, match="--pairs must be from 1 to 8"):
        train.make_task(train.parse(["--seq", "64", "--pairs", "9", "--repeats", "1"]))
    with pytest.raises(ValueError, match="1 to 2 for 512 keys, --seq 64 and --repeats 8"):
        train.make_task(train.parse(["--seq", "64", "--pairs", "3", "--repeats", "8"]))
    with pytest.raises(ValueError, match="--repeats must be at least 1, not 0"):
        train.make_task(train.parse(["--repeats", "0"]))


@pytest.mark.parametrize(
    ("attention", "more"), [("nsa", []), ("nsa", ["--share-kv"]), ("dense", ["--rope-theta", "1e4"])]
)
def test_activations_are_those_of_the_layer(train: ModuleType, tmp_path: Path, attention: str, more: list[str]) -> None:
    from nsa_autotune.bench.activations import load_activations

    file = tmp_path / "layer.pt"
    words = f"--attention {attention} --seq 64 --steps 1 --out {tmp_path} --dump-activations {file}".split()
    train.train(train.parse([*words, *TINY, *more]), Console(quiet=True))
    found = load_activations(file)
    assert found.q.shape == (1, 64, 2, 16) and found.k.shape == found.v.shape == (1, 64, 1, 16)


@pytest.mark.parametrize("theta", [[], ["--rope-theta", "1e4"]])
def test_dumped_activations_give_the_layers_output(train: ModuleType, theta: list[str]) -> None:
    """Dense attention of what is dumped, projected, is what the layer returns."""
    model = train.make_model(train.parse(["--attention", "dense", *TINY, *theta]), 32)
    tokens, outputs = torch.arange(48).remainder(32)[None], []
    model.layers[-1].attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = sys.modules["activations"].layer_activations(model, tokens, -1)
    q, k, v = (found[name].transpose(1, 2) for name in "qkv")
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = model.layers[-1].attention.out_proj(o.transpose(1, 2).flatten(-2))
    assert torch.allclose(outputs[0], expected, atol=1e-5)
