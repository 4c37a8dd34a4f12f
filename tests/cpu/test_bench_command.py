"""`nsa-autotune bench`: what it computes from times, how it prints them, and a whole run on a pretended GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nsa_autotune import reference
from nsa_autotune.bench.timing import Fn
from nsa_autotune.cli import bench_entries, bench_run
from nsa_autotune.cli.app import main
from nsa_autotune.cli.bench import plan_work
from nsa_autotune.cli.bench_entries import Bench, Entry, Work
from nsa_autotune.cli.bench_report import COLUMNS, GIVEN_BLOCKS, Rates, Report, Row, cells, mark_ms, markdown
from nsa_autotune.config import NSAConfig
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import Fingerprint, for_target
from nsa_autotune.dispatch.ladder import Step
from nsa_autotune.errors import InvalidProblem, KernelError
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import Cost, KernelSpec, Problem

ROOT = Path(__file__).parents[2]
H100 = Problem(seq_q=65536, seq_k=65536, locality=0.0)
SMALL = Problem(
    seq_q=96,
    seq_k=96,
    num_q_heads=4,
    num_kv_heads=2,
    d_qk=32,
    d_v=16,
    dtype="float32",
    phi_hidden=16,
    nsa=NSAConfig(16, 8, 16, num_selected=4, window_size=32),  # 6 blocks, of which a token freely chooses one
)
GPU = Fingerprint("NVIDIA H200", "9.0", "570.1", "13.0", "2.11", "3.6")


class FakeClock:
    """Runs each call once, and says it took 2 ms, and 0.1 ms more with every sample."""

    def __init__(self) -> None:
        self.samples: dict[Fn, int] = {}

    def elapsed_us(self, fn: Fn, launches: int, cold_l2: bool) -> float:
        if fn not in self.samples:
            self.samples[fn] = 0
            fn()
        if not cold_l2:
            return 30_000.0
        self.samples[fn] += 1
        return 1900.0 + 100.0 * self.samples[fn]


class FakeDispatcher(Dispatcher):
    """Launches nothing; remembers what was asked for."""

    def __init__(self, locality: float | None, asked: list[tuple[str, Problem, dict[str, Any]]]) -> None:
        super().__init__(None, locality=0.8 if locality is None else locality)
        self._asked = asked

    def launch(
        self, spec: KernelSpec, shape: Hashable, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        self._asked.append((spec.family, problem(), tensors))
        if shape in self._plans:
            return
        self._plans[shape] = len
        self.stats[Step.EXACT if spec.family == "win_attn_fwd" else Step.DEFAULT] += 1


@pytest.fixture
def asked() -> list[tuple[str, Problem, dict[str, Any]]]:
    return []


@pytest.fixture
def bench(asked: list[tuple[str, Problem, dict[str, Any]]]) -> Bench:
    return Bench(torch.device("cpu"), FakeClock(), lambda locality: FakeDispatcher(locality, asked), rounds=5)


def make_row(**changes: Any) -> Row:
    row = Row(
        work="cmp_attn_fwd",
        kind="branch",
        problem=H100,
        locality=None,
        flops=4e12,
        bytes_moved=2e9,
        served={"exact": 1},
        samples_us=(9000.0, 10_000.0, 11_000.0),
        median_us=10_000.0,
        p20_us=9400.0,
        p80_us=10_600.0,
    )
    return replace(row, **changes)


def make_report(*rows: Row) -> Report:
    rates = {"bfloat16": Rates(tflops=800.0, gbps=4000.0)}
    return Report(GPU.to_dict(), "nsa-autotune bench", "2026-01-02T03:04:05+00:00", "0.1.0", 20, False, rates, rows)


def by_column(report: Report, row: Row) -> dict[str, object]:
    return dict(zip(COLUMNS, cells(report, row), strict=True))


def test_rates_and_share_where_arithmetic_is_the_roof() -> None:
    row = make_row()  # 4e12 operations at 800 TFLOP/s take 5 ms of 10; 2e9 bytes at 4000 GB/s only 0.5 ms
    line = by_column(make_report(row), row)
    assert line["TFLOP/s"] == pytest.approx(400.0)
    assert line["GB/s"] == pytest.approx(200.0)
    assert line["roofline"] == "50%"
    assert (line["ms"], line["p20..p80"], line["seq"]) == ("10.00", "9.400..10.60", "64k")


def test_share_where_memory_is_the_roof() -> None:
    row = make_row(flops=1e9, bytes_moved=8e9, median_us=2500.0)  # 2 ms of 2.5
    assert make_report(row).share(row) == pytest.approx(0.8)


def test_a_whole_forward_is_compared_with_dense_attention_on_the_same_problem_only() -> None:
    whole = make_row(work="whole", kind="whole", median_us=40_000.0)
    other = make_row(work="whole", kind="whole", problem=H100.replace(seq_q=8192, seq_k=8192), median_us=1000.0)
    dense = make_row(work="cudnn_sdpa", kind="dense", median_us=120_000.0)
    refused = make_row(work="flash_sdpa", kind="dense", median_us=None, reason="d_qk and d_v differ")
    report = make_report(dense, whole, other, refused)
    assert report.speedup(whole, "cudnn_sdpa") == pytest.approx(3.0)
    assert report.speedup(other, "cudnn_sdpa") is None
    assert report.speedup(whole, "flash_sdpa") is None
    assert report.speedup(dense, "cudnn_sdpa") is None
    assert by_column(report, whole)["vs cuDNN"] == "3.00x"


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        (make_row(median_us=8_000.0), "8 (met)"),
        (make_row(median_us=8_001.0), "8 (not met)"),
        (make_row(work="slc_select_fwd", median_us=7_000.0), "7 (met)"),
        (make_row(work="slc_attn_fwd", locality=0.0, median_us=14_000.0), "14 (met)"),
        (make_row(work="slc_attn_fwd", locality=0.8, median_us=14_000.0), "6.5 (not met)"),
        (make_row(work="slc_attn_fwd", locality=0.5), ""),
        (make_row(work="win_attn_fwd"), "2.8 (not met)"),
        (make_row(work=GIVEN_BLOCKS, kind="whole", locality=0.8, median_us=25_000.0), "25 (met)"),
        (make_row(work=GIVEN_BLOCKS, kind="whole", locality=0.8, median_us=None), "25 (not measured)"),
        (make_row(work=GIVEN_BLOCKS, kind="whole", locality=0.0), ""),
        (make_row(work="cudnn_sdpa", kind="dense"), ""),
        (make_row(problem=H100.replace(seq_q=32768, seq_k=32768)), "2.4 (not met)"),
        (make_row(problem=H100.replace(seq_q=32768)), ""),
        (make_row(problem=H100.replace(num_kv_heads=8)), ""),
        (make_row(problem=H100.replace(nsa=NSAConfig(num_selected=8))), ""),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.work}-{value.locality}-{value.median_us}",
)
def test_marks(row: Row, mark: str) -> None:
    assert by_column(make_report(row), row)["mark ms"] == mark
    assert (mark_ms(row) is None) == (mark == "")


def test_what_does_not_run_keeps_its_line_and_its_reason() -> None:
    dense = make_row(work="flash_sdpa", kind="dense", median_us=None, reason="d_qk [and] d_v differ")
    ours = make_row(median_us=None, reason="out of memory")
    report = make_report(dense, ours)
    assert (dense.failed, ours.failed, make_row().failed) == (False, True, False)
    line = by_column(report, dense)
    assert (line["ms"], line["served"]) == ("", "not measured")
    assert "flash_sdpa, 64k" in markdown(report, "t") and "d_qk [and] d_v differ" in markdown(report, "t")


def test_the_json_has_every_fact_and_sample() -> None:
    whole = make_row(work="whole", kind="whole", served={"exact": 5, "nearest": 1})
    dense = make_row(work="cudnn_sdpa", kind="dense", served={}, median_us=25_000.0)
    data = json.loads(json.dumps(make_report(whole, dense).to_dict(), allow_nan=False))
    assert data["fingerprint"] == GPU.to_dict()
    assert data["rates"] == {"bfloat16": {"tflops": 800.0, "gbps": 4000.0}}
    assert (data["schema"], data["command"], data["untuned"]) == (1, "nsa-autotune bench", False)
    row = data["rows"][0]
    assert row["samples_us"] == [9000.0, 10_000.0, 11_000.0]
    assert (row["median_us"], row["p20_us"], row["p80_us"]) == (10_000.0, 9400.0, 10_600.0)
    assert row["speedup_over"] == {"cudnn_sdpa": 2.5, "flash_sdpa": None}
    assert (row["tflops"], row["gbps"], row["roofline_share"]) == (400.0, 200.0, 0.5)
    assert row["served"] == {"exact": 5, "nearest": 1}
    assert Problem.from_dict(row["problem"]) == H100


def test_the_page_names_gpu_versions_command_and_has_a_table_for_each_shape() -> None:
    wide = make_row(problem=H100.replace(d_qk=192), served={"exact": 5, "nearest": 1})
    text = markdown(make_report(make_row(), wide), "Forward")
    lines = text.splitlines()
    assert lines[0] == "# Forward"
    assert all(
        fact in text for fact in ("NVIDIA H200", "570.1, 13.0", "2.11, 3.6", "nsa-autotune bench", "800 TFLOP/s")
    )
    assert sum(line.startswith("| work | seq |") for line in lines) == 2
    assert any(line.startswith("## ") and "d 128, bfloat16" in line for line in lines)
    assert any(line.startswith("## ") and "d 192/128, bfloat16" in line for line in lines)
    assert "| cmp_attn_fwd | 64k |  | 10.00 | 9.400..10.60 | 400 | 200 | 50% | exact |  |  | 8 (not met) |" in lines
    assert "5 exact, 1 nearest" in text
    widths = {line.count("|") for line in lines if line.startswith(("| cmp", "| work"))}
    assert widths == {len(COLUMNS) + 1}


def test_rates_are_operations_and_bytes_over_the_median(bench: Bench) -> None:
    rates = bench_run.measure_rates(bench, "float32", width=64, copy_bytes=1 << 20)
    assert rates.tflops == pytest.approx(2 * 64**3 / 2200e-6 / 1e12)  # the median of 2.0, 2.1 .. 2.4 ms
    assert rates.gbps == pytest.approx(2 * (1 << 20) / 2200e-6 / 1e9)


def test_a_dense_triangle_costs_what_counting_says() -> None:
    problem = SMALL.replace(seq_q=3, seq_k=3, batch=2)
    cost = bench_entries.dense_cost(problem)
    pairs = 2 * (1 + 2 + 3)
    assert cost.flops == 2 * pairs * 4 * (32 + 16)
    assert cost.bytes_moved == 4 * 2 * 3 * (4 * (32 + 16) + 2 * (32 + 16))


def test_keys_and_values_are_two_launches_of_one_line(bench: Bench, asked: list[Any]) -> None:
    spec = get_spec("cmp_pool_fwd")
    (entry,) = bench_entries.branch_entries(spec, Work(SMALL, (0.0, 0.8)), bench)
    entry.prepare()()
    assert [(p.d_qk, tensors["x"].shape[-1]) for _, p, tensors in asked] == [(32, 32), (16, 16)]
    parts = [spec.cost(p, spec.default_config(p)) for _, p, _ in asked]
    assert entry.cost == Cost(sum(c.flops for c in parts), sum(c.bytes_moved for c in parts))


def test_a_run_has_a_line_for_every_kernel_whole_forward_and_library(bench: Bench, asked: list[Any]) -> None:
    rows = list(bench_run.measure(Work(SMALL, (0.0, 0.8)), bench))
    lines = [(row.work.split(",")[0], row.locality) for row in rows]
    kernels = [line for line in lines if line[0] in all_specs()]
    whole = {name: spec for name, spec in all_specs().items() if "batched" in spec.layouts}
    local = {name for name, spec in whole.items() if "locality" in spec.problem_fields}
    assert local == {"slc_attn_fwd", "slc_attn_bwd_dq", "slc_attn_bwd_dkv"}
    assert set(kernels) == {(n, x) for n in whole for x in ((0.0, 0.8) if n in local else (None,))}
    assert len(kernels) == len(set(kernels))
    assert lines[-5:] == [*[("whole forward", x) for x in (None, 0.0, 0.8)], ("cudnn_sdpa", None), ("flash_sdpa", None)]
    ours = [row for row in rows if row.kind != "dense"]
    assert all(row.median_us == pytest.approx(2200.0) and len(row.samples_us) == 5 for row in ours), ours
    assert all(row.problem == SMALL for row in rows)
    served = {row.work: dict(row.served) for row in rows}
    assert served["win_attn_fwd"] == {"exact": 1} and served["gate_sum_fwd"] == {"default": 1}
    assert [(row.median_us, "CUDA devices only" in row.reason) for row in rows[-2:]] == [(None, True)] * 2
    localities = [p.locality for family, p, _ in asked if family == "slc_attn_fwd"]
    assert set(localities) == {0.0, 0.8}


def test_the_whole_forward_costs_what_its_kernels_cost(bench: Bench) -> None:
    rows = list(bench_run.measure(Work(SMALL, (0.8,)), bench))
    instead = ("cmp_mlp", "win_sum")  # of the mean; of the window and the gated sum
    kernels = [row for row in rows if row.kind == "branch" and not row.work.startswith(instead)]
    branches = [row for row in kernels if "_fwd" in row.work]
    whole = next(row for row in rows if row.kind == "whole")
    assert whole.flops == sum(row.flops for row in branches)
    assert whole.bytes_moved == sum(row.bytes_moved for row in branches)


def test_whole_forwards_compute_the_equations(bench: Bench) -> None:
    end_to_end, given = bench_entries.whole_entries(Work(SMALL, (0.8,)), bench)
    q, k, v, gates = bench_entries._forward_tensors(SMALL, bench.device)
    k_cmp, v_cmp = (reference.compress_mean(x, SMALL.nsa) for x in (k, v))
    expected = reference.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, SMALL.nsa)
    torch.testing.assert_close(end_to_end.prepare()(), expected)

    blocks = bench_entries._blocks(SMALL.replace(locality=0.8), bench.device)
    o_slc, _ = reference.selected_attention(q, k, v, blocks, SMALL.nsa)
    o_cmp, _ = reference.compressed_attention(q, k_cmp, v_cmp, SMALL.nsa, seq_k=96)
    o_win, _ = reference.window_attention(q, k, v, SMALL.nsa)
    with_given = given.prepare()()
    torch.testing.assert_close(with_given, reference.combine(gates, o_cmp, o_slc, o_win))
    assert not torch.allclose(with_given, expected), "the given blocks must differ from those selected"


def test_real_kernels_run_through_the_dispatcher_in_the_interpreter() -> None:
    here = for_target("cuda:90")
    bench = Bench(torch.device("cpu"), FakeClock(), lambda _: Dispatcher(None, fingerprint=here), rounds=5)
    for family in ("cmp_pool_fwd", "win_attn_fwd"):
        (entry,) = bench_entries.branch_entries(get_spec(family), Work(SMALL, (0.0,)), bench)
        (row,) = bench_run.time_group([entry], bench)
        assert (row.reason, row.median_us) == ("", pytest.approx(2200.0))
        assert row.served == {"default": len(set(bench_entries.launches(get_spec(family), SMALL)))}


def failing(error: Exception) -> Entry:
    def prepare() -> Fn:
        raise error

    return Entry("broken", "branch", SMALL, None, Cost(1.0, 1.0), prepare)


def test_one_line_that_fails_leaves_the_others(bench: Bench) -> None:
    good = Entry("good", "branch", SMALL, None, Cost(1.0, 1.0), lambda: lambda: None)
    rows = bench_run.time_group([failing(RuntimeError("CUDA out of memory\nmore")), good], bench)
    assert [(row.work, row.reason, row.median_us is None) for row in rows] == [
        ("broken", "CUDA out of memory", True),
        ("good", "", False),
    ]


def test_a_lost_gpu_ends_the_run_with_a_sentence(bench: Bench) -> None:
    with pytest.raises(KernelError, match="no longer answers"):
        bench_run.time_group([failing(RuntimeError("CUDA error: an illegal memory access was encountered"))], bench)


@pytest.mark.parametrize(
    "changes",
    [{"seq_q": 15, "seq_k": 15}, {"d_qk": 100}, {"layout": "packed"}, {"phi_hidden": 48}],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_what_no_kernel_serves_is_refused_before_anything_is_measured(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem):
        bench_run.check_plan([Work(SMALL, (0.0,)), Work(SMALL.replace(**changes), (0.0,))])


def test_warnings_come_once_and_the_filter_goes(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("nsa_autotune")
    with bench_run.each_warning_once(silent=False):
        for _ in range(3):
            logger.warning("serving the %s", "default")
    with bench_run.each_warning_once(silent=True):
        logger.warning("not wanted")
    logger.warning("serving the %s", "default")
    assert [record.getMessage() for record in caplog.records] == ["serving the default"] * 2


def test_a_plan_gathers_the_localities_of_a_problem() -> None:
    problems = [H100.replace(seq_q=t, seq_k=t, locality=x) for t in (8192, 65536) for x in (0.0, 0.8, 0.8)]
    assert plan_work(problems) == [Work(H100.replace(seq_q=8192, seq_k=8192), (0.0, 0.8)), Work(H100, (0.0, 0.8))]


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("needs a CUDA GPU", "nsa-autotune tune --target cuda:90")),
        (("--preset", "gqa16"), ("preset", "gqa16-d128")),
        (("--locality", "2"), ("locality must be in [0, 1)",)),
        (("--out", "/nowhere/at/all.json"), ("cannot be written", "/nowhere/at/all.json")),
    ],
    ids=["no_gpu", "preset", "locality", "out"],
)
def test_a_mistake_gets_a_sentence(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(("bench", *arguments)) == 2
    err = flat(capsys.readouterr().err)
    assert err.startswith("error: ") and all(word in err for word in words), err


def pretend_a_gpu(patch: pytest.MonkeyPatch, dispatcher: Callable[..., Dispatcher]) -> None:
    """A machine with one GPU: device, clock and fingerprint."""
    patch.setattr(bench_run, "check_device", lambda name: torch.device("cpu"))
    patch.setattr(bench_run, "make_clock", lambda device: FakeClock())
    patch.setattr(bench_run, "measure_rates", lambda bench, dtype: Rates(1.0, 1.0))
    patch.setattr(bench_run, "current", lambda device: GPU)
    patch.setattr(bench_run, "Dispatcher", dispatcher)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> list[TuningStore | None]:
    """A machine with one GPU, its clock, kernels and fingerprint pretended; returns the sources of its dispatchers."""
    sources: list[TuningStore | None] = []

    def dispatcher(source: TuningStore | None, locality: float | None = None) -> FakeDispatcher:
        sources.append(source)
        return FakeDispatcher(locality, asked)

    pretend_a_gpu(monkeypatch, dispatcher)
    return sources


COMMAND = ("--preset", "tiny", "--seq", "64,96", "--dtype", "fp32", "--locality", "0.5")


def test_the_command_prints_tables_and_writes_json(
    on_a_gpu: list[TuningStore | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    assert main(("bench", *COMMAND, "--untuned", "--rounds", "6", "--out", str(path))) == 0
    captured = capsys.readouterr()
    assert all(text in captured.out for text in ("NVIDIA H200", "slc_select_fwd", "whole forward", "default configs"))
    assert "not measured: flash_sdpa, 96" in flat(captured.err)
    data = json.loads(path.read_text())
    assert data["command"] == (
        f"nsa-autotune bench --preset tiny --seq 64,96 --dtype fp32 --locality 0.5 --untuned --rounds 6 --out {path}"
    )
    assert {row["seq"] for row in data["rows"]} == {64, 96}
    assert {len(row["samples_us"]) for row in data["rows"] if row["kind"] != "dense"} == {6}
    assert set(on_a_gpu) == {None}


def test_without_untuned_the_database_is_asked(on_a_gpu: list[TuningStore | None], tmp_path: Path) -> None:
    TuningStore(f"sqlite:///{tmp_path / 'tuning.sqlite'}").close()
    assert main(("bench", *COMMAND, "--seq", "64", "--db", f"sqlite:///{tmp_path / 'tuning.sqlite'}")) == 0
    assert on_a_gpu and all(isinstance(source, TuningStore) for source in on_a_gpu)


def test_a_kernel_that_does_not_run_is_an_exit_code(
    on_a_gpu: list[TuningStore | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(self: Dispatcher, spec: KernelSpec, *_: object) -> None:
        if spec.family == "gate_sum_fwd":
            raise KernelError("gate_sum_fwd failed: no registers left")

    monkeypatch.setattr(FakeDispatcher, "launch", launch)
    assert main(("bench", *COMMAND, "--seq", "64", "--untuned")) == 1
    assert "gate_sum_fwd failed: no registers left" in flat(capsys.readouterr().err)


@pytest.fixture(scope="module")
def forward() -> ModuleType:
    """benchmarks/forward.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmarks_forward", ROOT / "benchmarks" / "forward.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_a_dated_page_and_its_json(
    forward: ModuleType, on_a_gpu: list[TuningStore | None], tmp_path: Path
) -> None:
    arguments = ["--preset", "tiny", "--seq", "64", "--untuned", "--module", "--hidden-size", "32"]
    folder = tmp_path / "made" / "on the way"
    assert forward.main([*arguments, "--folder", str(folder)]) == 0
    page, data = sorted(folder.iterdir(), reverse=True)
    assert page.name.endswith("-h200-forward.md") and data.name == page.with_suffix(".json").name
    assert "python benchmarks/forward.py --preset tiny --seq 64 --untuned --module --hidden-size 32" in page.read_text()
    (row,) = [row for row in json.loads(data.read_text())["rows"] if row["kind"] == "module"]
    assert (
        row["served"] == {} and row["median_us"] == pytest.approx(2950.0) and row["speedup_over"]["cudnn_sdpa"] is None
    )


