"""benchmarks/decode.py: bytes, marks and the page from made-up rows; its calls; a run on a pretended GPU."""

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
from cpu.test_bench_command import GPU, FakeClock, FakeDispatcher, pretend_a_gpu
from cpu.test_ops_decode import Interpreted

from nsa_autotune.bench.library import SDPA_BACKENDS
from nsa_autotune.cli import bench_run
from nsa_autotune.cli.bench_entries import Bench
from nsa_autotune.cli.bench_report import Rates, Report, Row
from nsa_autotune.config import NSAConfig
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.spec import Problem

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
LONG = Problem(batch=8, seq_q=1, seq_k=65536, layout="paged")
TINY = Problem(batch=2, seq_q=1, seq_k=96, num_q_heads=4, num_kv_heads=2, d_qk=32, d_v=16, dtype="float32")
TINY = TINY.replace(layout="paged", page_size=16, phi_hidden=16, nsa=NSAConfig(8, 4, 16, 4, window_size=20))
PATCH = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def decode() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are found as when it is run."""
    with PATCH.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("decode")
        for name in ("decode", "decode_calls", "decode_page", "forward"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def page(decode: ModuleType) -> ModuleType:
    """Its page."""
    return sys.modules["decode_page"]


@pytest.fixture(scope="module")
def calls(decode: ModuleType) -> ModuleType:
    """Its calls."""
    return sys.modules["decode_calls"]


# bytes, marks, ratios


def test_the_bytes_are_those_that_a_step_must_read(page: ModuleType) -> None:
    """8 x 64k: 4095 compressed rows, 16 blocks of 64 tokens, a window of 512, for 4 heads of 128 + 128 values."""
    assert page.moved_bytes(LONG) == 8 * (4095 + 1024 + 512) * 4 * 256 * 2
    assert page.moved_bytes(LONG, ("cmp_decode_fwd",)) == 8 * 4095 * 4 * 256 * 2
    assert page.moved_bytes(LONG, dense=True) == 8 * 65536 * 4 * 256 * 2
    fp8 = LONG.replace(cache_dtype="float8_e4m3fn")
    assert page.moved_bytes(fp8) * 2 == page.moved_bytes(LONG)
    assert page.moved_bytes(fp8, dense=True) == page.moved_bytes(LONG, dense=True)
    short = LONG.replace(batch=1, seq_k=100)
    assert page.moved_bytes(short) == (5 + 100 + 100) * 4 * 256 * 2
    assert page.keys_read(LONG.replace(seq_q=3))["slc_win_decode_fwd"] == 3 * 1024 + 514
    assert page.append_bytes(LONG) == 8 * 4 * 256 * (4 + 33 * 2)


def row(work: str, ms: float | None, kind: str = "ours", problem: Problem = LONG, **changes: Any) -> Row:
    us = None if ms is None else ms * 1e3
    return replace(Row(work, kind, problem, None, 1e9, 30e6, {"exact": 2}, (us or 0.0,), us, us, us), **changes)


def line(page: ModuleType, work: str, graph: float | None, eager: float | None, kind: str = "ours", **more: Any) -> Any:
    return page.Line(row(work, graph, kind, **more), row(work, eager, kind, **more), 55.0)


@pytest.mark.parametrize(
    ("problem", "mark"),
    [
        (LONG.replace(batch=64, seq_k=8192), 0.15),
        (LONG.replace(batch=16, seq_k=32768), 0.075),
        (LONG, 0.060),
        (LONG.replace(batch=1), 0.030),
        (LONG.replace(batch=4, seq_k=131072), None),
        (LONG.replace(seq_q=2), None),
        (LONG.replace(d_qk=192), None),
        (LONG.replace(cache_dtype="float8_e4m3fn"), None),
        (LONG.replace(nsa=NSAConfig(num_selected=8)), None),
    ],
)
def test_marks_are_those_of_four_shapes(page: ModuleType, problem: Problem, mark: float | None) -> None:
    made = line(page, "step", mark, 9.0, problem=problem)
    assert page.mark_ms(made) == mark and page.mark_ms(line(page, "attention", mark, 9.0, problem=problem)) is None
    if mark is None:
        assert page.verdict(made) == ""
        return
    late = line(page, "step", mark + 0.001, mark, problem=problem)
    missing = line(page, "step", None, mark, problem=problem)
    assert [page.verdict(one) for one in (made, late, missing)] == ["met", "missed", "not measured"]


def made_lines(page: ModuleType) -> list[Any]:
    return [
        line(page, "step", 0.05, 0.08, served={"exact": 3}),
        line(page, "attention", 0.04, 0.06),
        line(page, "cmp_decode_fwd", 0.03, 0.03, kind="kernel"),
        line(page, "cudnn_sdpa, enable_gqa", 0.50, 0.64, kind="dense"),
        line(page, "cudnn_sdpa, heads of a group as rows", 0.40, 0.70, kind="dense"),
        line(page, "flash_sdpa, enable_gqa", None, None, kind="dense", reason="No available kernel | d"),
        line(page, "cudnn_sdpa, enable_gqa", 0.01, 0.01, kind="dense", problem=LONG.replace(batch=1)),
    ]


def test_a_step_is_compared_with_the_fastest_dense_line_of_its_problem(page: ModuleType) -> None:
    lines = made_lines(page)
    assert page.ratio(lines, lines[0], "graph") == pytest.approx(8.0)
    assert page.ratio(lines, lines[0], "eager", "cudnn_sdpa") == pytest.approx(8.0)
    assert page.ratio(lines, lines[1], "graph", "cudnn_sdpa") == pytest.approx(10.0)
    assert page.ratio(lines, lines[0], "graph", "flash_sdpa") is None
    assert page.ratio(lines, lines[2], "graph") is None and page.ratio(lines, lines[3], "graph") is None


def test_the_page_and_its_json_say_it_all(page: ModuleType) -> None:
    lines = made_lines(page)
    rows = tuple(r for one in lines for r in (one.graph, one.eager))
    rates = {"bfloat16": Rates(800.0, 3000.0)}
    facts = (GPU.to_dict(), "python benchmarks/decode.py", "2026-01-02T03:04:05+00:00", "0.1", 20, False)
    report = Report(*facts, rates, rows)
    text = page.markdown(report, lines, "Decode")
    step = next(part for part in text.splitlines() if part.startswith("| 8x64k |"))
    assert step.startswith("| 8x64k | 0.050 | 10.0 | 20% | 0.06 (met) | 0.080 | 55.0 | 0.400 (cudnn_sdpa, heads of a")
    assert step.endswith("| 8.00x | 8.00x |")
    assert "| step | 0.050 | 0.050..0.050 | 0.080 | 0.080..0.080 | 55.0 | 30.00 | 20% | 8.00x |  | exact |" in text
    assert "- flash_sdpa, enable_gqa, 8x64k, graph: No available kernel | d" in text
    assert "64 query heads, 4 kv heads, d 128, bfloat16" in text and "64 tokens a page" in text
    data = json.loads(json.dumps(page.to_dict(report, lines), allow_nan=False))
    assert "rows" not in data and len(data["lines"]) == 7
    first = data["lines"][0]
    assert (first["verdict"], first["bound_us"], first["graph"]["median_us"]) == ("met", 10.0, 50.0)
    assert first["speedup_over"]["graph"] == {"cudnn_sdpa": 8.0, "flash_sdpa": None}


# the calls


@pytest.mark.parametrize(
    ("phi", "cache_dtype", "head_major"),
    [
        ("mean", "problem", True),
        ("mlp", "problem", False),
        ("mean", "float8_e4m3fn", False),
        ("mlp", "float8_e4m3fn", True),
    ],
)
def test_our_calls_compute_what_they_say(calls: ModuleType, phi: str, cache_dtype: str, head_major: bool) -> None:
    problem = TINY.replace(cache_dtype=cache_dtype)
    filled, asked = calls.fill(problem, CPU, phi, head_major), FakeDispatcher(None, [])
    assert filled.pools.k_raw.data.is_contiguous() is not head_major
    before = [pages.data.clone() for pages in filled.pools.distinct()]
    out = filled.step(problem, asked)
    assert out.shape == (2, 1, 4, 16) and out.isfinite().all()
    changed = [
        (a.view(torch.uint8) != b.data.view(torch.uint8)).flatten(2).any(-1).sum().item()
        for a, b in zip(before, filled.pools.distinct(), strict=True)
    ]
    assert changed == [2, 2, 2, 2]  # a row of each sequence: k_cmp, v_cmp, k, v
    assert torch.equal(out, filled.attend(problem, asked)) and torch.equal(out, filled.step(problem, asked))
    kernels = Interpreted()
    for family in ("cmp_decode_fwd", "slc_win_decode_fwd"):
        call = calls.kernel_call(family, problem, filled, kernels)
        call()
        assert not filled.counters.any()
    torch.testing.assert_close(call.args[-1]["out"], out, rtol=1e-4, atol=1e-5)
    assert kernels.families == ["cmp_decode_fwd", "cmp_decode_fwd", "slc_win_decode_fwd"]


def test_dense_attention_is_the_same_however_it_gets_its_groups(calls: ModuleType, monkeypatch: PATCH) -> None:
    monkeypatch.setitem(SDPA_BACKENDS, "cudnn_sdpa", "MATH")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    q, k, v = calls.dense_tensors(TINY, CPU, calls.GROUPED)
    forms = {
        calls.GROUPED: (q, k, v),
        calls.ROWS: (q.view(2, 2, 2, 32), k, v),
        calls.EXPANDED: (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
    }
    out = [calls.dense_call("cudnn_sdpa", form, lambda form: forms[form]).reshape(2, 4, 1, 16) for form in forms]
    assert all(torch.allclose(one, out[0], atol=1e-5) for one in out)
    for form, (q, k, v) in forms.items():
        assert [x.shape for x in calls.dense_tensors(TINY, CPU, form)] == [q.shape, k.shape, v.shape]


def test_heads_are_repeated_only_for_a_library_that_takes_nothing_else(calls: ModuleType, monkeypatch: PATCH) -> None:
    def dense_call(provider: str, form: str, tensors: Any) -> None:
        if provider == "cudnn_sdpa" and form != calls.EXPANDED:
            raise RuntimeError("no groups here")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(calls, "dense_call", dense_call)
    bench = Bench(CPU, FakeClock(), lambda _: FakeDispatcher(None, []), rounds=5)
    names = [entry.work for entry in calls.dense_entries(TINY, bench)]
    forms = {name.partition(", ")[2] for name in names if name.startswith("cudnn")}
    assert forms == {calls.ROWS, calls.GROUPED, calls.EXPANDED} and len(names) == 5


# a whole run


@pytest.fixture
def on_a_gpu(decode: ModuleType, monkeypatch: PATCH) -> list[Any]:
    """A machine with one GPU, its clocks and kernels pretended; cuDNN is plain PyTorch, FlashAttention-2 is missing."""
    asked: list[Any] = []

    def dispatcher(source: object, locality: float | None = None) -> Dispatcher:
        return FakeDispatcher(locality, asked)

    pretend_a_gpu(monkeypatch, dispatcher)
    for name in ("check_device", "measure_rates"):
        monkeypatch.setattr(decode, name, getattr(bench_run, name))
    monkeypatch.setattr(decode, "HOST_CALLS", 1)
    monkeypatch.setattr(decode, "make_clock", lambda device, graph: FakeClock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setitem(SDPA_BACKENDS, "cudnn_sdpa", "MATH")
    monkeypatch.setitem(SDPA_BACKENDS, "flash_sdpa", "CUDNN_ATTENTION")
    return asked


SIZES = "--shapes 2x1k,1x100 --heads 4 --kv-heads 2 --d-qk 32 --d-v 16 --dtype fp32"
SMALL = [*SIZES.split(), "--untuned"]


def test_a_run_writes_its_page_and_json(decode: ModuleType, on_a_gpu: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert decode.main([*SMALL, "--rounds", "5", "--folder", str(folder)]) == 0
    text, data = sorted(folder.iterdir(), reverse=True)
    assert text.name.endswith("-h200-decode-untuned.md") and data.name == text.with_suffix(".json").name
    assert f"python benchmarks/decode.py {' '.join(SMALL)} --rounds 5" in text.read_text()
    lines = json.loads(data.read_text())["lines"]
    works = ["step", "append", "attention", "cmp_decode_fwd", "slc_win_decode_fwd"]
    for batch, length in ((2, 1024), (1, 100)):
        mine = [one for one in lines if (one["problem"]["batch"], one["problem"]["seq_k"]) == (batch, length)]
        assert [one["work"] for one in mine][:5] == works and len(mine) == 10
        for one in mine[:5]:
            assert one["graph"]["median_us"] and one["eager"]["median_us"] and one["host_us"] > 0
        assert mine[0]["speedup_over"]["graph"]["cudnn_sdpa"] == 1.0
        refused = [one for one in mine if one["work"].startswith("flash_sdpa")]
        assert len(refused) == 3 and all(one["graph"]["reason"] and one["host_us"] is None for one in refused)
    assert {family for family, _, _ in on_a_gpu} == {"cmp_decode_fwd", "slc_win_decode_fwd"}


def test_tuning_comes_first_and_into_a_database_of_its_own(
    decode: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(decode, "execute", lambda run: runs.append(run) or 1)
    monkeypatch.setattr(decode, "run", lambda plan, options, *_: (_ for _ in ()).throw(KeyError(options.db)))
    tuned = [*SMALL[:-1], "--tune", "2.5", "--folder", str(tmp_path)]
    with pytest.raises(KeyError, match=r"sqlite:///decode\.sqlite"):
        decode.main(tuned)
    (run,) = runs
    assert (run.policy, run.db, run.targets, run.budget.max_minutes) == (
        "graph-cold",
        "sqlite:///decode.sqlite",
        (),
        2.5,
    )
    assert [(spec.family, problem.batch, problem.seq_k, problem.seq_q) for spec, problem in run.work] == [
        ("cmp_decode_fwd", 2, 1024, 1),
        ("slc_win_decode_fwd", 2, 1024, 1),
        ("cmp_decode_fwd", 1, 100, 1),
        ("slc_win_decode_fwd", 1, 100, 1),
    ]
    monkeypatch.setattr(decode, "execute", lambda run: 130)
    with pytest.raises(KeyboardInterrupt):
        decode.main(tuned)


def test_what_of_ours_does_not_run_is_an_exit_code(
    decode: ModuleType, calls: ModuleType, on_a_gpu: list[Any], tmp_path: Path, monkeypatch: PATCH
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(calls, "decode_attention", refuse)
    assert decode.main([*SMALL, "--folder", str(tmp_path)]) == 1
    assert "step, 1x100, graph: out of registers" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "8*64k"), ("batch x length", "8*64k")),
        (("--shapes", "8x"), ("batch x length",)),
        (("--shapes", "8xk"), ("sequence lengths",)),
        (("--shapes", "0x64"), ("batch x length",)),
        (("--new", "9"), ("at most 8 tokens",)),
        (("--page-size", "48"), ("page_size",)),
        (("--d-qk", "40"), ("head dims",)),
        (("--rounds", "3"), ("at least 5 samples",)),
        (("--tune", "1", "--untuned"), ("--tune",)),
        ((), ("needs a CUDA GPU",)),
    ],
    ids=["times", "length", "seq", "batch", "new", "page", "dims", "rounds", "untuned", "no_gpu"],
)
def test_a_mistake_gets_a_sentence(
    decode: ModuleType, arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: PATCH, capsys: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert decode.main(arguments) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith("error: ") and all(word in err for word in words), err
