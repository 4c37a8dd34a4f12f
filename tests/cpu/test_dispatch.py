"""Which variant serves a problem, what is logged about it, and that nothing is looked up twice."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from problems import served
from typer.testing import CliRunner

from nsa_autotune import kernels
from nsa_autotune.cli.app import app
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.config import NSAConfig
from nsa_autotune.db.records import TrialRecord, WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.dispatcher import Dispatcher, tune_command
from nsa_autotune.dispatch.fingerprint import Fingerprint, current, for_target
from nsa_autotune.dispatch.ladder import Step, choose, choose_predicted, distance
from nsa_autotune.errors import InvalidInput, InvalidProblem, KernelError, NotTuned
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.presets import tuning_problems
from nsa_autotune.spec import DEFAULT_POLICY, Config, Problem

HERE = Fingerprint("NVIDIA H200", "9.0", "570.1", "12.8", "2.11.0", "3.6.0")
OLD = Fingerprint("NVIDIA H200", "9.0", "550.0", "12.4", "2.9.0", "3.5.0")
COUSIN = Fingerprint("NVIDIA H100 80GB HBM3", "9.0", "570.1", "12.8", "2.11.0", "3.6.0")
STRANGER = Fingerprint("NVIDIA A100", "8.0", "570.1", "12.8", "2.11.0", "3.6.0")
SPEC = get_spec("win_attn_fwd")
PROBLEM = Problem(seq_q=8192, seq_k=8192)
LONGER = PROBLEM.replace(seq_q=32_768, seq_k=32_768)
DIGEST = template_digest(SPEC)


def config(stages: int = 3, **changes: Any) -> Config:
    """A legal config that is not the default; `stages` tells them apart."""
    return {**SPEC.default_config(PROBLEM), "use_tma": True, "num_stages": stages, **changes}


@dataclass(frozen=True)
class FakeWinner:
    """What the ladder reads of a winner."""

    problem: dict[str, Any]
    config: Config
    fingerprint: dict[str, str] = field(default_factory=HERE.to_dict)
    template_digest: str = DIGEST
    family: str = "win_attn_fwd"
    policy: str = DEFAULT_POLICY
    median_us: float = 1.0

    @property
    def problem_key(self) -> str:
        return get_spec(self.family).problem_key(Problem.from_dict(self.problem))


class FakeSource:
    """Counts how often it is asked."""

    def __init__(self, *winners: FakeWinner) -> None:
        self.found, self.asked = winners, 0

    def winners(self, *, family: str) -> Sequence[FakeWinner]:
        self.asked += 1
        return [winner for winner in self.found if winner.family == family]


def winner(stages: int, problem: Problem = PROBLEM, at: Fingerprint = HERE, **changes: Any) -> FakeWinner:
    """A winner whose config has `stages`."""
    return FakeWinner(problem.to_dict(), config(stages), at.to_dict(), **changes)


def dispatcher(*winners: FakeWinner, **how: Any) -> Dispatcher:
    """A dispatcher on the GPU `HERE`."""
    return Dispatcher(FakeSource(*winners), fingerprint=HERE, **how)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The messages so far."""
    caplog.set_level(logging.WARNING, logger="nsa_autotune")
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "nsa_autotune"]


# the ladder

RUNGS = [
    (Step.EXACT, winner(4)),
    (Step.OTHER_TOOLCHAIN, winner(3, at=OLD)),
    (Step.NEAREST, winner(2, LONGER)),
    (Step.ARCHITECTURE, winner(1, at=COUSIN)),
]


WRONG_KEYS = ["not json", "[1]", "5", "{}", "[" * 5000]
WRONG_FIELDS = [
    {"locality": "x"},
    {"dtype": ["float16"]},
    {"dtype": "half"},
    *({"seq_k": value} for value in (0, -1, "x", [1], 1.5, True, 10**400)),
]


