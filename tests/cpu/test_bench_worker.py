"""The worker outlives what variants do to its child, and blames the right one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu.bench_fakes import SMALL

from nsa_autotune.bench import failure
from nsa_autotune.bench.library import library_call
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.bench.session import MeasureSession, Timer, resources_of
from nsa_autotune.bench.worker import MeasureWorker, child_environment
from nsa_autotune.errors import InvalidConfig, InvalidInput, KernelError, UnknownName, WorkerError

TOOLCHAIN = "cpu.bench_fakes"
ONCE = Timer(rounds=1)
TESTS = str(Path(__file__).parents[1])
ENV = {"PYTHONPATH": TESTS, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasureWorker]:
    """One worker for the tests that need not start a child of their own."""
    env = {**ENV, "BENCH_FAKES_MARK": str(tmp_path_factory.mktemp("worker") / "mark")}
    with MeasureWorker("cpu", 60.0, env=env, toolchain=TOOLCHAIN) as shared:
        yield shared


@pytest.fixture
def one_crash_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second try: starting a child takes seconds."""
    monkeypatch.setattr("nsa_autotune.bench.worker.MAX_CRASHES", 1)


@pytest.fixture(scope="module")
def session() -> MeasureSession:
    """The same in this process."""
    return MeasureSession("cpu", TOOLCHAIN)


