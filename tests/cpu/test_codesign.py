"""Co-design: fronts, legal designs, the search on known landscapes, and designs in the database."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from cpu.search_fakes import FINGERPRINT, FakeClock, FakeMeasurer, digest_of, make_spec, timed

from nsa_autotune.bench.quality import Quality
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.config import NSAConfig
from nsa_autotune.db.designs import DesignRecord
from nsa_autotune.db.engine import for_writing, open_engine, parse_location
from nsa_autotune.db.migrate import upgrade
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidConfig, NoConfigWorks, StoreError
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.budget import Budget
from nsa_autotune.search.codesign import Study, codesign
from nsa_autotune.search.designs import DIMENSIONS, Design, complete_choices, design_of, launches, legal_designs
from nsa_autotune.search.latency import PassLatency, Tuned
from nsa_autotune.search.pareto import hypervolume, pareto_front
from nsa_autotune.spec import Config, KernelSpec, Problem

BASE = Problem(seq_q=1024, seq_k=1024, num_q_heads=8, num_kv_heads=2, d_qk=64, d_v=64)
CHOICES = {
    "select_block_size": (16, 32, 64, 128),
    "num_selected": (4, 8, 16, 32),
    "window_size": (128, 256, 512),
    "compress_stride": (8, 16, 32),
    "compress_block_size": (16, 32),
}
FAMILIES = ("cmp_pool_fwd", "cmp_attn_fwd", "slc_select_fwd", "slc_attn_fwd", "win_attn_fwd")


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


# fronts


def dominated(points: list[tuple[float, float]], index: int) -> bool:
    """By the definition: another is as small in both and smaller in one, or equal and earlier."""
    a = points[index]
    return any(
        b[0] <= a[0] and b[1] <= a[1] and (b != a or other < index) for other, b in enumerate(points) if other != index
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    rng = random.Random(seed)
    points = [(float(rng.randrange(8)), float(rng.randrange(8))) for _ in range(rng.randrange(25))]
    front = pareto_front(points)
    assert sorted(front) == [i for i in range(len(points)) if not dominated(points, i)]
    assert [points[i] for i in front] == sorted(points[i] for i in front)


@pytest.mark.parametrize("seed", range(20))
def test_the_hypervolume_counts_cells(seed: int) -> None:
    rng = random.Random(seed)
    points = [(float(rng.randrange(10)), float(rng.randrange(10))) for _ in range(rng.randrange(1, 12))]
    cells = itertools.product(range(8), range(9))  # unit cells below the reference (8, 9)
    covered = sum(any(x <= a and y <= b for x, y in points) for a, b in cells)
    assert hypervolume(points, (8.0, 9.0)) == covered


# designs


def specs(*names: str) -> list[KernelSpec]:
    return [get_spec(name) for name in names or FAMILIES]


def test_every_legal_combination_is_a_design_and_no_other() -> None:
    choices = complete_choices(BASE, CHOICES)
    found = legal_designs(BASE, choices, specs())
    expected = 0
    for size, n, window, stride, block in itertools.product(*CHOICES.values()):
        values = {**NSAConfig().to_dict(), "select_block_size": size, "num_selected": n, "window_size": window}
        legal = block % stride == 0 and size % stride == 0 and block <= size
        expected += legal
        values |= {"compress_stride": stride, "compress_block_size": block}
        if legal:
            assert design_of(NSAConfig(**values), 4) in found
    assert len(found) == expected == len(set(found))
    for design in found:
        problem = design.problem(BASE)
        assert design_of(problem.nsa, problem.group_size) == design
        assert problem.replace(nsa=BASE.nsa) == BASE


def test_rules_of_kernels_count_too() -> None:
    choices = complete_choices(BASE, {"select_block_size": (64, 96), "num_selected": (16, 65), "group_size": (4, 8)})
    assert [d.values for d in legal_designs(BASE, choices, specs("win_attn_fwd"))] != []
    found = legal_designs(BASE, choices, specs("slc_attn_fwd"))
    assert {(d["select_block_size"], d["num_selected"]) for d in found} == {(64, 16)}
    assert {d.problem(BASE).num_kv_heads for d in found} == {1, 2}
    with pytest.raises(InvalidConfig, match=r"no combination.*1 of them: .*power of two from 16 to 256"):
        legal_designs(BASE, complete_choices(BASE, {"select_block_size": (96,)}), specs("slc_attn_fwd"))
    with pytest.raises(InvalidConfig, match=r"at most 20000 combinations.*combinations=30000"):
        legal_designs(BASE, complete_choices(BASE, {"window_size": range(1, 30001)}), specs())


def test_keys_and_values_are_two_launches() -> None:
    pool, attention = get_spec("cmp_pool_fwd"), get_spec("cmp_attn_fwd")
    assert launches(pool, BASE) == [(BASE, 2)] and launches(attention, BASE) == [(BASE, 1)]
    wide = BASE.replace(d_qk=192)
    assert [(part.d_qk, times) for part, times in launches(pool, wide)] == [(192, 1), (64, 1)]


# the search


def make_study(**changes: object) -> Study:
    choices = complete_choices(BASE, CHOICES)
    values: dict[str, object] = {
        "base": BASE,
        "choices": choices,
        "designs": legal_designs(BASE, choices, specs()),
        "facts": {"activations": "made up"},
        "fingerprint": FINGERPRINT,
        "kind": "measured",
        "objective": "mass",
    }
    return Study(**{**values, **changes})  # type: ignore[arg-type]


class World:
    """Latency grows with the keys that are read; what is kept grows with them too, more so by small blocks."""

    def __init__(self, interrupt_at: int = -1, broken: int = 0) -> None:
        self.judged: list[Design] = []
        self.told: list[object] = []
        self.interrupt_at, self.broken = interrupt_at, broken

    def quality(self, design: Design) -> Quality:
        if len(self.judged) == self.interrupt_at:
            raise KeyboardInterrupt
        assert design not in self.judged, "asked twice"
        self.judged.append(design)
        reach = design["num_selected"] * design["select_block_size"] ** 0.5 + design["window_size"] / 8
        lost = 1 / (1 + reach / 40) + 0.002 * design["compress_stride"] + 0.001 * design["compress_block_size"]
        return Quality(1 - lost, 1 - lost, lost / 2, 0.7)

    def latency(self, problem: Problem) -> Mapping[str, float]:
        nsa = problem.nsa
        if nsa.num_selected == self.broken:
            raise NoConfigWorks("slc_attn_fwd: no config works for this design")
        keys = nsa.num_selected * nsa.select_block_size
        return {"slc": 5 + keys / 50, "win": 1 + nsa.window_size / 200, "cmp": 4000 / nsa.compress_stride / 16}

    def begin(self, design: Design, number: int, total: int) -> None:
        self.told.append((number, total))

    def done(self, record: DesignRecord) -> None:
        self.told.append(record)

    def failed(self, design: Design, error: NoConfigWorks) -> None:
        self.told.append(error)

    def run(self, study: Study, store: TuningStore, budget: Budget, **options: object) -> list[DesignRecord]:
        return codesign(
            study,
            quality=self.quality,
            latency=self.latency,
            store=store,
            budget=budget,
            progress=self,
            **options,  # type: ignore[arg-type]
        )


def true_points(study: Study) -> dict[Design, tuple[float, float]]:
    world = World()
    return {d: (sum(world.latency(d.problem(BASE)).values()), 1 - world.quality(d).mass_kept) for d in study.designs}


def test_a_small_space_is_searched_whole_and_its_front_is_right(store: TuningStore) -> None:
    study, world = make_study(), World()
    records = world.run(study, store, Budget(len(study.designs) + 5))
    assert sorted(world.judged) == sorted(study.designs)
    known = true_points(study)
    designs = list(known)
    expected = [designs[i] for i in pareto_front(list(known.values()))]
    assert [design_of(r.config, r.group_size) for r in study.front(records)] == expected and len(expected) > 5
    assert store.designs() == records
    assert all(r.latency_us == sum(r.parts.values()) == known[design_of(r.config, 4)][0] for r in records)


def test_a_quarter_of_the_space_comes_nearer_than_chance(store: TuningStore) -> None:
    study = make_study()
    known, budget = true_points(study), len(study.designs) // 4
    worst = (max(p[0] for p in known.values()), max(p[1] for p in known.values()))
    whole = hypervolume(list(known.values()), worst)
    found, chance = [], []
    for seed in range(2):
        with TuningStore("sqlite://", import_shipped=False) as fresh:
            records = World().run(study, fresh, Budget(budget), seed=seed)
        assert len(records) == budget
        found.append(hypervolume([study.point(r) for r in records], worst) / whole)
        picked = random.Random(seed).sample(list(known.values()), budget)
        chance.append(hypervolume(picked, worst) / whole)
    assert min(found) > 0.94 and sum(found) > sum(chance)


def test_the_base_and_the_extremes_come_first(store: TuningStore) -> None:
    world = World()
    world.run(make_study(), store, Budget(3))
    values = [dict(zip(DIMENSIONS, design.values, strict=True)) for design in world.judged]
    assert world.judged[0] == design_of(BASE.nsa, 4)
    assert [(v["num_selected"], v["select_block_size"], v["window_size"]) for v in values[1:]] == [
        (4, 16, 128),
        (32, 128, 512),
    ]
    assert [told for told in world.told if isinstance(told, tuple)] == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupted_search_keeps_all_and_resumes(store: TuningStore) -> None:
    study, first, second = make_study(), World(interrupt_at=5), World()
    with pytest.raises(KeyboardInterrupt):
        first.run(study, store, Budget(12))
    assert len(store.designs()) == 5
    records = second.run(study, store, Budget(12))
    assert len(records) == 12 and len(second.judged) == 7 and not set(second.judged) & set(first.judged)
    assert World(interrupt_at=0).run(study, store, Budget(12)) == records, "nothing is left to do"


@pytest.mark.parametrize(
    "change", [{"facts": {"activations": "others"}}, {"fingerprint": {**FINGERPRINT, "gpu": "Fake 200"}}]
)
def test_another_study_or_machine_begins_anew(store: TuningStore, change: dict[str, object]) -> None:
    World().run(make_study(), store, Budget(4))
    world = World()
    world.run(make_study(**change), store, Budget(4))
    assert len(world.judged) == 4 and len(store.designs()) == 8


def test_designs_outside_the_search_are_left_alone(store: TuningStore) -> None:
    World().run(make_study(), store, Budget(4))
    study = make_study()
    few = replace(study, designs=[d for d in study.designs if d["window_size"] == 512])
    assert {r.nsa["window_size"] for r in few.stored(store)} == {512}
    other = replace(study, base=BASE.replace(nsa=replace(BASE.nsa, num_local=1)))
    assert other.stored(store) == [], "the fixed constants differ"


def test_a_design_whose_kernel_fails_is_told_and_left_out(store: TuningStore) -> None:
    study, world = make_study(), World(broken=32)
    records = world.run(study, store, Budget(len(study.designs)))
    failures = [told for told in world.told if isinstance(told, NoConfigWorks)]
    assert len(records) + len(failures) == len(study.designs) and failures
    assert all(record.nsa["num_selected"] != 32 for record in records)
    sampled = World(broken=4).run(make_study(facts={}), store, Budget(40))
    assert 20 < len(sampled) < 40


def test_no_design_begins_when_the_minutes_are_over(store: TuningStore) -> None:
    world = World()
    world.run(make_study(), store, Budget(100, max_minutes=1.0), clock=FakeClock(step_s=9.0))
    assert 0 < len(world.judged) <= 6


def test_the_second_objective_is_chosen(store: TuningStore) -> None:
    record = World().run(make_study(), store, Budget(1))[0]
    assert make_study().point(record) == (record.latency_us, 1 - record.mass_kept)
    assert make_study(objective="output").point(record) == (record.latency_us, record.output_error)


# latency


def test_a_pass_sums_its_launches_and_times_shared_kernels_once() -> None:
    asked: list[tuple[str, int]] = []

    def kernel(spec: KernelSpec, problem: Problem) -> float:
        asked.append((spec.family, problem.nsa.window_size))
        return {"cmp_pool_fwd": 2.0, "win_attn_fwd": problem.nsa.window_size / 100}[spec.family]

    latency = PassLatency(tuple(specs("cmp_pool_fwd", "win_attn_fwd")), kernel)
    assert latency(BASE) == {"cmp_pool_fwd": 4.0, "win_attn_fwd": 5.12}
    other = BASE.replace(nsa=replace(BASE.nsa, window_size=100, num_selected=4))
    assert latency(other) == {"cmp_pool_fwd": 4.0, "win_attn_fwd": 1.0}
    assert asked == [("cmp_pool_fwd", 512), ("win_attn_fwd", 512), ("win_attn_fwd", 100)]


def test_a_pass_names_the_family_that_does_not_work() -> None:
    latency = PassLatency(tuple(specs("win_attn_fwd")), lambda spec, problem: None)
    with pytest.raises(NoConfigWorks, match=r"win_attn_fwd: no config works.*--family win_attn_fwd"):
        latency(BASE)


class AnyMeasurer(FakeMeasurer):
    """Times grow with the tokens; any problem will do."""

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 7, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        self.races.append(list(configs))
        return [timed(problem.seq_k / 100, rounds) for _ in configs]


def test_winners_are_stored_and_a_winner_of_another_length_is_timed_again(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_autotune.search.latency.tune_problem", with_digest)
    measurer = AnyMeasurer(lambda config: 7.0)
    tuned = Tuned(measurer, store, FINGERPRINT, Budget(6))
    spec, problem = make_spec(), BASE.replace(num_q_heads=8)
    assert tuned(spec, problem) == 10.24 and len(store.winners()) == 1
    trials, races = len(measurer.measured), len(measurer.races)
    assert tuned(spec, problem) == 10.24 and len(measurer.races) == races
    shorter = problem.replace(seq_q=900, seq_k=900)  # the same bucket
    assert tuned(spec, shorter) == 9.0 and measurer.races[-1] == [store.winners()[0].config]
    assert len(measurer.measured) == trials, "known winners are not searched again"
    failing = Tuned(FakeMeasurer(lambda config: None), store, FINGERPRINT, Budget(6))
    assert failing(make_spec("other_fwd"), problem) is None


def with_digest(*args: object, **options: object) -> object:
    from nsa_autotune.search import tuner

    return tuner.tune_problem(*args, digest_of=digest_of, **options)  # type: ignore[arg-type]


# designs in the database


def make_record(**changes: object) -> DesignRecord:
    values: dict[str, object] = {
        "fingerprint": FINGERPRINT,
        "study": {"problem": {"seq_k": 1024}, "kernels": {"win_attn_fwd": "t"}},
        "nsa": NSAConfig().to_dict(),
        "group_size": 4,
        "latency_us": 12.5,
        "parts": {"win_attn_fwd": 12.5},
        "mass_kept": 0.9,
        "mass_kept_p10": 0.8,
        "output_error": 0.1,
        "locality": 0.7,
    }
    return DesignRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_a_design_comes_back_and_is_written_once(store: TuningStore) -> None:
    record = make_record()
    assert store.add_design(record) and store.designs() == [record]
    assert not store.add_design(make_record(latency_us=1.0)), "the first stays"
    others = [
        make_record(group_size=8),
        make_record(study={"x": 1}),
        make_record(nsa=NSAConfig(window_size=64).to_dict()),
    ]
    assert all(store.add_design(other) for other in others)
    assert store.designs(study_digest=record.study_digest) == [record, others[0], others[2]]
    assert store.add_design(make_record(fingerprint={**FINGERPRINT, "gpu": "B"}, locality=None, latency_us=3))
    assert [r.latency_us for r in store.designs(fingerprint_digest=replace_digest("B"))] == [3.0]
    assert store.designs(kind="predicted") == []
    assert record.config == NSAConfig() and DesignRecord(**record.to_dict()) == record


def replace_digest(gpu: str) -> str:
    from nsa_autotune.spec import digest

    return digest({**FINGERPRINT, "gpu": gpu})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mass_kept": 1.01}, "mass_kept must be a number from 0 to 1"),
        ({"mass_kept": float("nan")}, "mass_kept must be"),
        ({"latency_us": 0.0}, "latency_us must be a finite number above 0"),
        ({"parts": {"win": -1.0}}, "parts must be"),
        ({"parts": {"win": "fast"}}, "parts must be"),
        ({"output_error": float("inf")}, "output_error must be"),
        ({"locality": 2.0}, "locality must be a number from 0 to 1, or null"),
        ({"group_size": 0}, "group_size must be a whole number above 0"),
        ({"group_size": 2.0}, "group_size must be a whole number above 0"),
        ({"kind": "guessed"}, "kind must be one of measured, predicted"),
        ({"fingerprint": {}}, "fingerprint must be"),
        ({"nsa": {"window_size": 0}}, "nsa must be valid constants"),
        ({"nsa": {"window": 64}}, "nsa must be valid constants"),
    ],
)
def test_a_wrong_field_is_refused(store: TuningStore, change: dict[str, object], sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence):
        store.add_design(make_record(**change))
    assert store.designs() == []


def test_an_older_database_gets_the_table_and_keeps_its_records(tmp_path: Path) -> None:
    location = parse_location(f"sqlite:///{tmp_path / 't.sqlite'}")
    engine = open_engine(location)
    with for_writing(engine).begin() as connection:
        upgrade(connection, "0001")
        facts = '{"gpu":"g","capability":"9.0"}'
        connection.execute(
            sa.text("INSERT INTO nsa_fingerprints (digest, gpu, capability, facts) VALUES ('d', 'g', '9.0', :facts)"),
            {"facts": facts},
        )
        assert "nsa_designs" not in sa.inspect(connection).get_table_names()
    engine.dispose()
    with TuningStore(f"sqlite:///{tmp_path / 't.sqlite'}", import_shipped=False) as store:
        assert store.designs() == [] and store.add_design(make_record())
    with open_engine(location).connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM nsa_fingerprints")).scalar() == 2