@pytest.mark.parametrize("wrong", [*WRONG_KEYS, *WRONG_FIELDS], ids=lambda wrong: str(wrong)[:20])
def test_a_key_that_nobody_could_have_tuned_is_passed_over(wrong: str | dict[str, object]) -> None:
    spec = get_spec("slc_attn_fwd")
    fields = json.loads(spec.problem_key(PROBLEM))
    key = wrong if isinstance(wrong, str) else json.dumps({**fields, **wrong})
    facts = {"fingerprint": HERE.to_dict(), "problem": PROBLEM.to_dict(), "policy": DEFAULT_POLICY}
    facts |= {"config": spec.default_config(PROBLEM), "template_digest": "t", "median_us": 1.0}
    bad = SimpleNamespace(**facts, problem_key=key, status="ok", predicted_us=1.0, created="")
    good = SimpleNamespace(**facts, problem_key=spec.problem_key(LONGER), status="ok", predicted_us=1.0, created="")
    assert distance(spec, PROBLEM, key) == math.inf
    assert choose(spec, PROBLEM, [bad, good], HERE, "t").tuned_key == good.problem_key
    for guess in (bad, good):
        guess.fingerprint = {**HERE.to_dict(), "gpu": "target cuda:90"}
    found = choose_predicted(spec, PROBLEM, [bad, good], HERE, "t")
    assert found is not None and found.tuned_key == good.problem_key


@pytest.mark.parametrize("value", [4.0, "4", True, [4]], ids=str)
def test_a_value_of_another_type_is_no_value_of_a_parameter(value: object) -> None:
    odd = FakeWinner(PROBLEM.to_dict(), {**config(), "num_warps": value})  # type: ignore[dict-item]
    assert "num_warps" in str(SPEC.broken_constraint(PROBLEM, odd.config))
    assert choose(SPEC, PROBLEM, [odd], HERE, DIGEST).step is Step.DEFAULT


@pytest.mark.parametrize("best", range(len(RUNGS)), ids=[step.name.lower() for step, _ in RUNGS])
@pytest.mark.parametrize("turn", [1, -1], ids=["listed", "reversed"])
def test_the_highest_step_wins_whatever_the_order(best: int, turn: int) -> None:
    known = [entry for _, entry in RUNGS[best:]][::turn]
    choice = choose(SPEC, PROBLEM, known, HERE, DIGEST)
    step, expected = RUNGS[best]
    assert (choice.step, choice.config, choice.tuned_key) == (step, expected.config, expected.problem_key)
    assert choice.config is not expected.config  # nobody can spoil a stored record


@pytest.mark.parametrize(
    "known",
    [
        [],
        [winner(4, at=STRANGER)],
        [winner(4, template_digest="of an older template")],
        [winner(4, PROBLEM.replace(d_qk=64))],
        [winner(4, PROBLEM.replace(dtype="float32"))],
        [FakeWinner(PROBLEM.to_dict(), config(BLOCK_N=48))],
        [FakeWinner(PROBLEM.to_dict(), {**config(), "retired": 1})],
        [FakeWinner(PROBLEM.replace(num_kv_heads=64).to_dict(), config(BLOCK_T=64))],
    ],
    ids=[
        "nothing",
        "other_architecture",
        "stale_template",
        "other_head_dim",
        "other_dtype",
        "value",
        "unknown_param",
        "too_many_rows",
    ],
)
def test_what_cannot_serve_is_passed_over(known: list[FakeWinner]) -> None:
    choice = choose(SPEC, PROBLEM, known, HERE, DIGEST)
    assert (choice.step, choice.config, choice.tuned_key) == (Step.DEFAULT, SPEC.default_config(PROBLEM), "")


