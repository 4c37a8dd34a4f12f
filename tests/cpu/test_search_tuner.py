"""Search and tuning on known times: quality, no repetition, resume, failures, budgets, finalists."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
from cpu.search_fakes import (
    DEFAULT,
    FINGERPRINT,
    PROBLEM,
    SPACE,
    SPEC,
    FakeClock,
    FakeMeasurer,
    Listener,
    digest_of,
    make_landscape,
    make_spec,
    timed,
    trials,
)

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db.records import TrialRecord, WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidProblem
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.ahead import Prepared, Unprepared
from nsa_autotune.search.budget import Budget
from nsa_autotune.search.certify import Verdict
from nsa_autotune.search.interpret import check_in_interpreter, interpreter_worker
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.search.study import ConfigSearch
from nsa_autotune.search.task import Task, seed_configs
from nsa_autotune.search.tuner import FINALISTS, tune_problem
from nsa_autotune.spec import Config, Problem, ProblemRule, digest

SEEDS = range(3)
TASK = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC))


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def tune(store: TuningStore, measurer: FakeMeasurer, **options: object) -> WinnerRecord | None:
    """`tune_problem` on the toy family with 25 trials, unless said otherwise."""
    values: dict[str, object] = {"budget": trials(25), "fingerprint": FINGERPRINT, "digest_of": digest_of, **options}
    problem = values.pop("problem", PROBLEM)
    spec = values.pop("spec", SPEC)
    return tune_problem(spec, problem, measurer=measurer, store=store, **values)  # type: ignore[arg-type]


def optimum_us(time_us: Callable[[Config], float | None]) -> float:
    """The fastest time of the whole space."""
    return min(value for value in map(time_us, SPACE.configs()) if value is not None)


@pytest.mark.parametrize("seed", SEEDS)
def test_120_trials_come_within_5_percent_of_the_optimum(seed: int) -> None:
    time_us = make_landscape(seed)
    search, proposed = ConfigSearch(SPACE, seed=seed, seeds=[DEFAULT]), set()
    for number in range(120):
        config = search.propose(polish=number >= 72)
        assert config is not None and SPACE.is_legal(config)
        proposed.add(config_key(config))
        search.record(config, time_us(config))
    assert len(proposed) == 120  # never one twice
    assert search.best is not None and search.best[1] <= 1.05 * optimum_us(time_us)


def test_search_beats_chance() -> None:
    """Otherwise the space would be so easy that the test above could not fail."""
    time_us = make_landscape(1)
    drawn = [time_us(config) for config in random.Random(1).sample(list(SPACE.configs()), 120)]
    assert min(value for value in drawn if value is not None) > 1.05 * optimum_us(time_us)


def test_the_same_seed_proposes_the_same_configs() -> None:
    time_us = make_landscape(0)

    def run() -> list[str]:
        search, asked = ConfigSearch(SPACE, seed=3), []
        for number in range(25):
            config = search.propose(polish=number >= 20)
            assert config is not None
            search.record(config, time_us(config))
            asked.append(config_key(config))
        return asked

    assert run() == run()


def test_seeds_come_first_and_illegal_ones_never() -> None:
    good = {**DEFAULT, "num_warps": 8}
    illegal = {**DEFAULT, "BLOCK_T": 4}  # query-major takes one token
    search = ConfigSearch(SPACE, seeds=[DEFAULT, illegal, good, DEFAULT])
    first = search.propose()
    assert first == DEFAULT
    search.record(first, 10.0)
    assert search.propose() == good


def test_polish_goes_to_a_neighbour_of_the_best() -> None:
    search = ConfigSearch(SPACE)
    search.record(DEFAULT, 10.0)
    search.record({**DEFAULT, "num_stages": 5}, 99.0)
    near = {config_key(config) for config in SPACE.neighbours(DEFAULT)}
    for _ in range(len(near)):
        config = search.propose(polish=True)
        assert config is not None and config_key(config) in near
        near.remove(config_key(config))
        search.record(config, 50.0)


def test_an_exhausted_space_proposes_nothing() -> None:
    search = ConfigSearch(SPACE)
    legal = list(SPACE.configs())
    for config in legal[:-1]:
        search.remember(config, 10.0)
    last = search.propose()
    assert last == legal[-1]
    search.record(last, None)
    assert search.propose() is None
    assert search.propose(polish=True) is None


def test_what_is_remembered_is_checked() -> None:
    search = ConfigSearch(SPACE)
    search.remember({"gone": 1}, 1.0)  # stored before the space changed
    search.remember(DEFAULT, 10.0)
    search.remember(DEFAULT, 99.0)  # an older trial of the same config
    assert search.ranked() == [(DEFAULT, 10.0)]


def test_optuna_is_quiet_and_left_as_it_was(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        with caplog.at_level(logging.DEBUG):
            search = ConfigSearch(SPACE)
            config = search.propose()
            assert config is not None
            search.record(config, 10.0)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.disable_propagation()
    assert not caplog.records
    assert not list(recwarn)


def test_tuning_finds_stores_and_returns_the_winner(store: TuningStore) -> None:
    time_us = make_landscape(0)
    measurer, listener = FakeMeasurer(time_us), Listener()
    winner = tune(store, measurer, progress=listener)
    assert winner is not None
    assert winner.median_us == time_us(winner.config) < (time_us(DEFAULT) or 0.0)
    assert winner.default_config == DEFAULT and winner.default_median_us == time_us(DEFAULT)
    assert (winner.p20_us, winner.p80_us) == (0.99 * winner.median_us, 1.01 * winner.median_us)
    assert len(winner.samples_us) > 3  # the race's, not the search's
    assert store.winners(family="toy_fwd") == [winner]

    found = store.trials(stage="search")
    assert len(found) == len(measurer.measured) == len(set(measurer.measured)) == 25
    assert {config_key(record.config) for record in found} == set(measurer.measured)
    assert {record.problem_key for record in found} == {SPEC.problem_key(PROBLEM)}
    assert {record.template_digest for record in found} == {"digest of toy_fwd"}
    assert [event.number for event in listener.events] == list(range(1, len(listener.events) + 1))
    assert listener.plans[0].planned_trials == 25
    assert [outcome.kind for outcome in listener.outcomes] == ["tuned"]
    assert listener.outcomes[0].winner == winner


def test_what_the_user_names_is_measured_before_all_else(store: TuningStore) -> None:
    named = [SPACE.sample(random.Random(seed)) for seed in (5, 6)]
    measurer = FakeMeasurer(make_landscape(0))
    tune(store, measurer, first=[*named, DEFAULT, named[0]])
    wanted = [config_key(config) for config in (*named, DEFAULT) if config is not None]
    assert measurer.measured[:3] == wanted and len(set(measurer.measured)) == 25


def test_failures_are_stored_with_their_reason_and_end_nothing(store: TuningStore) -> None:
    time_us = make_landscape(2, fail_share=0.5)
    tune(store, FakeMeasurer(time_us), budget=trials(40))
    failed = [record for record in store.trials(stage="search") if record.status != "ok"]
    assert len(store.trials(stage="search")) == 40
    assert 5 < len(failed) < 35
    assert all(time_us(record.config) is None for record in failed)
    assert {(r.status, r.reason.splitlines()[0], r.median_us, r.max_error) for r in failed} == {
        ("accuracy", "wrong by 3 times the baseline", None, 0.3)
    }


def test_if_everything_fails_there_is_no_winner_but_the_reasons(store: TuningStore) -> None:
    listener = Listener()
    measurer = FakeMeasurer(lambda config: None)
    assert tune(store, measurer, budget=trials(12), progress=listener) is None
    assert not store.winners() and not measurer.races
    outcome = listener.outcomes[0]
    assert (outcome.kind, outcome.winner) == ("failed", None)
    assert outcome.statuses == (("accuracy", 12),)
    assert outcome.reasons == (("accuracy: wrong by 3 times the baseline", 12),)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power cut")], ids=["ctrl-c", "exception"])
@pytest.mark.parametrize("at", [0, 17, 24, -1], ids=["first", "middle", "last", "race"])
def test_an_interrupted_run_resumes(store: TuningStore, error: BaseException, at: int) -> None:
    time_us = make_landscape(4)
    measurer, listener = FakeMeasurer(time_us, raise_at={at: error}), Listener()
    with pytest.raises(type(error)):
        tune(store, measurer, progress=listener)
    done = len(measurer.measured)
    assert done == (25 if at == -1 else at)
    assert len(store.trials()) == done and not store.winners()
    assert listener.outcomes[-1].kind == "interrupted"
    before = min((r.median_us for r in store.trials() if r.median_us is not None), default=math.inf)

    winner = tune(store, measurer, progress=listener)
    assert winner is not None
    assert len(measurer.measured) == len(set(measurer.measured)) == 25  # nothing twice, no trial lost
    assert listener.plans[-1].num_known == done and listener.plans[-1].planned_trials == 25 - done
    assert winner.median_us <= before


def test_a_known_winner_is_not_tuned_again_unless_asked(store: TuningStore) -> None:
    time_us = make_landscape(0)
    measurer, listener = FakeMeasurer(time_us), Listener()
    winner = tune(store, measurer)
    count = len(store.trials())
    assert tune(store, measurer, progress=listener) == winner
    assert len(measurer.measured) == 25 and len(measurer.races) == 1 and len(store.trials()) == count
    assert [outcome.kind for outcome in listener.outcomes] == ["known"] and not listener.plans

    again = tune(store, measurer, retune=True, budget=trials(15))
    assert again is not None and winner is not None and again.median_us <= winner.median_us
    assert len(measurer.measured) == len(set(measurer.measured)) == 40  # 15 new ones, the old ones still known
    assert len(measurer.races) == 2 and len(store.winners()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": {**FINGERPRINT, "driver": "2"}},
        {"problem": PROBLEM.replace(seq_q=2048, seq_k=2048)},
        {"digest_of": lambda spec: "newer template"},
    ],
    ids=["driver", "problem", "template"],
)
def test_another_driver_problem_or_template_is_tuned_anew(store: TuningStore, change: dict[str, object]) -> None:
    tune(store, FakeMeasurer(make_landscape(0)), budget=trials(10))
    measurer = FakeMeasurer(make_landscape(0))
    assert tune(store, measurer, budget=trials(10), **change) is not None
    assert len(measurer.measured) == 10 and len(store.winners()) == 2


SMALL = replace(
    make_spec(params=[replace(param, values=param.values[:2]) for param in SPEC.params]),
    defaults=lambda problem: {**DEFAULT, "num_warps": 2},
)
SMALL_LEGAL = [config for config in SPACE.configs() if SMALL.broken_constraint(PROBLEM, config) is None]


def test_retuning_looks_again_at_crashes_only_if_it_may_leave_quarantine(store: TuningStore) -> None:
    def measure(family: str, problem: Problem, config: Config) -> TrialResult:
        return TrialResult("crash", "gone") if config["num_warps"] == 2 else TrialResult("accuracy", "wrong")

    failing = FakeMeasurer(make_landscape(0))
    failing.measure = measure  # type: ignore[method-assign]
    assert tune(store, failing, spec=SMALL, budget=trials(99)) is None
    assert Counter(record.status for record in store.trials()) == {"crash": 16, "accuracy": 16}
    measurer = FakeMeasurer(make_landscape(0, fail_share=0.0))
    assert tune(store, measurer, spec=SMALL, retune=True, budget=trials(99)) is None and measurer.measured == []
    options = {"spec": SMALL, "retune": True, "retry_quarantined": True}
    assert tune(store, measurer, budget=trials(99), **options) is not None
    assert sorted(measurer.measured) == sorted(config_key(c) for c in SMALL_LEGAL if c["num_warps"] == 2)


@pytest.mark.parametrize("budget", [trials(500), Budget(max_minutes=60.0)], ids=str)
def test_a_small_space_is_measured_whole_and_once(store: TuningStore, budget: Budget) -> None:
    time_us = make_landscape(0)
    measurer = FakeMeasurer(time_us)
    winner = tune(store, measurer, spec=SMALL, budget=budget)
    assert len(SMALL_LEGAL) == 32
    assert sorted(measurer.measured) == sorted(map(config_key, SMALL_LEGAL))
    times = [time_us(config) for config in SMALL_LEGAL]
    assert winner is not None and winner.median_us == min(value for value in times if value is not None)


def test_the_budget_in_minutes_is_obeyed(store: TuningStore) -> None:
    measurer, listener = FakeMeasurer(make_landscape(0)), Listener()
    clock = FakeClock(step_s=1.0)
    winner = tune(store, measurer, budget=Budget(max_minutes=1.0), clock=clock, progress=listener)
    assert winner is not None
    assert 10 <= len(measurer.measured) <= 30  # a few looks at the clock for each trial
    assert clock.now_s < 75.0
    assert max(event.spent for event in listener.events) == 1.0
    assert listener.plans[0].planned_trials is None


def test_both_sides_of_a_budget_hold(store: TuningStore) -> None:
    measurer = FakeMeasurer(make_landscape(0))
    tune(store, measurer, budget=Budget(max_trials=7, max_minutes=1000.0))
    assert len(measurer.measured) == 7


def test_finalists_and_the_default_race_and_the_race_decides(store: TuningStore) -> None:
    time_us = make_landscape(0)
    ranks: dict[str, int] = {}

    def race_us(config: Config) -> float:
        """The search's third is the race's first."""
        return 50.0 if ranks.setdefault(config_key(config), len(ranks)) == 2 else 80.0

    measurer = FakeMeasurer(time_us, race_us=race_us)
    winner = tune(store, measurer)
    (finalists,) = measurer.races
    in_order = sorted((r for r in store.trials(stage="search") if r.status == "ok"), key=lambda r: r.median_us or 0.0)
    assert finalists[:FINALISTS] == [record.config for record in in_order[:FINALISTS]]
    assert finalists[FINALISTS:] == [DEFAULT]
    assert winner is not None and winner.config == in_order[2].config
    assert (winner.median_us, winner.default_median_us) == (50.0, 80.0)
    final = store.trials(stage="final")
    assert {config_key(record.config) for record in final} == {config_key(config) for config in finalists}


def test_finalists_that_fail_in_the_race_make_room_for_the_next(store: TuningStore) -> None:
    time_us = make_landscape(0)
    best: list[str] = []

    def race_us(config: Config) -> float | None:
        if len(best) < FINALISTS + 1:  # the first field, the default included
            best.append(config_key(config))
        return None if config_key(config) in best else time_us(config)

    measurer = FakeMeasurer(time_us, race_us=race_us)
    winner = tune(store, measurer)
    assert winner is not None and config_key(winner.config) not in best
    assert len(measurer.races) == 2
    assert winner.default_median_us is None and winner.default_config == DEFAULT
    assert Counter(record.status for record in store.trials(stage="final"))["accuracy"] == FINALISTS + 2


def test_a_default_that_fails_is_not_raced(store: TuningStore) -> None:
    landscape = make_landscape(0)
    measurer = FakeMeasurer(lambda config: None if config == DEFAULT else landscape(config))
    winner = tune(store, measurer)
    assert winner is not None and winner.default_median_us is None
    assert DEFAULT not in measurer.races[0]


@pytest.mark.parametrize(
    ("result", "median_us"),
    [(timed(500.0), 500.0), (TrialResult("constraint", "no such GPU"), None)],
    ids=["works", "cannot"],
)
def test_the_library_is_measured_beside_the_winner(
    store: TuningStore, result: TrialResult, median_us: float | None
) -> None:
    asked: list[tuple[str, Problem]] = []

    def library(spec: object, problem: Problem) -> TrialResult:
        asked.append((getattr(spec, "library", ""), problem))
        return result

    spec = make_spec(library="some_library")
    winner = tune(store, FakeMeasurer(make_landscape(0)), spec=spec, library=library)
    assert winner is not None and asked == [("some_library", PROBLEM)]
    assert (winner.library, winner.library_median_us) == ("some_library" if median_us else "", median_us)
    (baseline,) = store.trials(stage="baseline")
    assert (baseline.provider, baseline.status, baseline.config) == ("some_library", result.status, {})
    assert baseline.median_us == median_us

    tune(store, FakeMeasurer(make_landscape(0)), library=library, problem=PROBLEM.replace(seq_k=4096))
    assert len(asked) == 1  # a family without a library asks for none


def test_other_lengths_of_a_bucket_are_not_mixed(store: TuningStore) -> None:
    """500 and 512 tokens share a winner, but a time at 500 says nothing exact about 512."""
    near = PROBLEM.replace(seq_q=500, seq_k=500)
    assert SPEC.problem_key(near) == SPEC.problem_key(PROBLEM)
    time_us = make_landscape(0)
    with pytest.raises(KeyboardInterrupt):
        tune(store, FakeMeasurer(time_us, raise_at={10: KeyboardInterrupt()}), problem=near)
    listener = Listener()
    tune(store, FakeMeasurer(time_us), progress=listener)
    assert listener.plans[0].num_known == 0


def test_an_impossible_problem_is_refused_before_anything_is_stored(store: TuningStore) -> None:
    picky = replace(SPEC, rules=(ProblemRule("heads must be 3", lambda p: p.num_q_heads == 3),))
    with pytest.raises(InvalidProblem, match="heads must be 3"):
        tune(store, FakeMeasurer(make_landscape(0)), spec=picky)
    assert not store.trials()


def winner_of(config: Config, problem: Problem = PROBLEM, **fingerprint: str) -> WinnerRecord:
    """A stored winner of another problem or machine."""
    task = Task(SPEC, problem, {**FINGERPRINT, **fingerprint}, digest_of(SPEC))
    return task.winner(Verdict(config, timed(10.0), ()), "provisional", default_us=None, library_us=None)


def test_seeds_are_the_default_then_the_nearest_winners_then_predictions(store: TuningStore) -> None:
    near, far = ({**DEFAULT, "num_warps": warps} for warps in (1, 8))
    elsewhere = {**DEFAULT, "num_stages": 4}
    store.set_winner(winner_of(far, PROBLEM.replace(seq_q=512, seq_k=65536)))
    store.set_winner(winner_of(elsewhere, gpu="Other 200", capability="10.0"))
    store.set_winner(winner_of(near, PROBLEM.replace(seq_q=1024, seq_k=1024), driver="9"))
    guesses = [{**DEFAULT, "BLOCK_N": size} for size in (16, 64, 128)]
    absent = Task(SPEC, PROBLEM, {**FINGERPRINT, "gpu": "target cuda:90"}, digest_of(SPEC))
    for config, guess_us in zip(guesses, (30.0, 10.0, 20.0), strict=True):
        store.add_trial(absent.prediction(config, "ok", "", {"binary_sha": str(guess_us)}, guess_us))
    store.add_trial(absent.prediction({**DEFAULT, "num_stages": 5}, "resource", "too large", None, None))
    other_arch = Task(SPEC, PROBLEM, {**FINGERPRINT, "gpu": "target cuda:80", "capability": "8.0"}, digest_of(SPEC))
    store.add_trial(other_arch.prediction({**DEFAULT, "num_stages": 3}, "ok", "", None, 1.0))

    expected = [DEFAULT, near, elsewhere, far, guesses[1], guesses[2], guesses[0]]
    assert seed_configs(store, TASK, 99) == expected
    assert seed_configs(store, TASK, 2) == expected[:2]
    measurer = FakeMeasurer(make_landscape(0))
    tune(store, measurer)
    assert measurer.measured[:6] == [config_key(config) for config in expected[:6]]  # a quarter of 25 trials


def test_predictions_are_neither_winners_nor_known_trials(store: TuningStore) -> None:
    """Even those that were stored under the fingerprint of the GPU at hand."""
    store.add_trial(TASK.prediction(DEFAULT, "ok", "", {"binary_sha": "a"}, 0.001))
    measurer, listener = FakeMeasurer(make_landscape(0)), Listener()
    winner = tune(store, measurer, progress=listener)
    assert config_key(DEFAULT) in measurer.measured and listener.plans[0].num_known == 0
    assert winner is not None and winner.median_us > 1.0
    assert all(event.best_us is None or event.best_us > 1.0 for event in listener.events)


def test_records_name_their_machine(store: TuningStore) -> None:
    tune(store, FakeMeasurer(make_landscape(0)), budget=trials(3))
    records: list[TrialRecord] = store.trials(fingerprint_digest=digest(FINGERPRINT))
    assert len(records) == 3 + len(store.trials(stage="final"))
    assert {record.kind for record in records} == {"measured"}


def test_the_real_worker_checks_and_tunes_a_real_family(store: TuningStore) -> None:
    """In the interpreter, whose times mean nothing; the way from the proposal to the winner is the one a GPU takes."""
    spec = get_spec("gate_sum_fwd")
    with interpreter_worker() as worker:
        checks = check_in_interpreter(spec, runner=worker, max_cases=1)
        problem = checks[0].problem
        winner = tune_problem(
            spec, problem, measurer=worker, store=store, fingerprint=FINGERPRINT, budget=Budget(max_trials=2)
        )
    assert [(check.ok, check.reason) for check in checks] == [(True, "")]
    assert [record.status for record in store.trials()] == ["ok"] * 4  # two trials, two finalists
    assert winner is not None and winner.template_digest == template_digest(spec)
    assert winner.default_config == spec.default_config(problem) and winner.default_median_us is not None
    assert winner.median_us <= winner.default_median_us


def test_a_budget_that_compiling_used_up_still_measures_one_config(store: TuningStore) -> None:
    clock = FakeClock(step_s=0.0)

    class SlowCompiler(Unprepared):
        ahead = 4

        def take(self) -> list[Prepared]:
            clock.now_s += 3600.0
            return super().take()

    measurer = FakeMeasurer(lambda config: 1.0)
    winner = tune(store, measurer, budget=Budget(max_minutes=1.0), clock=clock, preparer=SlowCompiler())
    assert winner is not None
    assert len(measurer.measured) == 1


@pytest.mark.parametrize(("compile_s", "most"), [(0.0, 5), (0.02, 10)], ids=["compilers_keep_up", "the_gpu_waits"])
def test_more_is_under_way_where_the_gpu_waits(
    store: TuningStore, compile_s: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eighth of 40 trials, or a quarter; by a clock of its own, since a busy machine makes any call take long."""
    waiting: list[int] = []
    now_s = [0.0]
    monkeypatch.setattr("nsa_autotune.search.tuner.time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    def measured(config: Config) -> float:
        now_s[0] += 0.01
        return 1.0 + int(config["num_warps"])

    class Compilers(Unprepared):
        ahead = 30

        def take(self) -> list[Prepared]:
            waiting.append(len(self._queue))
            now_s[0] += compile_s
            return super().take()

    tune(store, FakeMeasurer(measured), budget=trials(40), preparer=Compilers())
    assert max(waiting) == most and len(waiting) == 40


WIDE = replace(
    SPEC, params=tuple(replace(p, reserve=(6, 7)) if p.name == "num_stages" else p for p in SPEC.params), constraints=()
)


def test_a_best_config_at_the_end_of_a_dimension_opens_what_lies_beyond(store: TuningStore) -> None:
    """Times fall up to 6 stages, which is tried only next to a best config of 5, as 7 is next to one of 6."""

    def time_us(config: Config) -> float:
        return 100.0 + 10.0 * abs(int(config["num_stages"]) - 6) + int(config["num_warps"])

    measurer = FakeMeasurer(time_us, space=ConfigSpace(WIDE, PROBLEM))
    winner = tune(store, measurer, spec=WIDE, budget=trials(60))
    assert winner is not None and winner.config["num_stages"] == 6
    stages = [json.loads(key)["num_stages"] for key in measurer.measured]
    assert stages.index(5) < stages.index(6) < stages.index(7)
    assert WIDE.broken_constraint(PROBLEM, {**DEFAULT, "num_stages": 8}) is not None


def test_beyond_the_ends_there_is_nothing_for_a_best_config_inside(store: TuningStore) -> None:
    measurer = FakeMeasurer(lambda config: 100.0 + abs(int(config["num_stages"]) - 3), space=ConfigSpace(WIDE, PROBLEM))
    tune(store, measurer, spec=WIDE, budget=trials(40))
    assert {record.config["num_stages"] for record in store.trials(stage="search")} <= {1, 2, 3, 4, 5}


def test_configs_with_equal_machine_code_are_measured_once_and_cost_no_trial(store: TuningStore) -> None:
    """The compiler makes the same of all depths of pipeline."""

    class Merging(Unprepared):
        ahead = 5

        def take(self) -> list[Prepared]:
            (one,) = super().take()
            code = config_key({name: value for name, value in one.config.items() if name != "num_stages"})
            return [replace(one, code=code, resources={"num_programs": 7, "registers": 1})]

    time_us = make_landscape(0, fail_share=0.0)
    measurer, listener = FakeMeasurer(lambda c: time_us({**c, "num_stages": 1})), Listener()
    winner = tune(store, measurer, budget=trials(60), preparer=Merging(), progress=listener)
    found = store.trials(stage="search")
    merged = [record for record in found if record.status == "same_code"]
    assert len(measurer.measured) == 60 == len(found) - len(merged) and len(merged) > 5
    by_config = {config_key(r.config): r for r in found}
    assert all(r.resources == {"num_programs": 7, "registers": 64} for r in found)  # the measured number of registers
    for record in merged:
        assert record.samples_us == () and record.median_us == time_us({**record.config, "num_stages": 1})
        twin = by_config[record.reason.removeprefix("the same machine code as ")]
        assert twin.status == "ok" and {**twin.config, "num_stages": 0} == {**record.config, "num_stages": 0}
    (finalists,) = measurer.races
    codes = [config_key({**config, "num_stages": 0}) for config in finalists if config != DEFAULT]
    assert len(set(codes)) == len(codes)  # no race between a config and itself
    assert winner is not None and "same_code" in dict(listener.outcomes[0].statuses)
    assert not any("same_code" in reason for reason, _ in listener.outcomes[0].reasons)
