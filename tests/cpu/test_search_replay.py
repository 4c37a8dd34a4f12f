"""Recorded spaces: what they hold, searches replayed on them, and the judgement of a cost model; all times invented."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from cpu.recorded_fakes import A100, H100, TEMPLATE, invented_records, invented_time, some_configs

from nsa_autotune.bench.worker import MEASURE_ROUNDS
from nsa_autotune.cli.app import main
from nsa_autotune.db.records import TrialRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.ahead import Prepared
from nsa_autotune.search.correction import Correction
from nsa_autotune.search.guess import model_us
from nsa_autotune.search.judge import geometric_loss, judge_all, judge_model
from nsa_autotune.search.recorded import RecordedSpace, make_space, spaces_of
from nsa_autotune.search.replay import (
    METHODS,
    OVERHEAD_S,
    ReplayClock,
    ReplayMeasurer,
    ReplayPreparer,
    learned_elsewhere,
    parse_replay_budget,
    rank_recorded,
    replay,
    replay_all,
    summarize_runs,
)
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.spec import Problem

SPEC = get_spec("win_attn_fwd")
PROBLEM = Problem(seq_q=8192, seq_k=8192)
LONGER = Problem(seq_q=16_384, seq_k=16_384)
COUNT = 160
RECORDS = invented_records(SPEC.family, PROBLEM, COUNT)
SPACE = make_space(SPEC, RECORDS)
PLAIN = Correction(SPEC, "the plain model")


# what a space holds


def test_a_space_holds_the_recorded_configs_and_no_others() -> None:
    recorded = {config_key(record.config) for record in RECORDS}
    space = ConfigSpace(SPACE.spec, PROBLEM)
    found = space.all_if_at_most(COUNT)
    assert found is not None and {config_key(config) for config in found} == recorded == set(SPACE.configs)
    other = next(c for c in ConfigSpace(SPEC, PROBLEM).configs() if config_key(c) not in recorded)
    assert not space.is_legal(other) and ConfigSpace(SPEC, PROBLEM).is_legal(other)
    assert SPACE.spec.default_config(PROBLEM) == SPEC.default_config(PROBLEM)


def test_a_space_that_was_recorded_whole_is_searched_as_on_a_gpu() -> None:
    """Without a list of configs; the reserve of its parameters was not recorded."""
    spec = get_spec("cmp_pool_fwd")
    legal = sum(1 for _ in ConfigSpace(spec, PROBLEM).configs())
    records = invented_records(spec.family, PROBLEM, legal)
    whole, most = make_space(spec, records), make_space(spec, records[:-1])
    assert whole.spec.only is None and most.spec.only is not None and len(most.spec.only) == legal - 1
    assert {config_key(config) for config in ConfigSpace(whole.spec, PROBLEM).configs()} == set(whole.configs)
    assert all(not param.reserve for param in whole.spec.params) and any(param.reserve for param in spec.params)
    found = replay(whole, "tune", f"{legal}", seed=0)
    assert found.num_measured >= legal and found.regret is not None and found.regret < 0.02


def test_samples_of_all_measurements_of_a_config_count_and_a_later_failure_does_not() -> None:
    first = RECORDS[0]
    raced = replace(first, stage="final", samples_us=(1.0, 2.0), median_us=1.5, created="2026-02-01T00:00:00+00:00")
    failed = TrialRecord(**{**_shared(first), "status": "crash", "created": "2026-03-01T00:00:00+00:00"})
    space = make_space(SPEC, [failed, raced, *RECORDS])
    found = space.configs[config_key(first.config)].result
    assert found.ok and found.samples_us == (*first.samples_us, 1.0, 2.0)
    assert found.median_us == median(found.samples_us) and found.resources == first.resources


def _shared(record: TrialRecord) -> dict[str, object]:
    names = ("fingerprint", "family", "problem", "problem_key", "config", "template_digest")
    return {name: getattr(record, name) for name in names}


def test_problems_gpus_and_templates_are_spaces_of_their_own() -> None:
    groups = [
        RECORDS,
        invented_records(SPEC.family, LONGER, 60),
        invented_records(SPEC.family, PROBLEM, 60, fingerprint=A100),
        [replace(record, template_digest="newer") for record in RECORDS[:60]],
        invented_records("slc_attn_fwd", PROBLEM, 60),
    ]
    prediction = replace(RECORDS[0], kind="predicted", predicted_us=1.0)
    library = replace(RECORDS[0], provider="flex_attention", config={})
    spaces, refused = spaces_of([r for group in groups for r in group] + [prediction, library], all_specs())
    assert refused == []
    assert sorted(len(space.configs) for space in spaces) == sorted(len(group) for group in groups)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (RECORDS[1:], "needs its default config"),
        (RECORDS[:12], "needs 16 configs that work; got problem="),
        ([replace(r, config={**r.config, "BLOCK_N": 48}) for r in RECORDS], "needs 16 configs"),
    ],
    ids=["no_default", "too_few", "retired_values"],
)
def test_what_cannot_be_replayed_is_left_out_with_its_reason(records: list[TrialRecord], words: str) -> None:
    spaces, refused = spaces_of([*records, *invented_records("slc_attn_fwd", PROBLEM, 60)], all_specs())
    assert [space.family.family for space in spaces] == ["slc_attn_fwd"]
    assert len(refused) == 1 and refused[0].startswith("win_attn_fwd: ") and words in refused[0]


def test_an_export_is_all_that_a_replay_needs(tmp_path: Path) -> None:
    path = tmp_path / "space.jsonl"
    with TuningStore("sqlite://", import_shipped=False) as store:
        for record in RECORDS:
            store.add_trial(record)
        store.export_jsonl(path, records=("trial",))
    with TuningStore("sqlite://", import_shipped=False) as other:
        other.import_jsonl(path)
        ((space,), _) = spaces_of(other.trials(), all_specs())
    assert space.configs == SPACE.configs
    assert replay(space, "tune", "10%", 3) == replay(SPACE, "tune", "10%", 3)


# the stand-ins


def measurer(seed: int = 0, space: RecordedSpace = SPACE) -> ReplayMeasurer:
    """With a clock of its own."""
    return ReplayMeasurer(space, seed, ReplayClock())


def test_noise_is_drawn_from_what_was_recorded_by_seed() -> None:
    config = SPEC.default_config(PROBLEM)
    recorded = SPACE.configs[config_key(config)].result
    one, same, other = (measurer(seed).measure(SPEC.family, PROBLEM, config) for seed in (1, 1, 2))
    assert one == same and one.samples_us != other.samples_us
    assert set(one.samples_us) <= set(recorded.samples_us) and len(one.samples_us) == MEASURE_ROUNDS
    assert one.resources == recorded.resources and one.median_us == median(one.samples_us)
    (raced,) = measurer().race(SPEC.family, PROBLEM, [config], rounds=7)
    assert len(raced.samples_us) == 7


def test_failures_are_as_recorded_and_the_unknown_is_a_constraint() -> None:
    broken = next(record for record in RECORDS if record.status == "accuracy")
    found = measurer().measure(SPEC.family, PROBLEM, broken.config)
    assert (found.status, found.reason) == ("accuracy", "wrong")
    unknown = next(c for c in ConfigSpace(SPEC, PROBLEM).configs() if config_key(c) not in SPACE.configs)
    assert measurer().measure(SPEC.family, PROBLEM, unknown).status == "constraint"


def test_time_is_charged_for_measuring_and_compiling() -> None:
    config = SPEC.default_config(PROBLEM)
    watched = measurer()
    result = watched.measure(SPEC.family, PROBLEM, config)
    assert watched.clock.now_s == pytest.approx(OVERHEAD_S + 3 * sum(result.samples_us) / 1e6)
    records = [replace(RECORDS[0], resources={**(RECORDS[0].resources or {}), "compile_ms": 8000.0}), *RECORDS[1:]]
    preparer = ReplayPreparer(make_space(SPEC, records), ReplayClock())
    preparer.submit(SPEC, PROBLEM, [config])
    assert preparer.take() == [Prepared(config, resources=records[0].resources)]
    assert preparer.clock.now_s == pytest.approx(0.5)  # 8 s on one core of 16
    refused = replace(RECORDS[1], status="resource", reason="spills", samples_us=(), median_us=None)
    space = make_space(SPEC, [RECORDS[0], refused, *RECORDS[2:]])
    preparer = ReplayPreparer(space, ReplayClock())
    preparer.submit(SPEC, PROBLEM, [refused.config])
    (found,) = preparer.take()
    assert found.config == refused.config and found.failure is not None and found.failure.reason == "spills"


# searches


def test_a_replay_is_the_real_search_and_its_regret_is_known() -> None:
    run = replay(SPACE, "tune", "25%", 0)
    assert run == replay(SPACE, "tune", "25%", 0)
    assert run.num_measured == 40 and run.num_configs == COUNT
    best_us = min(median(record.samples_us) for record in RECORDS if record.samples_us)
    assert SPACE.best_us == best_us
    assert run.regret is not None and 0 <= run.regret < 0.3 and run.minutes > 40 * OVERHEAD_S / 60


def test_the_whole_space_holds_no_regret_but_noise() -> None:
    for method in METHODS:
        run = replay(SPACE, method, "100%", 1, PLAIN)
        assert run.num_measured == COUNT
        assert run.regret is not None and run.regret < 0.01, method


def test_seeds_of_a_corrected_model_beat_chance() -> None:
    records = {n: invented_records(SPEC.family, Problem(seq_q=n, seq_k=n), COUNT) for n in (4096, 8192, 16_384)}
    spaces = [make_space(SPEC, found) for found in records.values()]
    correction = learned_elsewhere(spaces[1], spaces)
    assert correction.is_used and "2 problems" in correction.note  # not its own
    seeded = summarize_runs([replay(spaces[1], "tune+model", "15%", seed, correction) for seed in range(2)])
    assert seeded.worst_regret is not None and seeded.worst_regret < 0.01
    chance = [replay(spaces[1], "random", "15%", seed).regret or 0.0 for seed in range(40)]
    assert sum(chance) / 40 > 0.03


def test_minutes_end_a_replay_on_its_own_clock() -> None:
    for method in ("tune", "random"):
        run = replay(SPACE, method, "3s", 0)
        assert 3 <= run.num_measured <= 32 and run.minutes < 0.5, method


def test_every_kind_of_search_is_run_from_every_seed() -> None:
    runs = list(replay_all([SPACE], ["random"], ["5%", "10%"], range(2)))
    assert [(space is SPACE, run.method, run.budget, run.seed) for space, run in runs] == [
        (True, "random", budget, seed) for budget in ("5%", "10%") for seed in (0, 1)
    ]
    assert summarize_runs([replace(runs[0][1], regret=None)]).num_failed == 1
    with pytest.raises(InvalidInput, match=r"method must be one of tune, tune\+model, random"):
        replay(SPACE, "guess", "5%", 0)


@pytest.mark.parametrize(("text", "trials"), [("25%", 50), ("1%", 2), ("0.5%", None), ("quick", 60), ("101%", None)])
def test_budgets_may_be_shares(text: str, trials: int | None) -> None:
    if trials is None:
        with pytest.raises(InvalidInput, match="whole percentage"):
            parse_replay_budget(text, 200)
    else:
        assert parse_replay_budget(text, 200).max_trials == trials


# the judgement of a cost model


def timed_by(law: Callable[[float], float]) -> list[TrialRecord]:
    """The recorded space with times that are a function of the plain model's."""

    def timed(record: TrialRecord) -> TrialRecord:
        time_us = law(model_us(SPEC, record) or math.nan)
        return replace(record, samples_us=(time_us,), median_us=time_us, p20_us=time_us, p80_us=time_us)

    return [timed(record) if record.status == "ok" else record for record in RECORDS]