def test_the_nearest_problem_is_the_nearest_in_octaves() -> None:
    far, near = winner(1, PROBLEM.replace(seq_q=65_536, seq_k=65_536)), winner(2, LONGER)
    other_group = winner(3, PROBLEM.replace(num_kv_heads=16))
    assert choose(SPEC, PROBLEM, [far, near, other_group], HERE, DIGEST).config == near.config
    assert distance(SPEC, PROBLEM, SPEC.problem_key(PROBLEM.replace(seq_q=5000, seq_k=5000))) == 0
    assert distance(SPEC, PROBLEM, near.problem_key) == 4  # two octaves of queries and of keys
    assert distance(SPEC, PROBLEM, other_group.problem_key) > 4
    packed = SPEC.problem_key(PROBLEM.replace(layout="packed"))
    assert 0 < distance(SPEC, PROBLEM, packed) < distance(SPEC, PROBLEM, far.problem_key)


def test_the_other_format_of_16_bits_is_nearer_than_another_size() -> None:
    half, half_longer = PROBLEM.replace(dtype="float16"), LONGER.replace(dtype="float16")
    known = [winner(1, half_longer), winner(2, PROBLEM)]
    choice = choose(SPEC, half, known, HERE, DIGEST)
    assert (choice.step, choice.config) == (Step.NEAREST, known[1].config)
    assert choose(SPEC, half, [*known, winner(4, half)], HERE, DIGEST).step is Step.EXACT
    assert choose(SPEC, half_longer, known, HERE, DIGEST).step is Step.EXACT
    assert distance(SPEC, half.replace(dtype="float32"), SPEC.problem_key(half)) == math.inf


def test_a_bucket_is_one_problem() -> None:
    odd = PROBLEM.replace(seq_q=8000, seq_k=8000)
    assert choose(SPEC, odd, [winner(4)], HERE, DIGEST).step is Step.EXACT


def test_locality_moves_a_selected_winner_to_the_next_step() -> None:
    spec = get_spec("slc_attn_fwd")
    key = spec.problem_key(PROBLEM.replace(locality=0.5))
    assert distance(spec, PROBLEM.replace(locality=0.8), key) == pytest.approx(0.3)


@pytest.mark.parametrize("family", list(all_specs()))
def test_every_family_falls_back_to_its_default(family: str) -> None:
    spec = get_spec(family)
    problem = served(spec, PROBLEM)
    choice = dispatcher().choose(spec, problem)
    assert choice.step is Step.DEFAULT and choice.config == spec.default_config(problem)


# the dispatcher


def test_a_step_below_the_first_is_logged_once_with_the_command(log: Callable[[], list[str]]) -> None:
    served = dispatcher(winner(2, LONGER))
    for _ in range(3):
        assert served.choose(SPEC, PROBLEM).step is Step.NEAREST
    assert len(log()) == 1
    assert "win_attn_fwd on NVIDIA H200: serving the winner of the nearest problem on this GPU" in log()[0]
    assert tune_command(SPEC, PROBLEM) in log()[0]
    served.choose(SPEC, PROBLEM.replace(seq_q=8000, seq_k=8000))  # the same bucket
    assert len(log()) == 1
    served.choose(SPEC, PROBLEM.replace(d_qk=64, d_v=64))
    assert len(log()) == 2 and "serving the default config" in log()[1]
    served.choose(SPEC, PROBLEM.replace(d_qk=96, d_v=96))
    assert len(log()) == 2  # a warning a family and step; the rest at level INFO


def test_every_problem_is_told_to_who_asks_for_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nsa_autotune")
    served, problems = dispatcher(), [PROBLEM.replace(d_qk=d, d_v=d) for d in (64, 96)]
    for problem in (*problems, problems[1]):
        served.choose(SPEC, problem)
    told = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == [logging.WARNING, logging.INFO]
    assert all(tune_command(SPEC, problem) in text for problem, (_, text) in zip(problems, told, strict=True))


def test_an_exact_winner_is_served_in_silence(log: Callable[[], list[str]]) -> None:
    assert dispatcher(winner(4)).choose(SPEC, PROBLEM).config == config(4)
    assert log() == []


