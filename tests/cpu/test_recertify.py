"""Stale winners: which they are, when their result carries over, when they race, and when a loss opens a search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cpu.search_fakes import (
    DEFAULT,
    FINGERPRINT,
    PARAMS,
    PROBLEM,
    SPEC,
    FakeMeasurer,
    digest_of,
    make_landscape,
    make_spec,
    trials,
)

from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.pool import CompileJob, CompileOutcome
from nsa_autotune.db.records import WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.search.confirm import confirm_winner
from nsa_autotune.search.drift import BEST, candidates, expected_cost, known_codes, stale_winners
from nsa_autotune.search.recertify import (
    Recertified,
    Search,
    candidate_jobs,
    compile_candidates,
    forecast,
    recertify_winner,
    stored_trials,
    unconfirmed,
)
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.search.task import Task, known_winner, seed_configs
from nsa_autotune.search.tuner import tune_problem
from nsa_autotune.spec import Config, KernelSpec, Param, Problem, digest

HERE = {**FINGERPRINT, "triton": "4"}
NEW_TEMPLATE = "digest of another template"
SPECS, DIGESTS = {SPEC.family: SPEC}, {SPEC.family: digest_of(SPEC)}


def warps(count: int) -> Config:
    return {**DEFAULT, "num_warps": count}


def code_of(config: Config, version: str = "") -> dict[str, Any]:
    """What a measurement stores of the code that it ran."""
    name = config_key(config)
    return {"registers": 64, "binary_sha": digest([name, version]), "launch_sha": digest(["launch", name])}


def old_winner(config: Config, rivals: Sequence[tuple[Config, float, bool]] = (), **changes: Any) -> WinnerRecord:
    """A confirmed winner of 100 us, where the default takes 130; rivals as (config, log-ratio, tied)."""
    told = [
        {"config": c, "tied": tied, "blocks": 60, "log_ratio": ratio, "low": ratio, "high": ratio}
        for c, ratio, tied in rivals
    ]
    record = WinnerRecord(
        fingerprint=FINGERPRINT,
        family=SPEC.family,
        problem=PROBLEM.to_dict(),
        problem_key=SPEC.problem_key(PROBLEM),
        config=config,
        template_digest=digest_of(SPEC),
        median_us=100.0,
        p20_us=99.0,
        p80_us=101.0,
        samples_us=(99.0, 100.0, 101.0),
        default_config=dict(DEFAULT),
        default_median_us=130.0,
        library="flex_attention",
        library_median_us=200.0,
        verdict="confirmed",
        rivals=tuple(told),
        resources=code_of(config),
    )
    return replace(record, **changes)


@dataclass
class Compiler:
    """Gives each config the code that was stored for it, but for those named in `changed` or in `failing`."""

    changed: Sequence[Config] = ()
    failing: Sequence[Config] = ()
    launch: str = ""  # replaces the identity of the host code
    jobs: list[CompileJob] = field(default_factory=list)

    def __call__(self, jobs: Sequence[CompileJob]) -> Iterator[CompileOutcome]:
        for job in jobs:
            self.jobs.append(job)
            if job.config in self.failing:
                yield CompileOutcome(job, "compile", "the assembler refuses it")
                continue
            code = code_of(job.config, "new" if job.config in self.changed else "")
            launch = self.launch or code["launch_sha"]
            yield CompileOutcome(
                job, "ok", resources=Resources(64, 0, 0, 4, code["binary_sha"], 1.0, launch_sha=launch)
            )


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def times(landscape: dict[int, float]) -> FakeMeasurer:
    """A measurer of configs that differ in their warps; others take 500 us."""
    return FakeMeasurer(lambda config: landscape.get(int(config["num_warps"]), 500.0))


def recertify(
    store: TuningStore,
    measurer: FakeMeasurer,
    compiler: Compiler | None,
    *,
    here: dict[str, str] = HERE,
    template: str = digest_of(SPEC),
    search: Search | None = None,
) -> Recertified:
    """Recertify the one stale winner of the store."""
    (stale,) = stale_winners(store.winners(), here, SPECS, {SPEC.family: template})
    task = Task(SPEC, PROBLEM, here, template)
    return recertify_winner(stale, task, measurer=measurer, store=store, compiler=compiler, search=search)


# which winners are stale


@pytest.mark.parametrize(
    ("fields", "template", "changed"),
    [
        ({"driver": "2"}, "", ("driver",)),
        ({"cuda": "13"}, "", ("cuda",)),
        ({"torch": "3"}, "", ("torch",)),
        ({"triton": "4"}, "", ("triton",)),
        ({"assembler": "ptxas 13.0"}, "", ("assembler",)),
        ({}, NEW_TEMPLATE, ("template",)),
        ({"triton": "4", "driver": "2"}, NEW_TEMPLATE, ("driver", "triton", "template")),
    ],
)
def test_a_stale_winner_names_what_changed(fields: dict[str, str], template: str, changed: tuple[str, ...]) -> None:
    digests = {SPEC.family: template or digest_of(SPEC)}
    (stale,) = stale_winners([old_winner(warps(2))], {**FINGERPRINT, **fields}, SPECS, digests)
    assert stale.changed == changed and stale.other_template == bool(template)
    assert stale.reason == ", ".join(changed)


def test_each_problem_and_policy_is_stale_once_by_its_newest_winner_unless_a_current_one_is_there() -> None:
    first = old_winner(warps(1), created="2026-01-01T00:00:00+00:00")
    newer = replace(first, fingerprint={**FINGERPRINT, "driver": "0"}, created="2026-02-01T00:00:00+00:00")
    graph = replace(first, policy="graph-warm")
    longer = PROBLEM.replace(seq_q=4096, seq_k=4096)
    other = replace(newer, problem=longer.to_dict(), problem_key=SPEC.problem_key(longer))
    gone = replace(first, family="gone_fwd")
    found = stale_winners([first, newer, graph, other, gone], HERE, SPECS, DIGESTS)
    assert [(s.winner.created[:7], s.winner.policy, s.winner.problem["seq_k"]) for s in found] == [
        ("2026-02", "eager-cold", 512),
        ("2026-02", "eager-cold", 4096),
        ("2026-01", "graph-warm", 512),
    ]
    assert found[0].changed == ("driver", "triton")
    newest = replace(first, template_digest="of yesterday", created="2026-03-01T00:00:00+00:00")
    assert stale_winners([newest, newer], HERE, SPECS, DIGESTS)[0].winner == newer, "the other is not served"
    current = replace(first, fingerprint=HERE)
    left = stale_winners([first, newer, graph, other, current], HERE, SPECS, DIGESTS)
    assert [(s.winner.policy, s.winner.problem["seq_k"]) for s in left] == [("eager-cold", 4096), ("graph-warm", 512)]


def test_without_a_gpu_only_what_decides_on_machine_code_counts() -> None:
    winner = old_winner(warps(1), fingerprint={**FINGERPRINT, "assembler": "ptxas 12.8"})
    assert stale_winners([winner], {"triton": "3", "assembler": "ptxas 12.8"}, SPECS, DIGESTS) == []
    (stale,) = stale_winners([winner], {"triton": "3", "assembler": "ptxas 13.0"}, SPECS, DIGESTS)
    assert stale.changed == ("assembler",)


# what is compiled


def test_candidates_are_the_winner_its_ties_the_next_and_the_fastest_trials(store: TuningStore) -> None:
    winner = old_winner(warps(2), [(warps(8), 0.05, False), (warps(1), 0.0, True), (DEFAULT, 0.2, False)])
    task, measurer = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC)), times({})
    for stages, time_us in (((3, 140.0)), (4, 120.0), (5, 110.0), (1, 999.0)):
        config = {**DEFAULT, "num_stages": stages}
        result = replace(measurer.measure(SPEC.family, PROBLEM, config), median_us=time_us)
        store.add_trial(task.trial(config, result, "search"))
    longer = PROBLEM.replace(seq_q=500, seq_k=500)  # of the same bucket, but it takes other times
    elsewhere = replace(task, problem=longer)
    store.add_trial(elsewhere.trial(warps(16), replace(result, median_us=1.0), "search"))
    store.set_winner(winner)
    (stale,) = stale_winners([winner], HERE, SPECS, DIGESTS)
    found = candidates(stale, SPEC, stored_trials(stale, store))
    by_trials = [{**DEFAULT, "num_stages": stages} for stages in (5, 4, 3, 1)]
    assert found == [warps(2), warps(1), warps(8), *by_trials, DEFAULT]
    assert candidates(stale, SPEC, stored_trials(stale, store), count=2) == [warps(2), warps(1), DEFAULT]


def test_what_is_not_legal_any_more_is_left_out() -> None:
    too_large = {**DEFAULT, "BLOCK_N": 128, "num_stages": 5, "order": "union", "BLOCK_T": 16}
    (stale,) = stale_winners([old_winner(too_large, [({"BLOCK_N": 1}, 0.0, True)])], HERE, SPECS, DIGESTS)
    assert candidates(stale, SPEC, []) == [DEFAULT]


def test_the_code_of_trials_counts_where_the_winner_does_not_tell_its_own(store: TuningStore) -> None:
    winner = old_winner(warps(2), resources=None)
    task, measurer = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC)), times({})
    result = replace(measurer.measure(SPEC.family, PROBLEM, warps(2)), resources={"binary_sha": "ab"})
    store.add_trial(task.trial(warps(2), result, "final"))
    (stale,) = stale_winners([winner], HERE, SPECS, DIGESTS)
    assert known_codes(stale, stored_trials(stale, store)) == {config_key(warps(2)): {"binary_sha": "ab"}}
    (stale,) = stale_winners([winner], HERE, SPECS, {SPEC.family: NEW_TEMPLATE})
    assert known_codes(stale, stored_trials(stale, store)) == {}, "another template may launch it differently"


# carrying over


def test_the_same_machine_code_is_not_measured_again(store: TuningStore) -> None:
    old = old_winner(warps(2), [(warps(1), 0.001, True), (warps(8), 0.05, False), (DEFAULT, math.log(1.3), False)])
    store.set_winner(old)
    task = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC))
    for config in (warps(1), warps(8), DEFAULT):
        result = replace(times({}).measure(SPEC.family, PROBLEM, config), resources=code_of(config))
        store.add_trial(task.trial(config, result, "final"))
    measurer = times({})
    done = recertify(store, measurer, Compiler(changed=[warps(8)]))
    assert measurer.measured == [] and measurer.races == []
    assert done.ending == "carried" and done.loss is None and not done.searched
    (new,) = store.winners(fingerprint_digest=digest(HERE))
    assert done.winner == new and new.verdict == "carried" and new.config == warps(2)
    assert (new.median_us, new.samples_us, new.default_median_us) == (100.0, old.samples_us, 130.0)
    assert new.tied == [warps(1)] and [rival["config"] for rival in new.rivals] == [warps(1), DEFAULT]
    assert new.resources is not None and new.resources["carried_from"] == digest(FINGERPRINT)
    assert (new.library, new.library_median_us) == ("flex_attention", 200.0), "torch and driver are the same"
    assert stale_winners(store.winners(), HERE, SPECS, DIGESTS) == []
    assert store.winners(fingerprint_digest=digest(FINGERPRINT)) == [old], "the old winner stays"


def test_a_default_with_other_code_and_a_library_of_another_torch_are_not_carried(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    done = recertify(store, times({}), Compiler(), here={**FINGERPRINT, "torch": "3"})
    assert done.ending == "carried" and done.winner is not None
    assert (done.winner.library, done.winner.library_median_us) == ("", None)
    assert done.winner.default_median_us is None, "nothing is known of the default's code"


def test_a_carried_winner_keeps_where_it_was_measured_and_whose_it_is(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), source="imported", created="2026-01-01T00:00:00+00:00"))
    recertify(store, times({}), Compiler())
    done = recertify(store, times({}), Compiler(), here={**HERE, "driver": "7"})
    assert done.stale.changed == ("driver",) and done.ending == "carried"
    assert done.winner is not None and done.winner.source == "imported"
    assert done.winner.resources is not None and done.winner.resources["carried_from"] == digest(FINGERPRINT)


def test_another_template_carries_over_only_with_the_same_launch(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = times({2: 100.0, 4: 130.0})
    assert recertify(store, measurer, Compiler(), here=FINGERPRINT, template=NEW_TEMPLATE).ending == "carried"
    assert measurer.races == []
    other_grid = Compiler(launch="another grid")
    assert recertify(store, measurer, other_grid, here=FINGERPRINT, template="a third").ending == "kept"
    assert len(measurer.races) == 1


@pytest.mark.parametrize("lacks", ["binary_sha", "launch_sha"])
def test_without_a_record_of_the_code_it_races(store: TuningStore, lacks: str) -> None:
    told = {name: value for name, value in code_of(warps(2)).items() if name != lacks}
    store.set_winner(old_winner(warps(2), resources=told))
    done = recertify(store, times({2: 100.0, 4: 130.0}), Compiler(), template=NEW_TEMPLATE)
    assert done.ending == "kept"


def test_without_a_compiler_for_the_gpu_everything_races(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    assert recertify(store, times({2: 100.0, 4: 130.0}), None).ending == "kept"


# racing


def test_other_machine_code_races_with_the_default_as_sentinel(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), [(warps(1), 0.0, True), (warps(8), 0.1, False)]))
    measurer = times({1: 101.5, 2: 100.0, 4: 130.0, 8: 110.0})
    done = recertify(store, measurer, Compiler(changed=[warps(2)]))
    assert measurer.races == [[warps(2), warps(1), warps(8), DEFAULT]] and measurer.sentinels == [3]
    assert done.ending == "kept" and done.loss is not None and not done.loss.is_real
    assert done.loss.slower == pytest.approx(0.0) and done.loss.overtaken == 0.0
    new = known_winner(store, Task(SPEC, PROBLEM, HERE, digest_of(SPEC)))
    assert new == done.winner and new is not None and new.verdict == "provisional"
    assert (new.median_us, new.default_median_us, len(new.samples_us)) == (100.0, 130.0, 60)
    stored = store.trials(fingerprint_digest=digest(HERE))
    assert {(config_key(t.config), t.stage, t.median_us) for t in stored} == {
        (config_key(warps(n)), "final", measurer.time_us(warps(n))) for n in (1, 2, 4, 8)
    }


def test_a_member_of_the_old_tie_set_keeps_it(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), [(warps(1), 0.0, True)]))
    done = recertify(store, times({1: 98.0, 2: 100.0, 4: 130.0}), Compiler(changed=[warps(2)]))
    assert done.ending == "kept" and done.winner is not None and done.winner.config == warps(1)


def test_another_of_the_best_few_replaces_it_and_a_real_loss_is_told(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), [(warps(8), 0.02, False)]))
    searched: list[Problem] = []
    done = recertify(store, times({2: 110.0, 4: 130.0, 8: 100.0}), Compiler(changed=[warps(2)]))
    assert done.ending == "replaced" and done.winner is not None and done.winner.config == warps(8)
    assert done.loss is not None and done.loss.is_real and not done.searched
    assert done.loss.overtaken == pytest.approx(math.log(1.1)) and done.loss.slower == pytest.approx(0.0)
    assert searched == []


def test_absolute_drift_is_no_loss_where_the_default_drifted_too(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    done = recertify(store, times({2: 120.0, 4: 156.0}), Compiler(changed=[warps(2)]))
    assert done.loss is not None and done.loss.slower == pytest.approx(0.0) and not done.loss.is_real


def test_a_default_that_got_other_code_is_no_yardstick(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    task = Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC))
    result = replace(times({}).measure(SPEC.family, PROBLEM, DEFAULT), resources=code_of(DEFAULT))
    store.add_trial(task.trial(DEFAULT, result, "final"))
    done = recertify(store, times({2: 120.0, 4: 156.0}), Compiler(changed=[warps(2), DEFAULT]))
    assert done.loss is not None and done.loss.slower == pytest.approx(math.log(1.2)) and done.loss.is_real


def test_of_a_default_that_won_absolute_times_are_compared(store: TuningStore) -> None:
    store.set_winner(old_winner(DEFAULT, default_median_us=100.0))
    done = recertify(store, times({4: 105.0}), Compiler(changed=[DEFAULT]))
    assert done.ending == "kept" and done.loss is not None
    assert done.loss.slower == pytest.approx(math.log(1.05)) and done.loss.is_real


def test_an_old_winner_that_does_not_compile_is_a_loss_and_its_failure_is_stored(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), [(warps(1), 0.0, True)]))
    measurer = times({1: 100.0, 2: 1.0, 4: 130.0})
    done = recertify(store, measurer, Compiler(failing=[warps(2)]))
    assert measurer.races == [[warps(1), DEFAULT]]
    assert done.loss is not None and done.loss.overtaken == math.inf and done.loss.is_real
    assert done.winner is not None and done.winner.config == warps(1)
    (failed,) = store.trials(fingerprint_digest=digest(HERE), status="compile")
    assert failed.config == warps(2) and failed.reason == "the assembler refuses it"


def test_if_nothing_works_there_is_no_winner_and_the_problem_stays_stale(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    done = recertify(store, times({}), Compiler(failing=[warps(2), DEFAULT]))
    assert (done.ending, done.winner, done.loss) == ("failed", None, None)
    assert len(stale_winners(store.winners(), HERE, SPECS, DIGESTS)) == 1


# searching


def searcher(store: TuningStore, measurer: FakeMeasurer, count: int = 20) -> Search:
    """Opens a search of so many trials under the present versions."""

    def search(spec: KernelSpec, problem: Problem) -> WinnerRecord | None:
        return tune_problem(
            spec, problem, measurer=measurer, store=store, fingerprint=HERE, budget=trials(count), digest_of=digest_of
        )

    return search


def test_only_a_real_loss_opens_a_search(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = times({2: 102.0, 4: 130.0})  # 2 % slower against the default
    done = recertify(store, measurer, Compiler(changed=[warps(2)]), search=searcher(store, measurer))
    assert not done.searched and measurer.measured == []


def test_a_search_that_finds_better_replaces_the_raced_winner(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = FakeMeasurer(make_landscape(seed=1))
    done = recertify(store, measurer, Compiler(failing=[warps(2)]), search=searcher(store, measurer, 60))
    assert done.searched and done.ending == "replaced" and len(measurer.measured) >= 60
    assert done.winner == known_winner(store, Task(SPEC, PROBLEM, HERE, digest_of(SPEC)))
    assert done.winner is not None and done.winner.speedup is not None and done.winner.speedup > 1.0


def test_a_search_that_finds_worse_does_not_replace_the_raced_winner(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2), [(warps(8), 0.02, False)]))
    measurer = times({2: 120.0, 4: 130.0, 8: 100.0})
    worse: list[WinnerRecord] = []

    def search(spec: KernelSpec, problem: Problem) -> WinnerRecord | None:
        found = old_winner(DEFAULT, fingerprint=HERE, median_us=130.0, verdict="provisional")
        store.set_winner(found)
        worse.append(found)
        return found

    done = recertify(store, measurer, Compiler(changed=[warps(2)]), search=search)
    assert len(worse) == 1 and done.searched and done.winner is not None and done.winner.config == warps(8)
    assert known_winner(store, Task(SPEC, PROBLEM, HERE, digest_of(SPEC))) == done.winner


def test_an_interrupted_search_is_gone_on_with(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = times({2: 120.0, 4: 130.0})
    measurer.raise_at = {7: KeyboardInterrupt()}
    compiler = Compiler(changed=[warps(2)])
    with pytest.raises(KeyboardInterrupt):
        recertify(store, measurer, compiler, search=searcher(store, measurer))
    assert known_winner(store, Task(SPEC, PROBLEM, HERE, digest_of(SPEC))) is None
    assert len(store.trials(fingerprint_digest=digest(HERE), stage="search")) == 7
    done = recertify(store, measurer, compiler, search=searcher(store, measurer))
    assert done.searched and done.winner is not None
    assert len(measurer.measured) == len(set(measurer.measured)), "nothing is measured twice"


def test_an_interrupted_race_leaves_the_winner_stale(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = times({2: 100.0, 4: 130.0})
    measurer.raise_at = {-1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        recertify(store, measurer, Compiler(changed=[warps(2)]))
    assert recertify(store, measurer, Compiler(changed=[warps(2)])).ending == "kept"


# after it


def test_raced_winners_wait_for_a_second_process_carried_and_first_ones_do_not(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    measurer = times({2: 100.0, 4: 130.0})
    recertify(store, measurer, Compiler(changed=[warps(2)]))
    longer = PROBLEM.replace(seq_q=4096, seq_k=4096)
    first = replace(known_winner(store, Task(SPEC, PROBLEM, HERE, digest_of(SPEC))) or old_winner(warps(1)))
    store.set_winner(replace(first, problem=longer.to_dict(), problem_key=SPEC.problem_key(longer)))
    (waiting,) = unconfirmed(store.winners(), HERE, DIGESTS)
    assert waiting.problem == PROBLEM.to_dict() and waiting.config == warps(2)
    confirmed = confirm_winner(Task(SPEC, PROBLEM, HERE, digest_of(SPEC)), measurer=measurer, store=store)
    assert confirmed is not None and confirmed.verdict == "confirmed"
    assert unconfirmed(store.winners(), HERE, DIGESTS) == []


def test_it_costs_at_most_a_tenth_of_tuning(store: TuningStore) -> None:
    """Counted in variants that were put on the clock, confirmation included; the first tuning tries 200 configs."""
    fixed = [Param(name, (DEFAULT[name],), "one value only") for name in ("BLOCK_T", "order")]
    spec = make_spec(params=[param for param in PARAMS if param.name not in ("BLOCK_T", "order")] + fixed)
    count = len(list(ConfigSpace(spec, PROBLEM).configs()))
    first = FakeMeasurer(make_landscape(seed=3, fail_share=0.0))
    machine = {**FINGERPRINT, "driver": "0"}
    task = Task(spec, PROBLEM, machine, digest_of(spec))
    tune_problem(
        spec, PROBLEM, measurer=first, store=store, fingerprint=machine, budget=trials(count), digest_of=digest_of
    )
    winner = confirm_winner(task, measurer=first, store=store)
    assert winner is not None and count == 200
    store.set_winner(replace(winner, resources=code_of(winner.config)))
    tuned = len(first.measured) + sum(map(len, first.races))
    for versions, changed, ending, least in ((FINGERPRINT, [], "carried", 0), (HERE, [winner.config], "kept", 2)):
        again = FakeMeasurer(make_landscape(seed=3, fail_share=0.0))
        (stale,) = stale_winners(store.winners(), versions, {spec.family: spec}, DIGESTS)
        task = Task(spec, PROBLEM, versions, digest_of(spec))
        done = recertify_winner(stale, task, measurer=again, store=store, compiler=Compiler(changed=changed))
        confirm_winner(task, measurer=again, store=store)
        assert done.ending == ending
        assert least <= sum(map(len, again.races)) <= tuned / 10 * bool(least) and again.measured == []


def test_the_compiler_is_told_what_a_compilation_took_before(store: TuningStore) -> None:
    for stored_ms, told_ms in ((2000.0, 2000.0), (7.5, None), (None, None)):  # 7.5: it lay in Triton's cache
        resources = {**code_of(warps(2)), **({} if stored_ms is None else {"compile_ms": stored_ms})}
        store.set_winner(old_winner(warps(2), resources=resources))
        (stale,) = stale_winners(store.winners(), HERE, SPECS, DIGESTS)
        jobs = candidate_jobs(stale, SPEC, store)
        assert {config_key(job.config): job.expected_ms for job in jobs}[config_key(warps(2))] == told_ms
        assert all(job.expected_ms is None for job in jobs if job.config != warps(2))
        compile_candidates(stale, SPEC, store, compiler := Compiler())
        assert [(job.key, job.expected_ms) for job in compiler.jobs] == [(job.key, job.expected_ms) for job in jobs]


def test_a_forecast_says_what_would_happen_and_stores_nothing(store: TuningStore) -> None:
    store.set_winner(old_winner(warps(2)))
    (stale,) = stale_winners(store.winners(), HERE, SPECS, DIGESTS)
    before = store.trials(), store.winners()
    told = {
        forecast(compile_candidates(stale, SPEC, store, compiler))
        for compiler in (Compiler(), Compiler(changed=[warps(2)]), Compiler(failing=[warps(2)]))
    }
    silent = replace(stale, winner=replace(stale.winner, resources=None))
    told.add(forecast(compile_candidates(silent, SPEC, store, Compiler())))
    assert told == {
        "carries over",
        "races: other machine code",
        "races without it: compile",
        "races: its machine code was not recorded",
    }
    assert (store.trials(), store.winners()) == before


def test_the_cost_counts_configs_and_the_time_on_the_clock() -> None:
    slow = old_winner(warps(2), median_us=200_000.0, resources=None)  # 5 samples of 0.2 s each
    quick = replace(old_winner(warps(2)), policy="graph-warm")  # 0.4 s at most
    cost = expected_cost(stale_winners([slow, quick], HERE, SPECS, DIGESTS), processes=2)
    assert (cost.winners, cost.configs, cost.may_carry) == (2, 2 * (BEST + 1), 1)
    assert cost.race_s == pytest.approx(9 * (1.0 + 1.0) + 9 * (1.0 + 0.4))
    assert cost.compile_s == pytest.approx(18 * 1.5 / 2)
    assert cost.minutes == pytest.approx((cost.race_s + cost.compile_s) / 60)


# a parameter that came later


def test_a_winner_from_before_a_parameter_carries_over_with_its_former_value(store: TuningStore) -> None:
    late = replace(SPEC, params=(*SPEC.params, Param("late", (False, True), "new", structural=True, former=False)))
    late = replace(late, defaults=lambda problem: {**SPEC.defaults(problem), "late": False})
    old = old_winner(warps(2), [(warps(8), 0.05, False)])
    store.set_winner(old)
    (stale,) = stale_winners([old], HERE, {SPEC.family: late}, {SPEC.family: NEW_TEMPLATE})
    assert stale.winner.config == {**warps(2), "late": False} == late.completed(warps(2))
    assert stale.winner.default_config == late.default_config(PROBLEM)  # by which both races are compared
    assert candidates(stale, late, []) == [{**config, "late": False} for config in (warps(2), warps(8), DEFAULT)]
    assert late.completed({**warps(2), "late": True})["late"] is True
    task = Task(late, PROBLEM, HERE, NEW_TEMPLATE)
    assert {**warps(2), "late": False} in seed_configs(store, task, 99)


def test_without_a_former_value_a_winner_of_before_is_left_out() -> None:
    late = replace(SPEC, params=(*SPEC.params, Param("late", (False, True), "new", structural=True)))
    late = replace(late, defaults=lambda problem: {**SPEC.defaults(problem), "late": False})
    (stale,) = stale_winners([old_winner(warps(2))], HERE, {SPEC.family: late}, {SPEC.family: NEW_TEMPLATE})
    assert candidates(stale, late, []) == [{**DEFAULT, "late": False}]