def test_a_model_that_knows_the_order_is_judged_perfect() -> None:
    found = judge_model(timed_by(lambda guess_us: guess_us**2))
    assert found.best_in_first_16 and found.loss_of_first == 0.0


def test_a_model_that_has_it_upside_down_is_found_out() -> None:
    records = timed_by(lambda guess_us: 1e9 / guess_us)
    found = judge_model(records)
    times = [record.median_us for record in records if record.median_us]
    assert not found.best_in_first_16
    assert found.loss_of_first == pytest.approx(max(times) / min(times) - 1)


def test_near_the_best_is_near_enough() -> None:
    guesses = sorted({model_us(SPEC, record) or 0.0 for record in RECORDS if record.status == "ok"})
    far = guesses[-1]  # the fastest is the one that the model puts last
    for best_us, right in ((96.0, True), (95.0, False)):
        found = judge_model(timed_by(lambda guess_us, best_us=best_us: best_us if guess_us == far else 100.0))
        assert found.best_in_first_16 is right  # 100 is 4.2% or 5.3% more
        assert found.loss_of_first == pytest.approx(100 / best_us - 1)


def test_equal_machine_code_is_guessed_once() -> None:
    shared = [
        replace(r, resources={**r.resources, "binary_sha": f"warps {r.config['num_warps']}"}) if r.resources else r
        for r in RECORDS
    ]
    ranked = rank_recorded(make_space(SPEC, shared), PLAIN)
    plain = {(r.config["num_warps"], model_us(SPEC, r)) for r in RECORDS if r.status == "ok"}
    assert len(ranked) == len(plain) < len(rank_recorded(SPACE, PLAIN))
    guesses = [guess_us for _, guess_us in ranked]
    assert guesses == sorted(guesses)


