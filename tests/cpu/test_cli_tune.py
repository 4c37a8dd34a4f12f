"""`nsa-autotune tune`: what it plans, how it divides a budget, and a whole run on a pretended GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.cli import tune as tune_command
from nsa_autotune.cli import tune_report, tune_run
from nsa_autotune.cli.app import main
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.budget import NAMED_BUDGETS, Budget
from nsa_autotune.spec import Config, KernelSpec, Problem

FINGERPRINT = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
COMMAND = ("tune", "--families", "gate_sum_fwd", "--seq", "1k,2k", "--trials", "6", "--jobs", "1")


class FakeWorker:
    """Times a config by a formula: BLOCK=512 with 2 warps is best; 8 warps crash."""

    fail_all = False
    interrupt_after: int | None = None
    renewed = 0

    def renew(self) -> None:
        type(self).renewed += 1

    def __init__(self, device: str, policy: str = "eager-cold", **options: object) -> None:
        self.num_measured, self.policy = 0, policy

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        self.num_measured += 1
        if self.interrupt_after is not None and self.num_measured > self.interrupt_after:
            raise KeyboardInterrupt
        if self.fail_all or config["num_warps"] == 8:
            return TrialResult("crash", "it died")
        time_us = 10.0 + abs(int(config["BLOCK"]) - 512) / 512 + abs(int(config["num_warps"]) - 2)
        return TrialResult("ok", "", (time_us,), time_us, time_us, time_us)

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        return [self.measure(family, problem, config) for config in configs]

    def measure_library(self, provider: str, problem: Problem) -> TrialResult:
        return TrialResult("ok", "", (20.0,), 20.0, 20.0, 20.0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """A machine with a GPU, its worker and its fingerprint pretended."""

    class Worker(FakeWorker):
        pass

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("nsa_autotune.bench.worker.MeasureWorker", Worker)
    fingerprint = Fingerprint(**FINGERPRINT)
    monkeypatch.setattr("nsa_autotune.dispatch.fingerprint.current", lambda device: fingerprint)
    return Worker


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tuning.sqlite'}"


@pytest.mark.usefixtures("nothing_shipped")
def test_a_run_stores_winners_and_prints_them(
    on_a_gpu: type[FakeWorker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--db", url]) == 0
    captured = capsys.readouterr()
    assert "winners" in captured.out and "gate_sum_fwd" in captured.out
    with TuningStore(url) as store:
        winners, trials = store.winners(gpu="Test GPU"), store.trials(stage="search")
    assert {w.problem["seq_k"] for w in winners} == {1024, 2048}
    assert 6 <= len(trials) <= 12
    for winner in winners:
        assert f"{winner.median_us:.4g}" in captured.out
        assert winner.default_median_us is not None and winner.median_us <= winner.default_median_us

    assert main([*COMMAND, "--db", url]) == 0
    assert "known" in capsys.readouterr().err
    with TuningStore(url) as store:
        assert len(store.trials(stage="search")) == len(trials), "a tuned problem is not tuned again"


@pytest.mark.usefixtures("nothing_shipped")
def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(
    on_a_gpu: type[FakeWorker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu.interrupt_after = 3
    assert main([*COMMAND, "--db", url]) == 130
    err = " ".join(capsys.readouterr().err.split())
    assert "everything measured is kept" in err and "tuning.sqlite" in err and "the same command resumes" in err
    with TuningStore(url) as store:
        assert len(store.trials()) == 3
        assert store.winners(gpu="Test GPU") == []

    on_a_gpu.interrupt_after = None
    assert main([*COMMAND, "--db", url]) == 0
    with TuningStore(url) as store:
        assert len(store.winners(gpu="Test GPU")) == 2
        configs = [str(t.config) for t in store.trials(stage="search") if t.problem["seq_k"] == 1024]
    assert len(configs) == len(set(configs)) == 6, "the three trials of the first call count"


def test_what_is_left_is_told_with_the_reason() -> None:
    from nsa_autotune.cli.progress import outcome_lines
    from nsa_autotune.search.progress import Outcome

    def line(kind: str, *statuses: tuple[str, int]) -> str:
        outcome = Outcome(kind, get_spec("gate_sum_fwd"), Problem(), statuses=statuses, left=59)  # type: ignore[arg-type]
        return outcome_lines(outcome)[0].partition(": ")[2]

    goes_on = "the same command goes on"
    assert line("interrupted") == f"interrupted, 59 configs left when it was interrupted: {goes_on}"
    assert line("predicted", ("ok", 1)) == f"predicted [1 ok], 59 configs left when the minutes were spent: {goes_on}"
    slow = line("predicted", ("timeout", 1))
    assert slow == f"no config works [1 timeout], 59 configs left when the minutes were spent: {goes_on}"


def test_a_new_database_is_told_once(
    on_a_gpu: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo" / "tuning.sqlite"
    for said in (1, 0):
        assert main([*COMMAND, "--db", str(path)]) == 0
        assert capsys.readouterr().err.count(f"made a new database: {path}\n") == said


class FakeInterpreter:
    """Counts what it checks; Ctrl-C comes with the check after `last`."""

    def __init__(self, last: int = 1000) -> None:
        self.last, self.asked = last, 0

    def __enter__(self) -> FakeInterpreter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        if self.asked == self.last:
            raise KeyboardInterrupt
        self.asked += 1
        return TrialResult("accuracy", "wrong") if config.get("use_tma") else TrialResult("ok", "")


def test_what_was_right_in_the_interpreter_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_autotune.search import interpret

    monkeypatch.setenv("NSA_AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nsa_autotune.search.predict.predict_problem", predict_nothing_measured([], [object()]))
    monkeypatch.setattr(tune_run, "print_predictions", lambda guesses: True)
    planned = [
        config
        for family in ("win_attn_fwd", "gate_sum_fwd")
        for _, config in interpret.planned_checks(get_spec(family), max_cases=1)
    ]
    wrong = sum(bool(config.get("use_tma")) for config in planned)
    assert wrong and len(planned) > 3

    def run(last: int = 1000, *more: str) -> tuple[int, int, str]:
        worker = FakeInterpreter(last)
        monkeypatch.setattr(interpret, "interpreter_worker", lambda: worker)
        code = main(["tune", "--families", "gate_sum_fwd,win_attn_fwd", "--seq", "1k", "--db", url, *more])
        return code, worker.asked, capsys.readouterr().err

    assert run(2)[:2] == (130, 2)
    code, asked, said = run()
    again = sum(bool(config.get("use_tma")) for config in planned[:2])
    assert (code, asked) == (1, len(planned) - 2 + again) and f"{2 - again} of them in an earlier run" in said
    assert run()[:2] == (1, wrong), "what was wrong is run again"
    assert run(1000, "--retune")[1] == len(planned)
    monkeypatch.setattr(interpret, "judge_digest", lambda: "other sources")
    assert run()[1] == len(planned)


def test_what_judges_a_variant_includes_this_packages_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_autotune.search import interpret

    before = interpret.judge_digest.__wrapped__()
    assert before == interpret.judge_digest()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "accuracy.py"))
    assert interpret.judge_digest.__wrapped__() != before


def test_a_problem_without_a_winner_is_an_error(
    on_a_gpu: type[FakeWorker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu.fail_all = True
    assert main([*COMMAND, "--db", url]) == 1
    err = capsys.readouterr().err
    assert "no config works" in err and "crash: it died" in err and "2 problems have no winner" in err


def predict_nothing_measured(calls: list[str], ranked: list[object]) -> Callable[..., list[object]]:
    def predict(spec: object, problem: Problem, *, target: str, **_: object) -> list[object]:
        calls.append(f"{target} {problem.seq_k}")
        return ranked

    return predict


def test_without_a_gpu_predictions_are_labelled(
    monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_autotune.search.ranking import Prediction

    config = get_spec("gate_sum_fwd").default_config(Problem())
    resources = {"registers": 31, "shared_bytes": 2048}
    calls: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fake = predict_nothing_measured(calls, [Prediction(config, 12.5, resources)])
    monkeypatch.setattr("nsa_autotune.search.predict.predict_problem", fake)
    assert main([*COMMAND, "--db", url, "--no-check"]) == 0
    captured = capsys.readouterr()
    assert calls == ["cuda:90 1024", "cuda:90 2048"]
    assert "nothing was measured" in captured.out and "12.5" in captured.out and "31" in captured.out
    assert "winner" not in captured.out

    monkeypatch.setattr("nsa_autotune.search.predict.predict_problem", predict_nothing_measured(calls, []))
    assert main([*COMMAND, "--db", url, "--no-check", "--target", "cuda:80"]) == 1
    assert "none runs" in capsys.readouterr().out and calls[-1] == "cuda:80 2048"


def test_ctrl_c_while_predicting_shows_what_was_found(
    monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_autotune.dispatch.fingerprint import for_target
    from nsa_autotune.search import predict
    from nsa_autotune.search.task import Task

    def interrupted(spec: KernelSpec, problem: Problem, *, target: str, store: TuningStore, **_: object) -> None:
        task = Task(spec, problem, for_target(target).to_dict(), predict.template_digest(spec))
        resources = {"registers": 37, "shared_bytes": 2048}
        store.add_trial(task.prediction(spec.default_config(problem), "ok", "", resources, 43.21))
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_problem", interrupted)
    assert main([*COMMAND, "--db", url, "--no-check", "--target", "cuda:90"]) == 130
    captured = capsys.readouterr()
    assert "43.21" in captured.out and "37" in captured.out and "T 1024" in captured.out
    assert "T 2048" not in captured.out
    assert "everything found is kept" in " ".join(captured.err.split())


def test_final_tables_are_readable_in_80_columns(
    on_a_gpu: type[FakeWorker], url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_autotune.search.ranking import Prediction

    monkeypatch.setattr("nsa_autotune.cli.console.PLAIN_WIDTH", 80)
    assert main([*COMMAND, "--db", url]) == 0
    spec = get_spec("slc_select_fwd")
    ranked = [Prediction(spec.default_config(Problem()), 12345.6, {"registers": 255, "shared_bytes": 200_000})]
    tune_report.print_predictions([tune_report.Guess("cuda:90", spec, Problem(), ranked)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert {"gate_sum_fwd", "slc_select_fwd", "12346", "gain", "winner", "config"} <= set(out.split())


def test_queries_and_phi_reach_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tune_run.Run] = []
    monkeypatch.setattr(tune_command, "execute", lambda run: runs.append(run) or 0)
    arguments = ["tune", "--target", "cuda:90", "--seq", "4k,8k", "--seq-q", "1", "--phi-hidden", "64"]
    assert main([*arguments, "--families", "cmp_mlp_fwd,win_attn_fwd"]) == 0
    found = {(spec.family, p.seq_q, p.seq_k, p.phi_hidden) for spec, p in runs[0].work}
    assert {row for row in found if row[0] == "win_attn_fwd"} == {
        ("win_attn_fwd", 1, 4096, 64),
        ("win_attn_fwd", 1, 8192, 64),
    }
    assert {row[3] for row in found} == {64}
    assert main(["tune", "--target", "cuda:90", "--seq", "4k"]) == 0
    assert {(p.seq_q, p.seq_k, p.phi_hidden) for _, p in runs[1].work} == {(4096, 4096, 128)}


def test_a_target_is_predicted_for_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tune_command.choose_targets(["cuda:80"]) == ("cuda:80",)
    assert tune_command.choose_targets([]) == ()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune_command.choose_targets([]) == ("cuda:90",)


def test_several_targets_are_predicted_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_autotune.search.ranking import Prediction

    calls: list[str] = []
    ranked = [Prediction(get_spec("gate_sum_fwd").default_config(Problem()), 1.5, {"registers": 31, "shared_bytes": 0})]
    monkeypatch.setattr("nsa_autotune.search.predict.predict_problem", predict_nothing_measured(calls, ranked))
    command = [*COMMAND, "--db", url, "--no-check", "--target", "cuda:80,hip:gfx942", "--target", "cuda:80"]
    assert main(command) == 0
    assert calls == [f"{target} {tokens}" for target in ("cuda:80", "hip:gfx942") for tokens in (1024, 2048)]
    out = " ".join(capsys.readouterr().out.split())
    assert out.index("predictions for cuda:80") < out.index("predictions for hip:gfx942")


def test_all_compiles_without_a_budget_and_only_for_targets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[tune_run.Run] = []
    monkeypatch.setattr(tune_command, "execute", lambda run: runs.append(run) or 0)
    atlas = ["tune", "--families", "gate_sum_fwd", "--seq", "1k", "--all"]
    assert main([*atlas, "--target", "cuda:90"]) == 0
    assert runs[0].budget.max_minutes is None
    assert runs[0].budget.max_trials is not None and runs[0].budget.max_trials >= 10**6
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for wrong in ([], ["--target", "cuda:90", "--trials", "5"], ["--target", "cuda:90", "--budget", "full"]):
        assert main([*atlas, *wrong]) == 2
        assert "takes no budget" in capsys.readouterr().err
    assert len(runs) == 1


def test_equal_work_is_planned_once() -> None:
    specs = [get_spec("gate_sum_fwd"), get_spec("slc_attn_fwd")]
    problems = [Problem(locality=locality) for locality in (0.0, 0.8)]
    work = tune_command.plan_work(specs, problems)
    assert [(spec.family, problem.locality) for spec, problem in work] == [
        ("gate_sum_fwd", 0.0),
        ("slc_attn_fwd", 0.0),
        ("slc_attn_fwd", 0.8),
    ]


def test_different_head_dims_compress_keys_and_values_apart() -> None:
    work = tune_command.plan_work([get_spec("cmp_mlp_fwd")], [Problem(d_qk=192, d_v=128)])
    assert sorted(problem.d_qk for _, problem in work) == [128, 192]


def test_every_family_serves_every_preset() -> None:
    from nsa_autotune.search.presets import PRESETS

    for preset in PRESETS.values():
        families = set()
        for problem in (preset.problem, preset.problem.replace(layout="paged", seq_q=1)):
            families |= {spec.family for spec, _ in tune_command.plan_work(list(all_specs().values()), [problem])}
        assert families == set(all_specs())


def test_winners_are_raced_again_in_a_new_process_unless_the_budget_is_quick(
    on_a_gpu: type[FakeWorker], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--db", url]) == 0
    assert on_a_gpu.renewed == 1
    assert "confirmed" in capsys.readouterr().out
    with TuningStore(url) as store:
        mine = store.winners(gpu="Test GPU")
        assert {w.verdict for w in mine} == {"confirmed"} and {w.policy for w in mine} == {"eager-cold"}
        assert len(store.trials(gpu="Test GPU", stage="confirm")) >= 2 * len(mine)
    quick = ["tune", "--families", "gate_sum_fwd", "--seq", "4k", "--budget", "quick", "--policy", "graph-warm"]
    assert main([*quick, "--jobs", "1", "--db", url]) == 0
    assert on_a_gpu.renewed == 1
    with TuningStore(url) as store:
        (winner,) = store.winners(gpu="Test GPU", policy="graph-warm")
        assert winner.verdict == "provisional"
        assert {t.policy for t in store.trials(gpu="Test GPU", problem_key=winner.problem_key)} == {"graph-warm"}


def test_an_unknown_policy_is_refused(on_a_gpu: type[FakeWorker], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--policy", "tepid"]) == 2
    assert "graph-cold" in capsys.readouterr().err


def test_a_tenth_of_the_minutes_is_kept_for_confirming() -> None:
    assert tune_run.search_budget(Budget(7, 10.0)) == Budget(7, 9.0)
    assert tune_run.search_budget(Budget(7, 10.0, confirm=False)) == Budget(7, 10.0, confirm=False)
    assert tune_run.search_budget(Budget(7)) == Budget(7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, 7, None), Budget(7, None)),
        ((None, None, 3.0), Budget(None, 3.0)),
        (("full", 7, 3.0), Budget(7, 3.0)),
        (("quick", None, 3.0), Budget(60, 3.0, confirm=False)),
        (("full", 3000, None), Budget(3000, 60.0 * 5)),
        (("200,30m", None, 3.0), Budget(200, 3.0)),
        (("quick", None, None), Budget(60, 2.0 * 5, confirm=False)),
        (("200,30m", None, None), Budget(200, 30.0)),
        ((None, None, None), Budget(NAMED_BUDGETS["normal"].max_trials, 50.0)),
    ],
    ids=str,
)
def test_budget_of_five_problems(arguments: tuple[str | None, int | None, float | None], expected: Budget) -> None:
    assert tune_command.choose_budget(*arguments, parts=5, predicting=False) == expected


def test_minutes_are_shared_among_what_is_left() -> None:
    spent_minutes, found = 0.0, []
    for to_do, took in ((4, 2.0), (3, 0.0), (2, 60.0), (1, 0.0)):
        budget = tune_run.share(Budget(9, 8.0), spent_minutes, to_do)
        found.append((to_do, budget.max_trials, budget.max_minutes))
        spent_minutes += took
    assert found == [(4, 9, 2.0), (3, 9, 2.0), (2, 9, 3.0), (1, 9, tune_run.LEAST_MINUTES)]
    assert tune_run.share(Budget(9), 100.0, 1) == Budget(9)


def test_a_database_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 't.sqlite'}"
    TuningStore(url).close()
    monkeypatch.setattr("nsa_autotune.db.store.is_read_only", lambda location: True)
    monkeypatch.setattr("nsa_autotune.cli.tune_predict.predict", lambda *a: pytest.fail("work was begun"))
    monkeypatch.setattr(tune_run, "check_in_interpreter", lambda *a: pytest.fail("work was begun"))
    line = (
        "tune",
        "--preset",
        "tiny",
        "--families",
        "gate_sum_fwd",
        "--seq",
        "512",
        "--target",
        "cuda:90",
        "--db",
        url,
    )
    assert main(line) == 2
    assert "can be written" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["NSA_AUTOTUNE_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_folder_that_cannot_be_written_is_no_fact_about_a_config(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    place = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    assert main([*COMMAND, "--target", "cuda:90", "--no-check", "--db", place]) == 2
    assert f"Set {variable} to a folder you may write" in capsys.readouterr().err
    with TuningStore(place) as store:
        assert store.trials(kind="predicted") == []