def alive(pid: int) -> bool:
    """True for a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pid: int) -> bool:
    """True once the process has ended, within ten seconds."""
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_a_right_variant_is_gated_and_timed(worker: MeasureWorker) -> None:
    result = worker.measure("fake_pool", SMALL, {"fault": "right"})
    assert (result.status, result.reason) == ("ok", "")
    assert result.median_us is not None and result.median_us > 0 and result.samples_us
    assert result.max_error is not None and 0 < result.max_error <= 2 * result.baseline_error + 0.01
    assert result == TrialResult.from_dict(result.to_dict())


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("row", "accuracy", "out: max error"),
        ("nan", "accuracy", "never written"),
        ("raise", "compile", "fake_pool.py.j2: no such instruction"),
        ("oom", "resource", "out of memory"),
        ("misspelt", "constraint", "fault='misspelt' is not one of"),
    ],
)
def test_failures_have_a_status_and_a_reason(session: MeasureSession, fault: str, status: str, words: str) -> None:
    (result,) = session.race("fake_pool", SMALL, [{"fault": fault}], ONCE)
    assert result is not None and (result.status, result.median_us) == (status, None)
    assert words in result.reason


def test_a_long_problem_is_gated_small_and_checked_by_rows(session: MeasureSession) -> None:
    long = SMALL.replace(batch=1, seq_q=1100, seq_k=1100, num_q_heads=1, num_kv_heads=1)
    stages: list[str] = []
    configs = [{"fault": "right"}, {"fault": "row"}]
    right, wrong = session.race(
        "fake_pool", long, configs, ONCE, lambda index, stage: stages.append(f"{index} {stage}")
    )
    assert right is not None and right.ok
    assert wrong is not None and wrong.status == "accuracy"
    first = ["problem", "render", "load", "inputs", "compile", "launch", "accuracy", "launch", "accuracy"]
    first += ["inputs", "compile", "launch", "accuracy"]
    assert stages[:13] == [f"0 {stage}" for stage in first]
    assert stages[-1] == "0 timing"


def test_an_error_that_only_shows_at_full_length_says_so(
    session: MeasureSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = SMALL.replace(batch=1, seq_q=1100, seq_k=1100, num_q_heads=1, num_kv_heads=1)
    monkeypatch.setattr("cpu.bench_fakes.spoil", lambda _, t: t["out"][0, -1].zero_() if t["out"].shape[1] > 520 else 0)
    (result,) = session.race("fake_pool", long, [{"fault": "right"}], ONCE)
    assert result is not None and result.status == "accuracy"
    assert result.reason.startswith("At full length, though not at 1031 tokens: out: ")


def test_a_library_goes_through_the_worker(worker: MeasureWorker) -> None:
    result = worker.measure_library("cudnn_sdpa", SMALL)
    assert result.status == "constraint" and "CUDA" in result.reason
    assert worker.child_pid is None  # torch.compile changes what Triton calls: nothing of ours is measured after it
    assert worker.measure_library("magic", SMALL).status in ("constraint", "runtime")


def test_garbage_on_standard_output_is_harmless(worker: MeasureWorker) -> None:
    assert worker.measure("fake_pool", SMALL, {"fault": "print"}).ok


@pytest.mark.usefixtures("one_crash_is_enough")
def test_exit_is_a_crash_and_the_next_variant_is_served(worker: MeasureWorker) -> None:
    result = worker.measure("fake_pool", SMALL, {"fault": "exit"})
    assert result.status == "crash"
    assert "In stage 'compile'" in result.reason and "exit code 3" in result.reason
    assert worker.measure("fake_pool", SMALL, {"fault": "right"}).ok


def test_a_killed_child_is_told_with_its_last_words_and_not_tried_a_third_time(worker: MeasureWorker) -> None:
    result = worker.measure("fake_pool", SMALL, {"fault": "kill"})
    assert result.status == "crash"
    assert "signal SIGKILL; it printed: last words" in result.reason
    assert worker.child_pid is None
    assert worker.measure("fake_pool", SMALL, {"fault": "kill"}) == result
    assert worker.child_pid is None, "no child was started"


def test_one_crash_is_forgiven(worker: MeasureWorker) -> None:
    assert worker.measure("fake_pool", SMALL, {"fault": "kill_once"}).ok


@pytest.mark.usefixtures("one_crash_is_enough")
def test_what_a_crashed_child_started_ends_with_it(worker: MeasureWorker) -> None:
    result = worker.measure("fake_pool", SMALL, {"fault": "orphan"})
    assert result.status == "crash"
    assert gone_soon(int(result.reason.split("sleeper ")[1].rstrip(".")))


@pytest.mark.usefixtures("one_crash_is_enough")
def test_in_a_race_only_the_crashing_variant_fails(worker: MeasureWorker) -> None:
    faults = ["right", "late_kill", "row", "right"]
    results = worker.race("fake_pool", SMALL, [{"fault": fault} for fault in faults], rounds=2)
    assert [result.status for result in results] == ["ok", "crash", "accuracy", "ok"]
    assert "In stage 'timing'" in results[1].reason


def test_a_lost_context_costs_one_trial_and_the_child(worker: MeasureWorker) -> None:
    worker.measure("fake_pool", SMALL, {"fault": "right"})
    before = worker.child_pid
    results = worker.race("fake_pool", SMALL, [{"fault": "illegal"}, {"fault": "right"}], rounds=2)
    assert [result.status for result in results] == ["runtime", "ok"]
    assert "illegal memory access" in results[0].reason
    assert worker.child_pid != before


def test_a_hang_ends_by_timeout(worker: MeasureWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.measure("fake_pool", SMALL, {"fault": "right"}).ok
    monkeypatch.setattr(worker, "timeout_s", 1.0)
    child = worker.child_pid
    assert child is not None
    result = worker.measure("fake_pool", SMALL, {"fault": "hang"})
    assert result.status == "timeout"
    assert result.reason == "In stage 'compile': no answer within 1 s."
    assert not alive(child) and worker.child_pid is None


def test_ctrl_c_ends_the_child() -> None:
    worker = MeasureWorker("cpu", 60.0, env=ENV, toolchain=TOOLCHAIN)
    worker.measure("fake_pool", SMALL, {"fault": "right"})
    child = worker.child_pid
    assert child is not None and os.getsid(child) == child != os.getsid(0)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.measure("fake_pool", SMALL, {"fault": "hang"})
    assert not alive(child) and worker.child_pid is None
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_the_child_ends_with_its_parent() -> None:
    script = (
        "from cpu.bench_fakes import SMALL\n"
        "from nsa_autotune.bench.worker import MeasureWorker\n"
        "import os\n"
        f"worker = MeasureWorker('cpu', 60.0, toolchain={TOOLCHAIN!r})\n"
        "worker.measure('fake_pool', SMALL, {'fault': 'misspelt'})\n"
        "print(worker.child_pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = child_environment(os.environ, "cpu", ENV)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    assert gone_soon(int(done.stdout))


def test_a_child_that_cannot_start_is_told() -> None:
    with (
        MeasureWorker("cpu", 60.0, env=ENV, toolchain="cpu.no_such_module") as worker,
        pytest.raises(WorkerError, match="no_such_module"),
    ):
        worker.measure("fake_pool", SMALL, {"fault": "right"})


def test_no_configs_need_no_child() -> None:
    with MeasureWorker("cpu", toolchain=TOOLCHAIN) as worker:
        assert worker.race("fake_pool", SMALL, []) == []
        assert worker.child_pid is None


@pytest.mark.parametrize(
    ("device", "changes", "interpret"),
    [("cpu", {}, "1"), ("cuda:0", {}, None), ("cuda:0", {"TRITON_INTERPRET": "1"}, "1")],
)
def test_only_a_cpu_child_interprets(device: str, changes: dict[str, str], interpret: str | None) -> None:
    env = child_environment({"TRITON_INTERPRET": "1", "PYTHONPATH": "there"}, device, changes)
    assert env.get("TRITON_INTERPRET") == interpret
    paths = env["PYTHONPATH"].split(os.pathsep)
    assert (Path(paths[0]) / "nsa_autotune").is_dir() and paths[-1] == "there"


def _chained(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


class OutOfResources(Exception):
    """Named like Triton's."""