@pytest.mark.parametrize("known", [[], [winner(2, LONGER)], [winner(3, at=OLD)]], ids=["default", "nearest", "old"])
def test_strict_raises_with_the_command_that_helps(known: list[FakeWinner]) -> None:
    with pytest.raises(NotTuned, match="strict=True serves exact winners only") as caught:
        dispatcher(*known, strict=True).choose(SPEC, PROBLEM)
    assert f"Run: {tune_command(SPEC, PROBLEM)}" in str(caught.value)
    assert caught.value.values["gpu"] == "NVIDIA H200"


def test_strict_serves_an_exact_winner() -> None:
    assert dispatcher(winner(4), strict=True).choose(SPEC, PROBLEM).step is Step.EXACT


def test_the_strict_twin_shares_all_but_the_plans() -> None:
    lenient = dispatcher(winner(4), locality=0.25)
    strict = lenient.stricter()
    assert strict.strict and not lenient.strict
    assert strict is lenient.stricter() and strict.stricter() is strict
    assert strict.locality == 0.25
    assert strict.choose(SPEC, PROBLEM).config == config(4)
    with pytest.raises(NotTuned):
        strict.choose(SPEC, LONGER)
    assert lenient.choose(SPEC, LONGER).step is Step.NEAREST


def test_a_problem_that_no_kernel_serves_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="head dims must be multiples of 16"):
        dispatcher().choose(SPEC, PROBLEM.replace(d_qk=72))


class Kernels:
    """Stands in for rendering and loading: counts launches, and fails for chosen configs."""

    def __init__(self, *failing: Config) -> None:
        self.failing, self.loaded, self.launched = failing, [], []

    def load(self, spec: Any, problem: Problem, chosen: Config) -> SimpleNamespace:
        self.loaded.append(chosen)

        def launch(tensors: dict[str, Any]) -> None:
            if chosen in self.failing:
                raise KernelError("no", {"stages": chosen["num_stages"]})
            self.launched.append((chosen, tensors))

        return SimpleNamespace(serve=lambda trusted, ordinary: launch)


