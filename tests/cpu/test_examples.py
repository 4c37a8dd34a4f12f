"""The example trains on a CPU with tiny sizes: its loss falls, its log is complete, its tasks ask what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("activations", "curves", "decoder", "options", "tasks", "train")
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
    with pytest.raises(ValueError, match=r"at least 72 for --pairs 9 and --repeats 1, not 64, or .* from 1 to 8$"):
        train.make_task(train.parse(["--seq", "64", "--pairs", "9", "--repeats", "1"]))
    with pytest.raises(ValueError, match=r"at least 96 for --pairs 3 and --repeats 8, not 64, or .* from 1 to 2$"):
        train.make_task(train.parse(["--seq", "64", "--pairs", "3", "--repeats", "8"]))
    with pytest.raises(ValueError, match=r"--seq must be at least 2048 for --pairs 64 and --repeats 8, not 128"):
        train.make_task(train.parse(["--seq", "128"]))
    with pytest.raises(ValueError, match=r"--seq must be at least 2048 for --pairs 64 and --repeats 8, not 16$"):
        train.make_task(train.parse(["--seq", "16"]))
    with pytest.raises(ValueError, match="--pairs must be from 1 to the number of --keys, 512, not 513"):
        train.make_task(train.parse(["--pairs", "513", "--seq", "100000"]))
    with pytest.raises(ValueError, match="--repeats must be at least 1, not 0"):
        train.make_task(train.parse(["--repeats", "0"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "-1"], "--steps must be at least 1, not -1"),
        (["--log-every", "0"], "--log-every must be at least 1, not 0"),
        (["--start-seq", "0"], "--start-seq must be at least 1, not 0"),
        (["--attention", "dense", "--kv-heads", "3"], "--heads must be a multiple of --kv-heads, not 2 of 3"),
        (["--task", "text", "--text", "/missing"], "--text must be a text file in UTF-8: .*'/missing'"),
        (["--device", "nowhere"], "--device must be one that torch can use, such as cpu, not nowhere"),
        (["--device", "cuda:99"], "--device must be one that torch can use, such as cpu, not cuda:99"),
        (["--out", "/proc/x"], "--out must be a folder that can be written: .*'/proc/x'"),
        (["--dump-activations", "/missing/x.pt"], "--dump-activations must be a file in a folder that is there"),
    ],
)
def test_a_wrong_option_ends_the_command_with_a_sentence(
    train: ModuleType, tmp_path: Path, words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=rf"^train\.py: {sentence}"):
        train.main([*f"--seq 64 --steps 1 --out {tmp_path}".split(), *TINY, *words])


def test_ctrl_c_keeps_the_log_and_the_model(train: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")  # of an earlier run in the folder
    words = f"--seq 64 --steps 100000 --log-every 3 --out {tmp_path}".split()
    log, root = tmp_path / "log.jsonl", str(EXAMPLES.parent)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), root])}
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train.py"), *words, *TINY], stderr=subprocess.PIPE, text=True, env=environ
    )
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    kept = f"{tmp_path} has log.jsonl and model.pt until then"
    assert process.returncode == 130
    assert said == f"train.py: stopped after step {last}; {kept}; the same command begins anew\n"
    assert (tmp_path / "model.pt").exists() and not (tmp_path / "result.json").exists()


def test_the_step_under_way_is_the_last_of_log_and_weights(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, step = [], train.Trainer.step

    def interrupted(trainer: object) -> object:
        taken.append(step(trainer))
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train.main([*f"--seq 64 --steps 9 --log-every 3 --out {tmp_path}".split(), *TINY])
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 5] and len(taken) == 5
    assert records[-1]["loss"] == pytest.approx(sum(float(loss) for loss, _ in taken[3:]) / 2)
    assert "stopped after step 5" in capsys.readouterr().err
    assert "embedding.weight" in torch.load(tmp_path / "model.pt", weights_only=True)["weights"]


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