def test_a_page_of_other_dtypes_says_so_in_its_name(
    forward: ModuleType, on_a_gpu: list[TuningStore | None], tmp_path: Path
) -> None:
    arguments = ["--preset", "tiny", "--seq", "64", "--untuned", "--dtype", "bfloat16,float32"]
    assert forward.main([*arguments, "--folder", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*-h200-forward-bfloat16-float32.json")
    found = json.loads(data.read_text())
    dtypes = [row["problem"]["dtype"] for row in found["rows"]]
    assert list(found["rates"]) == ["bfloat16", "float32"] and dtypes.count("float32") == dtypes.count("bfloat16") > 0


def test_the_module_costs_its_projections_too(forward: ModuleType) -> None:
    cost, inner = forward.module_cost(SMALL, 10), bench_entries.cost_of(forward.MLP_FORWARD, SMALL)
    columns = 4 * 32 + 3 * 2 * 32 + 3 * 2 * 16 + 4 * 3 + 4 * 16  # q, keys, values, gates, output
    assert cost.flops - inner.flops == 2 * 96 * 10 * columns


@pytest.mark.parametrize(
    ("gpu", "slug"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("AMD (x)", "amd-x")]
)
def test_gpu_names_in_file_names(forward: ModuleType, gpu: str, slug: str) -> None:
    assert forward.gpu_slug(gpu) == slug
