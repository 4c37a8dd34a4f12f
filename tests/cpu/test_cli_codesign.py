"""`nsa-autotune codesign`: mistakes in sentences, whole runs on a pretended GPU and compiler, what is printed."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.bench.synthetic import make_activations
from nsa_autotune.cli import codesign_plan as planning
from nsa_autotune.cli.app import main
from nsa_autotune.config import NSAConfig
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.errors import WorkerError
from nsa_autotune.search.ranking import Prediction
from nsa_autotune.spec import DEFAULT_POLICY, Config, KernelSpec, Problem

ROOT = Path(__file__).parents[2]
FINGERPRINT = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
SHAPE = (
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--d-qk",
    "16",
    "--seq",
    "256",
    "--dtype",
    "fp16",
    "--quality-queries",
    "64",
)
SPACE = (
    "--select-blocks",
    "16,32",
    "--top-n",
    "3,4",
    "--windows",
    "16,32",
    "--strides",
    "8",
    "--compress-blocks",
    "16",
)
COMMAND = ("codesign", *SHAPE, *SPACE, "--trials", "2", "--jobs", "1")


def time_us(family: str, problem: Problem) -> float:
    """Grows with what a kernel reads."""
    nsa = problem.nsa
    keys = {"win": nsa.window_size, "slc": nsa.num_selected * nsa.select_block_size}.get(family[:3], 7)
    return 1.0 + keys / 10


class Worker:
    """A measuring process that answers by `time_us`."""

    stop_after: int | None = None
    stops_with: BaseException = KeyboardInterrupt()

    def __init__(self, device: str, policy: str = DEFAULT_POLICY, **options: object) -> None:
        self.policy, self.num_measured = policy, 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        self.num_measured += 1
        if self.stop_after is not None and self.num_measured > self.stop_after:
            raise self.stops_with
        t = time_us(family, problem)
        return TrialResult("ok", "", (t,), t, t, t)

    def renew(self) -> None:
        pass

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        return [self.measure(family, problem, config) for config in configs]

    def measure_library(self, provider: str, problem: Problem) -> TrialResult:
        return TrialResult("ok", "", (20.0,), 20.0, 20.0, 20.0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    """A machine with a GPU, pretended; quality is judged on the CPU."""

    class Own(Worker):
        pass

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("nsa_autotune.bench.worker.MeasureWorker", Own)
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: Fingerprint(**FINGERPRINT))
    monkeypatch.setattr("nsa_autotune.bench.activations.Activations.to", lambda self, device: self)
    return Own


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database."""
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)
    return f"sqlite:///{tmp_path / 'tuning.sqlite'}"


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main([*COMMAND, *words, "--format", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_every_design_is_tuned_stored_and_on_the_front_by_right(
    on_a_gpu: type[Worker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_json(capsys, "--db", url)
    assert len(rows) == 8 and [r["latency_us"] for r in rows] == sorted(r["latency_us"] for r in rows)
    for row in rows:
        nsa = NSAConfig(**{name: row[name] for name in NSAConfig().to_dict()})
        problem = Problem(nsa=nsa)
        assert row["parts_us"]["win_attn_fwd"] == time_us("win_attn_fwd", problem)
        assert row["parts_us"]["cmp_pool_fwd"] == 2 * time_us("cmp_pool_fwd", problem), "keys, then values"
        assert row["latency_us"] == pytest.approx(sum(row["parts_us"].values()))
        assert set(row["parts_us"]) == {
            *("cmp_pool_fwd", "cmp_attn_fwd", "slc_select_fwd", "slc_attn_fwd", "win_attn_fwd", "gate_sum_fwd")
        }
        beaten = [r for r in rows if r["latency_us"] < row["latency_us"] and r["output_error"] <= row["output_error"]]
        assert not (row["on_front"] and beaten)
        assert row["config"] == str(nsa) and row["kind"] == "measured" and row["gpu"] == "Test GPU"
    assert rows[0]["on_front"] and sum(row["on_front"] for row in rows) > 1
    with TuningStore(url) as store:
        winners = store.winners(gpu="Test GPU", family="slc_attn_fwd")
        assert {(w.problem["nsa"]["select_block_size"], w.problem["nsa"]["num_selected"]) for w in winners} == {
            *((16, 3), (16, 4), (32, 3), (32, 4))
        }
        assert len(store.winners(gpu="Test GPU", family="win_attn_fwd")) == 2 and len(store.designs()) == 8


def test_a_points_command_finds_its_winners(
    on_a_gpu: type[Worker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in run_json(capsys, "--db", url) if row["on_front"])
    program, *words = shlex.split(row["tune"])
    assert program == "nsa-autotune" and main([*words, "--jobs", "1", "--db", url]) == 0
    err = capsys.readouterr().err
    assert err.count("(known;") == 6, "nothing is tuned again"
    bench = shlex.split(row["bench"])[2:]
    assert bench == words[1 : 1 + len(bench)], "the same problem"


def test_a_run_resumes_after_ctrl_c_and_prints_a_table(
    on_a_gpu: type[Worker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu.stop_after = 30
    assert main([*COMMAND, "--db", url]) == 130
    captured = capsys.readouterr()
    with TuningStore(url) as store:
        kept = len(store.designs())
    assert 0 < kept < 8 and f"front of {kept} designs" in captured.out
    assert "every design is kept" in captured.err and "the same command resumes" in " ".join(captured.err.split())
    on_a_gpu.stop_after = None
    assert main([*COMMAND, "--db", url]) == 0
    captured = capsys.readouterr()
    assert "front of 8 designs, medians on Test GPU" in captured.out and "hypervolume 0." in captured.out
    assert "config=NSAConfig(compress_block_size=16, compress_stride=8" in captured.out
    assert f"{kept + 1}/8" in captured.err and f"{kept}/8" not in captured.err, "known designs are not judged again"
    assert "8 legal designs; activations: source generator" in captured.err
    assert main([*COMMAND, "--db", url, "--designs", "3"]) == 0
    assert "front of 8 designs" in capsys.readouterr().out


def test_a_lost_device_ends_the_run_after_what_was_found(
    on_a_gpu: type[Worker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu.stop_after, on_a_gpu.stops_with = 30, WorkerError("the device is lost")
    assert main([*COMMAND, "--db", url]) == 2
    captured = capsys.readouterr()
    assert "designs, medians on Test GPU" in captured.out and "the device is lost" in captured.err


def test_csv_has_a_line_for_each_design(on_a_gpu: type[Worker], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--db", url, "--designs", "3", "--quality", "mass", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 3 and json.loads(rows[0]["parts_us"])["win_attn_fwd"] > 0
    assert float(rows[0]["latency_us"]) <= float(rows[1]["latency_us"])


def test_activations_of_a_file_decide_the_shape(
    on_a_gpu: type[Worker], url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_activations(200, 8, 4, 16, 32, dtype="float16", seed=1)
    torch.save({"q": made.q[0], "k": made.k[0], "v": made.v[0]}, tmp_path / "a.pt")
    words = ["codesign", *SPACE, "--activations", str(tmp_path / "a.pt"), "--trials", "1", "--jobs", "1", "--db", url]
    assert main([*words, "--group-sizes", "2,4", "--designs", "3", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["group_size"] for row in rows} == {2, 4}
    assert all(
        "--seq 200 --batch 1 --heads 8" in r["tune"] and "--d-qk 16 --d-v 32 --dtype float16" in r["tune"] for r in rows
    )
    assert all(f"--kv-heads {8 // row['group_size']}" in row["tune"] for row in rows)
    with TuningStore(url) as store:
        studies = {str(record.study) for record in store.designs()}
        assert len(studies) == 1 and "'source': 'file'" in studies.pop()
    assert main([*words, "--kv-heads", "2"]) == 2
    assert "contradict the activations; got kv_heads=2" in capsys.readouterr().err
    assert main([*words, "--group-sizes", "1"]) == 2
    assert "smaller ones need activations with more kv heads" in " ".join(capsys.readouterr().err.split())


def test_without_a_gpu_times_are_predictions(
    monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(spec: KernelSpec, problem: Problem, *, target: str, **_: object) -> list[Prediction]:
        assert target == "cuda:90"
        return [Prediction(spec.default_config(problem), time_us(spec.family, problem), {})]

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nsa_autotune.search.latency.predict_problem", predict)
    assert main([*COMMAND, "--db", url]) == 0
    captured = capsys.readouterr()
    assert "predicted for cuda:90 by a cost model, nothing measured" in captured.out
    assert "us predicted, mass kept" in captured.err
    with TuningStore(url) as store:
        assert {record.kind for record in store.designs()} == {"predicted"} and not store.winners(gpu="target cuda:90")


def test_a_kernel_is_really_compiled(url: str) -> None:
    words = ["--families", "win_attn_fwd", "--designs", "2", "--trials", "1", "--windows", "16,32"]
    fixed = ["--select-blocks", "16", "--top-n", "3", "--strides", "8", "--compress-blocks", "16"]
    command = ["codesign", *SHAPE, *fixed, *words, "--target", "cuda:90", "--jobs", "2", "--db", url]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "nsa_autotune", *command, "--format", "json"]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [row["latency_us"] for row in rows] == [row["parts_us"]["win_attn_fwd"] for row in rows] and len(rows) == 2
    assert all(row["kind"] == "predicted" and row["gpu"] == "target cuda:90" for row in rows)
    with TuningStore(url) as store:
        guesses = {trial.predicted_us for trial in store.trials(kind="predicted", status="ok")}
    assert {row["latency_us"] for row in rows} == guesses


def test_if_no_kernel_works_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nsa_autotune.search.latency.predict_problem", lambda *_, **__: [])
    assert main([*COMMAND, "--db", url, "--designs", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("no config works for this design") == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--top-n", "4,x"], "--top-n takes whole numbers above 0; got --top-n='x'"),
        (["--windows", "0"], "--windows takes whole numbers above 0"),
        (["--windows", ","], "--windows names nothing"),
        (["--nsa", "num_selected=4"], "either fixed or searched"),
        (["--nsa", "num_selektet=4"], "Did you mean 'num_selected'"),
        (["--seq", "256,512"], "one sequence length, dtype and locality"),
        (["--locality", "0,0.8"], "one sequence length, dtype and locality"),
        (["--strides", "7"], "no combination of the constants can work"),
        (["--top-n", "2"], "num_initial + num_local <= num_selected"),
        (["--group-sizes", "3"], "multiples of the activations' own"),
        (["--quality", "mas"], "Did you mean 'mass'"),
        (["--compression", "max"], "there is no compression of this name"),
        (["--quality-tokens", "1k,2k"], "--quality-tokens is one number of tokens"),
        (["--families", "slc_attn"], "Did you mean slc_attn_fwd"),
        (["--activations", "nowhere.pt"], "no such file of activations"),
        (["--target", "cuda:91"], "cuda:91"),
        (["--device", "gpu"], "--device is a CUDA device"),
        (["--d-qk", "12"], "head dim of at least 16"),
        (["--plot", "no/folder/front.png"], "Name a file in an existing folder"),
        (["--plot", "front.xyz"], "ends in .png, .pdf, .svg"),
    ],
)
def test_mistakes_are_sentences(url: str, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    target = [] if "--target" in words else ["--target", "cuda:90"]
    assert main([*COMMAND, *words, *target, "--db", url]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_kernels_of_a_pass() -> None:
    def names(*words: str, **options: Any) -> set[str]:
        return {spec.family for spec in planning.pass_specs(words, **options)}

    mean, mlp = (names(compression=phi, backward=False) for phi in ("mean", "mlp"))
    assert mean - mlp == {"cmp_pool_fwd"} and mlp - mean == {"cmp_mlp_fwd"} and len(mean) == 6
    both = names(compression="mlp", backward=True)
    assert "cmp_mlp_bwd" in both and "slc_attn_bwd_dkv" in both and "cmp_pool_bwd" not in both and both > mlp
    assert names("win_attn_bwd_dq", "cmp_mlp_fwd", compression="mean", backward=False) == {
        *("win_attn_bwd_dq", "cmp_mlp_fwd")
    }


# the picture


def test_a_plot_needs_its_package(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*COMMAND, "--target", "cuda:90", "--plot", "front.png", "--db", url]) == 2
    assert "pip install 'nsa-autotune[codesign]'" in " ".join(capsys.readouterr().err.split())


class Axis:
    """Keeps what is drawn."""

    def __init__(self) -> None:
        self.drawn: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.drawn.setdefault(name, args)


def test_all_designs_and_the_front_are_drawn(
    on_a_gpu: type[Worker],
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    axis, package, pyplot = Axis(), ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    figure = type("Figure", (), {"savefig": lambda self, path, dpi: path.write_text("picture")})()
    package.use, package.pyplot = lambda _: None, pyplot  # type: ignore[attr-defined]
    pyplot.subplots, pyplot.close = lambda **_: (figure, axis), lambda _: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    rows = run_json(capsys, "--db", url, "--plot", str(tmp_path / "front.png"))
    assert (tmp_path / "front.png").read_text() == "picture"
    latencies, losses = axis.drawn["scatter"]
    assert sorted(zip(latencies, losses, strict=True)) == sorted((r["latency_us"], r["output_error"]) for r in rows)
    assert list(axis.drawn["plot"][0]) == [row["latency_us"] for row in rows if row["on_front"]]


def test_a_real_picture_is_an_image(
    on_a_gpu: type[Worker], url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run_json(capsys, "--db", url, "--plot", str(tmp_path / "front.png"))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
