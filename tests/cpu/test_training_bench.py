"""benchmarks/training.py: marks, sums, ratios and the page from made-up rows, and a whole run on a pretended GPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cpu.test_bench_command import GPU, FakeDispatcher, pretend_a_gpu

from nsa_autotune.cli import bench_run
from nsa_autotune.cli.bench import plan_work
from nsa_autotune.cli.bench_report import Rates, Report, Row
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.spec import Problem

FOLDER = Path(__file__).parents[2] / "benchmarks"
LONG = Problem(seq_q=65536, seq_k=65536, locality=0.0)
TINY = Problem(seq_q=64, seq_k=64, num_q_heads=4, num_kv_heads=2, d_qk=16, d_v=8, dtype="float32", phi_hidden=8)
TINY = TINY.replace(nsa=NSAConfig(8, 4, 16, num_selected=4, window_size=20))
PATCH = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are found as when it is run."""
    with PATCH.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("training")
        for name in ("training", "training_calls", "training_page", "forward"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def page(training: ModuleType) -> ModuleType:
    """Its page."""
    return sys.modules["training_page"]


@pytest.fixture(scope="module")
def calls(training: ModuleType) -> ModuleType:
    """Its calls."""
    return sys.modules["training_calls"]


def row(work: str, ms: float | None, kind: str = "ours", problem: Problem = LONG, **changes: Any) -> Row:
    """A measured row, or one without a time."""
    us = None if ms is None else ms * 1e3
    samples = () if us is None else (us,)
    return replace(Row(work, kind, problem, None, 1e12, 1e9, {}, samples, us, us, us), **changes)


def report(*rows: Row) -> Report:
    rates = {"bfloat16": Rates(800.0, 3000.0)}
    return Report(
        GPU.to_dict(), "python benchmarks/training.py", "2026-01-02T03:04:05+00:00", "0.1", 10, False, rates, rows
    )


# marks


@pytest.mark.parametrize(
    ("made", "mark"),
    [
        (row("compressed backward", 30.0, "sum"), 30.0),
        (row("compressed backward", 8.0, "sum", LONG.replace(seq_q=32768, seq_k=32768)), 8.0),
        (row("selected backward", 26.0, "sum", locality=0.0), 26.0),
        (row("selected backward", 19.0, "sum", locality=0.8), 19.0),
        (row("whole backward, sum of families", 58.0, "sum", locality=0.8), 58.0),
        (row("whole backward, sum of families", 58.0, "sum", locality=0.0), None),
        (row("backward", 90.0), 90.0),
        (row("backward", 90.0, problem=LONG.replace(dtype="float16")), 90.0),
        (row("selected backward", 35.0, "sum", locality=0.5), None),
        (row("backward, module of hidden size 4096", 90.0, "module"), None),
        (row("window backward", 1.0, "sum"), None),
        (row("backward, learned phi", 90.0), None),
        (row("backward", 90.0, problem=LONG.replace(d_qk=192)), None),
        (row("backward", 90.0, problem=LONG.replace(seq_q=32768, seq_k=32768)), None),
        (row("backward", 90.0, problem=LONG.replace(nsa=NSAConfig(num_selected=8))), None),
    ],
)
def test_marks_are_those_of_one_shape(page: ModuleType, made: Row, mark: float | None) -> None:
    assert page.mark_ms(made) == mark
    if mark is None:
        assert page.verdict(made) == ""
        return
    late = replace(made, median_us=mark * 1e3 + 1)
    assert [page.verdict(r) for r in (made, late, replace(made, median_us=None))] == ["met", "missed", "not measured"]


@pytest.mark.parametrize(
    ("group", "forward", "mark"), [(1, 4.55, 6.05), (2, 4.7, 6.4), (4, 4.75, 6.55), (8, 4.75, 7.55), (3, None, None)]
)
def test_marks_of_small_groups(page: ModuleType, group: int, forward: float | None, mark: float | None) -> None:
    problem = Problem(seq_q=32768, seq_k=32768, num_q_heads=4 * group, num_kv_heads=4)
    assert page.mark_ms(row("slc_attn_fwd", 1.0, "branch", problem, locality=0.0)) == forward
    assert page.mark_ms(row("selected backward", 1.0, "sum", problem, locality=0.0)) == mark
    assert page.mark_ms(row("selected backward", 1.0, "sum", problem, locality=0.8)) is None
    other = problem.replace(num_q_heads=8 * group, num_kv_heads=8)
    assert page.mark_ms(row("selected backward", 1.0, "sum", other, locality=0.0)) is None


# sums and ratios


def test_a_sum_needs_all_its_parts(page: ModuleType) -> None:
    parts = [row("cmp_attn_bwd_dq", 12.0, "branch"), row("cmp_attn_bwd_dkv", 20.5, "branch")]
    whole = page.sum_of("compressed backward", "sum", parts)
    assert (whole.median_us, whole.p20_us, whole.flops, whole.failed) == (32_500.0, None, 2e12, False)
    broken = page.sum_of("compressed backward", "sum", [parts[0], row("b", None, "branch", reason="no registers")])
    assert broken.median_us is None and broken.failed and broken.reason == "no registers"


@pytest.mark.parametrize(
    ("work", "gain"),
    [
        ("forward", 3.0),
        ("forward that saves for the backward", 3.0),
        ("backward", 8.0),
        ("forward + backward", 11.0),
        ("backward, learned phi", 8.0),
    ],
)
def test_the_same_work_is_compared(page: ModuleType, work: str, gain: float) -> None:
    dense = [row("cudnn_sdpa forward", 30.0, "dense"), row("cudnn_sdpa backward", 80.0, "dense")]
    dense.append(page.sum_of("cudnn_sdpa forward + backward", "dense", dense))
    other = [replace(r, problem=LONG.replace(d_qk=192), median_us=1.0) for r in dense]
    assert page.ratio([*other, *dense], row(work, 10.0), "cudnn_sdpa") == pytest.approx(gain)
    assert page.ratio(dense, row(work, 10.0), "flash_sdpa") is None
    assert (
        page.ratio(dense, dense[0], "cudnn_sdpa") is None and page.ratio(dense, row(work, None), "cudnn_sdpa") is None
    )


def test_the_page_and_its_json_say_it_all(page: ModuleType) -> None:
    refused = "not supported: No available kernel | d_qk != d_v"
    rows = (
        row("backward", 88.0, served={"exact": 9}),
        row("compressed backward", 41.0, "sum"),
        row("cudnn_sdpa backward", 352.0, "dense"),
        row("flash_sdpa backward", None, "dense", reason=refused),
        row("forward", None, reason="out of registers"),
    )
    held = [page.Memory("nsa", "forward + backward", LONG, "grouped", 3 << 30, 5 << 29)]
    text = page.markdown(report(*rows), held, "Training")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 88.00 | 88.00..88.00 | 11.36 | exact | 4.00x |  | 90 (met) |" in lines["backward"]
    assert "30 (missed)" in lines["compressed backward"] and "352.00" in lines["cudnn_sdpa backward"]
    assert "not supported" in lines["flash_sdpa backward"] and "not measured" in lines["forward"]
    assert "| nsa | forward + backward | 64k | grouped | 3.00 | 2.50 | 5.50 |" in text
    assert refused in text and "NVIDIA H200" in text and "python benchmarks/training.py" in text and "570.1" in text
    data = json.loads(json.dumps(page.to_dict(report(*rows), held), allow_nan=False))
    assert data["rows"][0]["speedup_over"] == {"cudnn_sdpa": 4.0, "flash_sdpa": None}
    assert [r["verdict"] for r in data["rows"]] == ["met", "missed", "", "", ""]
    assert data["memory"][0]["peak_bytes"] == 5 << 29 and data["memory"][0]["problem"]["seq_k"] == 65536


# the calls


@pytest.mark.parametrize("phi", ["mean", "mlp"])
def test_every_input_of_ours_gets_a_gradient(calls: ModuleType, phi: str) -> None:
    contender = calls.our_contender(TINY, torch.device("cpu"), phi, FakeDispatcher(None, []))
    assert len(contender.leaves) == (18 if phi == "mlp" else 8)
    again, once = contender.call("backward"), contender.call("forward + backward")()
    for _ in range(2):  # the graph is kept
        found = again()
        assert all(
            torch.equal(a, b) and a.shape == x.shape for a, b, x in zip(found, once, contender.leaves, strict=True)
        )
    assert not contender.call("forward")().requires_grad
    assert contender.call("forward that saves for the backward")().requires_grad
    sizes = [x.numel() for x in contender.leaves]
    assert contender.input_bytes == 4 * (sum(sizes) + 64 * 4 * 8)


def test_a_forward_alone_has_no_leaves_to_learn(calls: ModuleType) -> None:
    contender = calls.our_contender(TINY, torch.device("cpu"), "mean", FakeDispatcher(None, []), learns=False)
    assert contender.do is None and not any(x.requires_grad for x in contender.leaves)
    assert contender.call("forward")().shape == (1, 64, 4, 8)


@pytest.mark.parametrize("grouped", [True, False])
def test_dense_attention_takes_groups_or_repeated_heads(calls: ModuleType, grouped: bool, monkeypatch: PATCH) -> None:
    monkeypatch.setitem(calls.SDPA_BACKENDS, "cudnn_sdpa", "MATH")
    contender = calls.dense_contender("cudnn_sdpa", TINY, torch.device("cpu"), grouped)
    shapes = [tuple(g.shape) for g in contender.call("backward")()]
    kv = 2 if grouped else 4
    assert shapes == [(1, 4, 64, 16), (1, kv, 64, 16), (1, kv, 64, 8)]


def test_the_module_learns_all_its_weights(calls: ModuleType) -> None:
    contender = calls.module_contender(TINY, torch.device("cpu"), 24, FakeDispatcher(None, []))
    assert contender.leaves[0].shape == (1, 64, 24) and len(contender.leaves) > 10
    found = contender.call("backward")()
    assert all(g.shape == x.shape for g, x in zip(found, contender.leaves, strict=True))
    assert contender.call("forward")().shape == (1, 64, 24)


def test_projections_cost_a_forward_once_and_a_backward_twice(calls: ModuleType, training: ModuleType) -> None:
    bench = training.Bench(torch.device("cpu"), None, lambda _: FakeDispatcher(None, []), 5)
    problem = TINY.replace(phi_hidden=16, d_v=16)
    entries, _ = calls.module_entries(problem, bench, 24)
    inner = calls.our_cost(problem, "mlp")
    weights = 24 * (4 * (16 + 16 + 3) + 3 * 2 * (16 + 16))
    for entry, times in zip(entries, (1, 2, 3), strict=True):
        stage = entry.work.partition(", ")[0]
        assert entry.cost.flops == inner[stage].flops + times * 2 * 64 * weights
    assert [entry.kind for entry in entries] == ["module"] * 3


# a whole run


@pytest.fixture
def on_a_gpu(training: ModuleType, calls: ModuleType, monkeypatch: PATCH) -> list[Any]:
    """A machine with one GPU, its clock and kernels pretended; cuDNN is plain PyTorch, FlashAttention-2 is missing."""
    asked: list[Any] = []

    def dispatcher(source: object, locality: float | None = None) -> Dispatcher:
        return FakeDispatcher(locality, asked)

    pretend_a_gpu(monkeypatch, dispatcher)
    for name in ("check_device", "measure_rates"):
        monkeypatch.setattr(training, name, getattr(bench_run, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setitem(calls.SDPA_BACKENDS, "cudnn_sdpa", "MATH")
    monkeypatch.setitem(calls.SDPA_BACKENDS, "flash_sdpa", "EFFICIENT_ATTENTION")
    return asked


def test_a_run_writes_its_page_and_json(training: ModuleType, on_a_gpu: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    arguments = ["--preset", "tiny", "--seq", "96", "--untuned", "--phi", "mlp", "--module", "--hidden-size", "32"]
    assert training.main([*arguments, "--folder", str(folder)]) == 0
    text, data = sorted(folder.iterdir(), reverse=True)
    assert text.name.endswith("-h200-training-mlp.md") and data.name == text.with_suffix(".json").name
    assert f"python benchmarks/training.py {' '.join(arguments)}" in text.read_text()
    rows = json.loads(data.read_text())["rows"]
    times = {(r["work"], r["locality"]): r["median_us"] for r in rows}
    ours = ["forward", "forward that saves for the backward", "backward", "forward + backward"]
    assert all(times[f"{stage}, learned phi", None] for stage in ours)
    dense = times["cudnn_sdpa forward", None] + times["cudnn_sdpa backward", None]
    assert times["cudnn_sdpa forward + backward", None] == dense
    assert {"cmp_mlp_bwd", "gate_sum_bwd"} <= {name.partition(",")[0] for name, _ in times}
    for locality in (0.0, 0.8):
        parts = [r for r in rows if r["work"].startswith("slc_attn_bwd") and r["locality"] in (locality, None)]
        assert len(parts) >= 2 and times["selected backward", locality] == sum(r["median_us"] for r in parts)
        families = [r for r in rows if r["kind"] == "branch" and r["locality"] in (locality, None)]
        assert len(families) >= 8 and len({r["work"] for r in families}) == len(families)
        whole = times["whole backward, sum of families", locality]
        assert whole == pytest.approx(sum(r["median_us"] for r in families))
    flash = [r for r in rows if r["work"].startswith("flash_sdpa")]
    assert len(flash) == 3 and all(r["reason"].startswith("not supported: ") for r in flash)
    memory = json.loads(data.read_text())["memory"]
    assert [m["who"] for m in memory] == ["nsa", "cudnn_sdpa", "nsa module"] and memory[1]["kv_heads"] == "grouped"
    stages = ("forward", "backward", "forward + backward")
    assert all(times[f"{stage}, module of hidden size 32", None] for stage in stages)


def test_another_dtype_has_a_page_of_its_own(training: ModuleType, on_a_gpu: list[Any], tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--seq", "96", "--untuned", "--dtype", "float32"]
    assert training.main([*arguments, "--folder", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*-h200-training-float32.json")
    found = json.loads(data.read_text())
    assert list(found["rates"]) == ["float32"]
    assert {r["problem"]["dtype"] for r in found["rows"]} == {"float32"}


def test_ctrl_c_keeps_the_lengths_that_were_measured_and_no_whole_page(
    training: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    monkeypatch.setattr(training, "GROUP_TOKENS", 128)
    measure = training.small_group

    def stopped(group: int, *rest: Any) -> Any:
        if group == 4:
            raise KeyboardInterrupt
        return measure(group, *rest)

    monkeypatch.setattr(training, "small_group", stopped)
    arguments = ["--small-groups", "--untuned", "--folder", str(tmp_path)]
    assert training.main(arguments) == 130
    (data,) = tmp_path.glob("*.json")
    assert data.name.endswith("-training-small-groups-interrupted.json")
    groups = {row["problem"]["num_q_heads"] // 4 for row in json.loads(data.read_text())["rows"]}
    assert groups == {1, 2}
    monkeypatch.setattr(training, "GROUPS", (4,))
    with pytest.raises(KeyboardInterrupt):  # nothing was measured: there is no page to write
        training.main(arguments)


def test_sections_have_a_page_of_their_own(
    training: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    monkeypatch.setattr(training, "MEMORY_PLAN", ((96, "forward + backward"), (128, "forward")))
    monkeypatch.setattr(training, "GROUP_TOKENS", 128)
    assert training.main(["--small-groups", "--memory", "--untuned", "--folder", str(tmp_path)]) == 0
    text, data = sorted(tmp_path.iterdir(), reverse=True)
    assert text.name.endswith("-training-small-groups-memory.md")
    rows = json.loads(data.read_text())["rows"]
    sums = [r["problem"] for r in rows if r["work"] == "selected backward"]
    assert [(p["num_q_heads"], p["num_kv_heads"], p["seq_k"]) for p in sums] == [
        (4 * group, 4, 128) for group in (1, 2, 4, 8) for _ in ("0", "0.8")
    ]
    forward = [(r["problem"]["num_q_heads"], r["locality"]) for r in rows if r["work"] == "slc_attn_fwd"]
    assert forward == [(4 * group, locality) for group in (1, 2, 4, 8) for locality in (0.0, 0.8)]
    assert [(r["work"], r["seq"]) for r in rows if r["kind"] == "ours"] == [
        ("forward + backward", 96),
        ("forward", 128),
    ]
    assert all(len(r["samples_us"]) == 1 for r in rows if r["kind"] == "ours")


@pytest.mark.parametrize("plan", [[], ["--preset", "tiny", "--seq", "96"]], ids=["alone", "with_shapes"])
def test_sections_are_measured_in_the_dtype_that_is_asked_for(
    training: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH, plan: list[str]
) -> None:
    monkeypatch.setattr(training, "MEMORY_PLAN", ((96, "forward"),))
    monkeypatch.setattr(training, "GROUP_TOKENS", 128)
    sections = ["--small-groups", "--memory", "--untuned", "--dtype", "fp16"]
    assert training.main([*plan, *sections, "--folder", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*.json")
    assert data.stem.endswith("-training-float16" + ("" if plan else "-small-groups-memory"))
    found = json.loads(data.read_text())
    assert {r["problem"]["dtype"] for r in found["rows"]} == {"float16"} == set(found["rates"])


def test_shapes_and_sections_may_have_a_dtype_each(
    training: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    monkeypatch.setattr(training, "MEMORY_PLAN", ((96, "forward"),))
    monkeypatch.setattr(training, "plan_work", lambda problems: plan_work(p.replace(dtype="float32") for p in problems))
    arguments = ["--preset", "tiny", "--seq", "96", "--memory", "--untuned", "--folder", str(tmp_path)]
    assert training.main(arguments) == 0
    (data,) = tmp_path.glob("*.json")
    assert set(json.loads(data.read_text())["rates"]) == {"float32", "bfloat16"}


def test_what_of_ours_does_not_run_is_an_exit_code(
    training: ModuleType, calls: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(calls.ops, "nsa_attention", refuse)
    arguments = ["--preset", "tiny", "--seq", "96", "--untuned", "--folder", str(tmp_path)]
    assert training.main(arguments) == 1
    text = next(tmp_path.glob("*.md")).read_text()
    assert "out of registers" in text and "cudnn_sdpa backward" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--preset", "gqa16"), ("preset", "gqa16-d128")),
        (("--seq", "8x"), ("sequence lengths", "8x")),
        (("--seq", "8"), ("at least l tokens",)),
        (("--rounds", "3"), ("at least 5 samples",)),
        (("--small-groups", "--dtype", "fp17"), ("dtype", "fp17", "bfloat16")),
        (("--module", "--hidden-size", "0"), ("--hidden-size=0", "4096")),
        (("--memory", "--module"), ("the sections have no module", "--preset")),
        ((), ("needs a CUDA GPU",)),
    ],
    ids=["preset", "seq", "short", "rounds", "dtype", "width", "sections", "no_gpu"],
)
def test_a_mistake_gets_a_sentence(
    training: ModuleType, arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: PATCH, capsys: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert training.main(arguments) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith("error: ") and all(word in err for word in words), err


def test_an_unknown_phi_is_refused(training: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        training.main(["--phi", "cnn"])
    assert "cnn" in capsys.readouterr().err