class CompilationError(Exception):
    """Named like Triton's."""


@pytest.mark.parametrize(
    ("error", "stage", "status"),
    [
        (InvalidConfig("no"), "problem", "constraint"),
        (InvalidConfig("no"), "timing", "runtime"),
        (ValueError("no"), "render", "render"),
        (SyntaxError("no"), "load", "render"),
        (CompilationError("no"), "compile", "compile"),
        (OutOfResources("shared memory"), "compile", "resource"),
        (_chained(KernelError("told"), OutOfResources("registers")), "compile", "resource"),
        (RuntimeError("PassManager::run failed"), "compile", "compile"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "compile", "runtime"),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), "compile", "runtime"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "inputs", "resource"),
        (RuntimeError("odd"), "accuracy", "runtime"),
    ],
    ids=lambda value: str(value).replace(" ", "_")[:30],
)
def test_exceptions_are_classified(error: Exception, stage: str, status: str) -> None:
    assert failure.classify(error, stage) == status


def test_only_context_killers_are_sticky() -> None:
    assert failure.is_sticky(RuntimeError("CUDA error: device-side assert triggered"))
    assert failure.is_sticky(_chained(KernelError("x"), RuntimeError("CUDA error: misaligned address")))
    assert not failure.is_sticky(RuntimeError("CUDA out of memory"))


def test_a_result_has_a_known_status_and_no_infinities() -> None:
    with pytest.raises(InvalidInput, match="status"):
        TrialResult("fine")  # type: ignore[arg-type]
    assert TrialResult("accuracy", max_error=float("inf")).to_dict()["max_error"] is None


def test_resources_are_the_largest_of_all_kernels() -> None:
    class Compiled:
        """What Triton's compiled kernels tell."""

        def __init__(self, registers: int, words: int, shared: int) -> None:
            self.n_regs, self.n_spills = registers, words
            self.metadata = type("Metadata", (), {"shared": shared, "num_warps": 4})

    found = resources_of([Compiled(64, 2, 100), Compiled(255, 0, 50)])
    assert found == {"registers": 255, "spill_bytes": 8, "shared_bytes": 100, "num_warps": 4}
    assert resources_of([None]) is None and resources_of(None) is None


@pytest.mark.parametrize("provider", ["cudnn_sdpa", "flash_sdpa", "flex_attention"])
def test_a_library_that_cannot_serve_says_why(provider: str) -> None:
    call, reason = library_call(provider, SMALL, "cpu")
    assert call is None and "CUDA" in reason
    assert "batched" in library_call(provider, SMALL.replace(layout="packed"), "cuda")[1]
    if provider != "flex_attention":
        assert "seq_q = seq_k" in library_call(provider, SMALL.replace(seq_q=3), "cuda")[1]


def test_an_unknown_library_is_told_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="cudnn_sdpa, flash_sdpa, flex_attention"):
        library_call("magic", SMALL, "cpu")