def test_each_problem_is_judged_by_the_others() -> None:
    spaces = [make_space(SPEC, invented_records(SPEC.family, Problem(seq_q=n, seq_k=n), COUNT)) for n in (4096, 8192)]
    spaces.append(make_space(get_spec("slc_attn_fwd"), invented_records("slc_attn_fwd", PROBLEM, 60)))
    first, second, alone = judge_all(spaces)
    assert alone is not None and "0 measured problems" in alone.note
    assert first is not None and second is not None
    assert "1 measured problems" in first.note and "1 measured problems" in second.note
    assert geometric_loss([first, second]) == pytest.approx(
        math.sqrt((1 + first.loss_of_first) * (1 + second.loss_of_first)) - 1
    )


def test_without_resources_a_model_cannot_be_judged() -> None:
    bare = [replace(record, resources=None) for record in RECORDS]
    with pytest.raises(InvalidInput, match="tell their resources"):
        judge_model(bare)
    with pytest.raises(InvalidInput, match="recorded trials"):
        judge_model([])
    assert judge_all([make_space(SPEC, bare)]) == [None]


# the command


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A file with two problems, as `db export --records all` writes it."""
    path = tmp_path / "recorded.jsonl"
    with TuningStore("sqlite://", import_shipped=False) as store:
        for record in (*RECORDS, *invented_records(SPEC.family, LONGER, COUNT)):
            store.add_trial(record)
        store.export_jsonl(path)
    return path


def test_the_command_reports_as_json(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["replay", str(export), "--budgets", "5%,10%", "--methods", "random,tune", "--repeats", "2"]
    assert main([*line, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["searches"]) == 8 and len(report["over_all_spaces"]) == 4
    first = next(row for row in report["searches"] if "T 8192" in row["problem"] and row["method"] == "random")
    runs = [replay(SPACE, "random", "5%", seed) for seed in (0, 1)]
    assert first["median_regret"] == median(run.regret or 0.0 for run in runs)
    assert (first["num_runs"], first["num_measured"], first["configs"]) == (2, 8, COUNT)
    assert report["model_over_all_spaces"][0]["spaces"] == 2 == len(report["model"])


def test_the_command_prints_tables(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(export), "--budgets", "5%", "--methods", "random", "--repeats", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "replayed searches" in out and "T 16384 HQ 64 H 4 d 128 bfloat16" in out and "all" in out
    assert "a config within 5% of the best is among the model's first 16 in" in out and "of 2 spaces" in out


def test_a_packed_export_is_read_as_it_was(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, cut = export.with_suffix(".jsonl.gz"), export.with_name("cut.gz")
    packed.write_bytes(gzip.compress(export.read_bytes()))
    line = ["--budgets", "5%", "--methods", "random", "--repeats", "1", "--format", "json"]
    assert main(["replay", str(export), *line]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["replay", str(packed), *line]) == 0
    assert json.loads(capsys.readouterr().out) == plain
    for content in (packed.read_bytes()[:-9], b"junk", b""):
        cut.write_bytes(content)
        assert main(["replay", str(cut), *line]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "cannot be read" in told or "no recorded space" in told


def test_a_database_is_replayed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'tuned.sqlite'}"
    with TuningStore(url, import_shipped=False) as store:
        for record in RECORDS:
            store.add_trial(replace(record, resources=None))
    line = ["replay", "--db", url, "--budgets", "5%", "--methods", "random", "--repeats", "1"]
    assert main([*line, "--gpu", "h100", "--families", "win_attn_fwd"]) == 0
    assert "the cost model is not judged" in capsys.readouterr().err
    assert main([*line, "--gpu", "a100"]) == 2
    assert "db export --records all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "lots"], "budget"),
        (["--methods", "anneal"], "method"),
        (["--families", "nothing"], "nothing"),
        (["--format", "csv"], "a table or JSON"),
        (["--db", "sqlite://"], "from files or from a database"),
    ],
)
def test_mistakes_are_told(export: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(export), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert main(["replay", str(export.with_name("absent.jsonl"))]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_invented_space_is_no_roofline() -> None:
    """Else these tests would prove the model by itself."""
    truth = invented_time(SPEC, PROBLEM)
    configs = some_configs(SPEC, PROBLEM, COUNT)
    assert len({truth(config) for config in configs}) == COUNT
    assert judge_model(RECORDS).loss_of_first > 0.15, "what the model takes for the fastest"
    assert {record.template_digest for record in RECORDS} == {TEMPLATE} and RECORDS[0].fingerprint == H100