def equip(served: Dispatcher, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the dispatcher take its kernels from `kernels`."""
    monkeypatch.setattr(served, "_load", kernels.load)


def test_a_shape_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kernels, described = FakeSource(winner(4)), Kernels(), []
    served = Dispatcher(source, fingerprint=HERE)
    equip(served, kernels, monkeypatch)

    def problem() -> Problem:
        described.append(1)
        return PROBLEM

    for number in range(5):
        served.launch(SPEC, ("shape", 1), problem, "cuda:0", {"q": number})
    assert (source.asked, len(described), len(kernels.loaded)) == (1, 1, 1)
    assert kernels.launched == [(config(4), {"q": number}) for number in range(5)]
    served.launch(SPEC, ("shape", 2), problem, "cuda:0", {"q": 9})
    assert (source.asked, len(described)) == (1, 2)  # winners of a family are read once
    assert served.stats == {Step.EXACT: 2}


def test_a_fused_winner_that_does_not_run_leaves_it_to_the_tuned_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = timed(FUSED, 1.0, config={**SPEC.default_config(PROBLEM), "num_stages": 4})
    served, kernels = dispatcher(fused), Kernels(fused.config)
    equip(served, kernels, monkeypatch)
    with pytest.raises(KernelError):
        served.launch(get_spec(FUSED), "shape", lambda: PROBLEM, "cuda:0", {})
    assert not kernels.launched and not served.stats


def test_a_winner_that_does_not_run_here_steps_down_to_the_default(
    monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    served, kernels = dispatcher(winner(4)), Kernels(config(4))
    equip(served, kernels, monkeypatch)
    for _ in range(2):
        served.launch(SPEC, "shape", lambda: PROBLEM, "cuda:0", {})
    assert [chosen for chosen, _ in kernels.launched] == [SPEC.default_config(PROBLEM)] * 2
    assert len(log()) == 1 and "the exact winner does not run here, using the default config: no" in log()[0]
    assert served.stats == {Step.DEFAULT: 1}


def test_a_default_that_does_not_run_raises_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served, kernels = dispatcher(), Kernels(SPEC.default_config(PROBLEM))
    equip(served, kernels, monkeypatch)
    for _ in range(2):
        with pytest.raises(KernelError):
            served.launch(SPEC, "shape", lambda: PROBLEM, "cuda:0", {})
    assert len(kernels.loaded) == 2 and not served.stats


def test_strict_does_not_step_down_from_a_winner_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    served, kernels = dispatcher(winner(4), strict=True), Kernels(config(4))
    equip(served, kernels, monkeypatch)
    with pytest.raises(KernelError):
        served.launch(SPEC, "shape", lambda: PROBLEM, "cuda:0", {})
    assert kernels.launched == []


def test_a_launch_that_fails_names_its_template_line() -> None:
    spec = get_spec("gate_sum_fwd")
    problem = Problem(seq_q=4, seq_k=4, num_q_heads=2, num_kv_heads=1, d_qk=16, d_v=16, dtype="float16")
    with pytest.raises(KernelError, match=r"gate_sum_fwd failed: AttributeError.*\n.*templates/gate_sum_fwd\.py\.j2:"):
        dispatcher().launch(
            spec, "shape", lambda: problem, "cpu", dict.fromkeys(("o_cmp", "o_slc", "o_win", "gates", "out"))
        )


def test_equal_variants_share_one_module() -> None:
    served = dispatcher()
    chosen = SPEC.default_config(PROBLEM)
    assert served._load(SPEC, PROBLEM, chosen) is served._load(SPEC, LONGER, chosen)
    assert served._load(SPEC, PROBLEM, chosen) is not served._load(SPEC, PROBLEM, config())


# the real database


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def record(**changes: Any) -> dict[str, Any]:
    """What a trial and a winner of the problem have in common."""
    return {
        "fingerprint": HERE.to_dict(),
        "family": SPEC.family,
        "problem": PROBLEM.to_dict(),
        "problem_key": SPEC.problem_key(PROBLEM),
        "config": config(4),
        "template_digest": DIGEST,
        **changes,
    }


def test_a_winner_of_the_database_is_served(store: TuningStore) -> None:
    store.set_winner(WinnerRecord(**record(), median_us=5.0, p20_us=4.9, p80_us=5.1, samples_us=(4.9, 5.0, 5.1)))
    served = Dispatcher(store, fingerprint=HERE)
    assert served.choose(SPEC, PROBLEM).config == config(4)
    assert served.choose(SPEC, PROBLEM).step is Step.EXACT
    assert served.choose(get_spec("cmp_attn_fwd"), PROBLEM).step is Step.DEFAULT


def predicted(stages: int, guess_us: float, at: Fingerprint, problem: Problem = PROBLEM, **changes: Any) -> TrialRecord:
    """A stored prediction whose config has `stages`."""
    where = {"problem": problem.to_dict(), "problem_key": SPEC.problem_key(problem), "fingerprint": at.to_dict()}
    values = {"status": "ok", "kind": "predicted", "predicted_us": guess_us, **changes}
    return TrialRecord(**record(**where, config=config(stages)), **values)


def test_winners_of_the_wanted_policy_go_first_and_others_are_not_exact() -> None:
    eager, graph = (
        FakeWinner(PROBLEM.to_dict(), config(s), policy=p) for s, p in ((1, "eager-cold"), (2, "graph-warm"))
    )
    for policy, stages in (("eager-cold", 1), ("graph-warm", 2)):
        choice = choose(SPEC, PROBLEM, [eager, graph], HERE, DIGEST, policy)
        assert (choice.step, choice.config) == (Step.EXACT, config(stages))
        assert choose(SPEC, PROBLEM, [graph, eager], HERE, DIGEST, policy) == choice
    other = choose(SPEC, PROBLEM, [graph], HERE, DIGEST)
    assert (other.step, other.config) == (Step.OTHER_TOOLCHAIN, config(2))


def test_trials_and_guesses_for_other_machines_are_never_served(store: TuningStore) -> None:
    store.add_trial(TrialRecord(**record(), status="ok", median_us=1.0, p20_us=1.0, p80_us=1.0, samples_us=(1.0,)))
    store.add_trial(predicted(1, 1.0, HERE))  # not by the compiler for an absent GPU
    store.add_trial(predicted(2, 1.0, for_target("cuda:80")))
    store.add_trial(predicted(3, 1.0, for_target("cuda:90"), PROBLEM.replace(d_qk=64, d_v=64)))
    store.add_trial(predicted(4, 1.0, for_target("cuda:90"), status="resource"))
    stale = TrialRecord(
        **record(fingerprint=for_target("cuda:90").to_dict(), template_digest="older"),
        status="ok",
        kind="predicted",
        predicted_us=1.0,
    )
    store.add_trial(stale)
    assert Dispatcher(store, fingerprint=HERE).choose(SPEC, PROBLEM).step is Step.DEFAULT


def test_the_best_prediction_serves_where_nothing_was_measured(
    store: TuningStore, log: Callable[[], list[str]]
) -> None:
    absent = for_target("cuda:90")
    store.add_trial(predicted(1, 9.0, absent))
    store.add_trial(predicted(2, 5.0, absent))
    store.add_trial(predicted(3, 1.0, absent, LONGER))  # faster, but of another problem
    served = Dispatcher(store, fingerprint=HERE)
    choice = served.choose(SPEC, PROBLEM)
    assert (choice.step, choice.config, choice.tuned_key) == (Step.PREDICTED, config(2), SPEC.problem_key(PROBLEM))
    assert len(log()) == 1 and "serving the best prediction" in log()[0] and "nothing was measured" in log()[0]
    assert served.choose(SPEC, LONGER).config == config(3)
    newer = "9999-01-01T00:00:00.000000+00:00"
    store.add_trial(predicted(2, 10.0, absent, created=newer))  # judged anew: a guess is no record to beat
    served.refresh()
    assert served.choose(SPEC, PROBLEM).config == config(1)
    with pytest.raises(NotTuned):
        Dispatcher(store, fingerprint=HERE, strict=True).choose(SPEC, PROBLEM)


@pytest.mark.parametrize(("step", "known"), RUNGS, ids=[step.name.lower() for step, _ in RUNGS])
def test_any_winner_goes_before_a_prediction(store: TuningStore, step: Step, known: FakeWinner) -> None:
    store.add_trial(predicted(2, 0.001, for_target("cuda:90")))
    common = record(fingerprint=known.fingerprint, problem=known.problem, problem_key=known.problem_key)
    winner = WinnerRecord(
        **{**common, "config": known.config}, median_us=5.0, p20_us=5.0, p80_us=5.0, samples_us=(5.0,)
    )
    store.set_winner(winner)
    choice = Dispatcher(store, fingerprint=HERE).choose(SPEC, PROBLEM)
    assert (choice.step, choice.config) == (step, known.config)


def test_a_prediction_that_does_not_run_gives_way_to_the_default(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_trial(predicted(2, 5.0, for_target("cuda:90")))
    served = Dispatcher(store, fingerprint=HERE)
    equip(served, kernels := Kernels(config(2)), monkeypatch)
    served.launch(SPEC, "shape", lambda: PROBLEM, "cuda:0", {})
    assert [found for found, _ in kernels.launched] == [SPEC.default_config(PROBLEM)]
    assert dict(served.stats) == {Step.DEFAULT: 1}
    equip(other := Dispatcher(store, fingerprint=HERE), Kernels(), monkeypatch)
    other.launch(SPEC, "shape", lambda: PROBLEM, "cuda:0", {})
    assert dict(other.stats) == {Step.PREDICTED: 1}


# one kernel for two

((FUSED, PARTS),) = kernels.FUSED.items()


def timed(family: str, median_us: float, problem: Problem = PROBLEM, **changes: Any) -> FakeWinner:
    """A winner of a family with the time that it took."""
    spec = get_spec(family)
    facts = {"family": family, "template_digest": template_digest(spec), "median_us": median_us}
    return FakeWinner(**{"problem": problem.to_dict(), "config": spec.default_config(problem), **facts, **changes})


def fuses(*winners: FakeWinner, problem: Problem = PROBLEM, **options: Any) -> bool:
    """What a dispatcher says that knows these winners."""
    dispatcher = Dispatcher(FakeSource(*winners), fingerprint=HERE, **options)
    asked = [(get_spec(family), problem) for family in (FUSED, *PARTS)]
    found = dispatcher.fuses("shape", lambda: asked, "cuda:0")
    assert dispatcher.fuses("shape", list, "cuda:0") == found, "asked once a shape"
    assert not dispatcher.stats and not dispatcher.misses.most_asked(), "nobody misses a fused kernel"
    return found


def test_a_fused_kernel_runs_where_it_was_measured_to_be_faster(caplog: pytest.LogCaptureFixture) -> None:
    parts = [timed("win_attn_fwd", 300.0), timed("gate_sum_fwd", 200.0)]
    assert fuses(timed(FUSED, 499.0), *parts)
    assert not fuses(timed(FUSED, 500.0), *parts)
    assert not fuses(*parts) and not fuses(timed(FUSED, 1.0)) and not fuses(timed(FUSED, 1.0), parts[0])
    assert not caplog.records


@pytest.mark.parametrize("part", [0, 1])
def test_times_are_compared_that_were_taken_alike(part: int) -> None:
    def unlike(**changes: Any) -> list[FakeWinner]:
        return [timed(f, **{"median_us": 1e6, **(changes if n == part else {})}) for n, f in enumerate(PARTS)]

    fused = timed(FUSED, 1.0)
    assert fuses(fused, *unlike())
    assert not fuses(fused, *unlike(policy="graph-cold"))
    assert not fuses(fused, *unlike(fingerprint=COUSIN.to_dict()))
    assert not fuses(fused, *unlike(problem=LONGER))
    assert part or not fuses(fused, *unlike(problem=PROBLEM.replace(nsa=NSAConfig(window_size=64))))
    assert part or not fuses(fused, *unlike(problem=PROBLEM.replace(num_kv_heads=8)))
    assert part or not fuses(fused, *unlike(problem=PROBLEM.replace(layout="packed")))
    assert not fuses(fused, *unlike(median_us=None)), "a source that tells no times"
    assert not fuses(fused, *unlike(problem=PROBLEM.replace(dtype="float16")))
    assert fuses(timed(FUSED, 1.0, LONGER), *(timed(f, 9.0, LONGER) for f in PARTS)), "all of the nearest problem"


def test_a_packed_length_counts_all_sequences() -> None:
    packed, flat = PROBLEM.replace(layout="packed", batch=8), PROBLEM.replace(batch=1)
    known = [timed(FUSED, 1.0, packed), timed("win_attn_fwd", 9.0, packed), timed("gate_sum_fwd", 9.0, flat)]
    dispatcher = Dispatcher(FakeSource(*known), fingerprint=HERE)
    asked = [(get_spec(FUSED), packed), (get_spec("win_attn_fwd"), packed), (get_spec("gate_sum_fwd"), flat)]
    assert dispatcher.fuses("shape", lambda: asked, "cuda:0")


def test_a_strict_dispatcher_fuses_exact_winners_only() -> None:
    known = [timed(FUSED, 1.0), timed("win_attn_fwd", 9.0), timed("gate_sum_fwd", 9.0)]
    assert fuses(*known, strict=True)
    assert not fuses(*known, problem=LONGER, strict=True) and fuses(*known, problem=LONGER)


def test_new_winners_are_seen_after_a_refresh() -> None:
    source = FakeSource(timed("win_attn_fwd", 9.0), timed("gate_sum_fwd", 9.0))
    dispatcher = Dispatcher(source, fingerprint=HERE)
    asked = [(get_spec(family), PROBLEM) for family in (FUSED, *PARTS)]
    assert not dispatcher.fuses("shape", lambda: asked, "cuda:0")
    source.found += (timed(FUSED, 1.0),)
    assert not dispatcher.fuses("shape", lambda: asked, "cuda:0")
    dispatcher.refresh()
    assert dispatcher.fuses("shape", lambda: asked, "cuda:0")


def test_nothing_is_predicted_for_a_kernel_that_may_be_fused() -> None:
    class Guessing(FakeSource):
        def predictions(self, **_: object) -> list[object]:
            raise AssertionError("a prediction fuses nothing")

    dispatcher = Dispatcher(Guessing(timed("win_attn_fwd", 9.0)), fingerprint=HERE)
    asked = [(get_spec(family), PROBLEM) for family in (FUSED, *PARTS)]
    assert not dispatcher.fuses("shape", lambda: asked, "cuda:0")


def test_what_no_kernel_serves_is_not_fused() -> None:
    known = [timed(FUSED, 1.0), timed("win_attn_fwd", 9.0), timed("gate_sum_fwd", 9.0)]
    assert not fuses(*known, problem=PROBLEM.replace(d_qk=7))


# the command and the fingerprint


@pytest.mark.parametrize("family", list(all_specs()))
@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        PROBLEM.replace(seq_q=1000, seq_k=1000, batch=3, d_qk=192, dtype="float16", locality=0.8),
        PROBLEM.replace(layout="packed", batch=5, num_q_heads=40, num_kv_heads=8, d_qk=96, d_v=96),
        PROBLEM.replace(nsa=NSAConfig(16, 8, 32, num_selected=8, num_local=1, window_size=256)),
    ],
    ids=["plain", "other_sizes", "packed", "other_constants"],
)
def test_the_command_tunes_just_the_problem_that_was_served(
    family: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, planned = get_spec(family), []
    (problem, *_) = tuning_problems(spec, served(spec, problem))  # what the operators ask for

    def execute(run: Any) -> int:
        planned.extend(run.work)
        return 0

    monkeypatch.setattr("nsa_autotune.cli.tune.execute", execute, raising=False)
    monkeypatch.setattr("nsa_autotune.cli.tune_run.execute", execute)
    program, *arguments = tune_command(spec, problem).split()
    said = [b if a == "--nsa" else a for a, b in itertools.pairwise(arguments) if a.startswith("--")]
    assert len(set(said)) == len(said)  # nothing twice
    assert program == "nsa-autotune"
    result = CliRunner().invoke(app, [*arguments, "--target", "cuda:90"])
    assert result.exit_code == 0, result.output
    assert spec.problem_key(problem) in {one.problem_key(part) for one, part in planned}
    assert {one.family for one, _ in planned} == {family}


def test_the_fingerprint_of_a_target_is_unlike_any_gpus() -> None:
    made = for_target("cuda:90")
    assert (made.gpu, made.capability, made.driver, made.torch) == ("target cuda:90", "9.0", "", "")
    assert for_target("cuda:100").capability == "10.0"
    assert for_target("hip:gfx942").capability == "gfx942"
    assert re.fullmatch(r"\d+\.\d+.*", made.triton)
    assert len({made.digest, HERE.digest, OLD.digest}) == 3
    assert Fingerprint(**made.to_dict()) == made


def test_a_fingerprint_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    current.cache_clear()
    with pytest.raises(InvalidInput, match="a fingerprint needs a CUDA device"):
        current("cuda:0")


def test_a_prediction_stored_as_a_winner_is_not_served() -> None:
    spec, problem = get_spec("gate_sum_fwd"), Problem()
    config = {**spec.default_config(problem), "BLOCK": 512}
    winner = FakeWinner(problem.to_dict(), config, for_target("cuda:90").to_dict(), family="gate_sum_fwd")
    assert choose(spec, problem, [winner], HERE, DIGEST).step is Step.DEFAULT
