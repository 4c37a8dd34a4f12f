"""Without a GPU: the cost model by hand-computed values; stand-ins for compiler and worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from cpu.search_fakes import (
    DEFAULT,
    FINGERPRINT,
    PROBLEM,
    SPACE,
    SPEC,
    FakeClock,
    FakeCompiler,
    Listener,
    digest_of,
    make_spec,
    timed,
    trials,
)
from problems import served

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.target import SHARED_LIMITS_BYTES
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import KernelError, UnknownName
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.budget import Budget
from nsa_autotune.search.interpret import check_in_interpreter, planned_checks
from nsa_autotune.search.predict import predict_problem, reject_reason, stored_predictions
from nsa_autotune.search.ranking import Prediction
from nsa_autotune.search.roofline import (
    GPU_MODELS,
    LAUNCH_US,
    WAVE_US,
    gpu_model,
    model_terms,
    occupancy,
    predict_us,
    programs_per_sm,
)
from nsa_autotune.search.space import config_key
from nsa_autotune.search.task import Task, seed_configs
from nsa_autotune.spec import Config, Cost, Param, Problem

H100 = gpu_model("cuda:90")
FITS = Resources(registers=128, shared_bytes=65_536, spill_bytes=0, num_warps=4, binary_sha="a", compile_ms=1.0)
FULL = replace(FITS, registers=32, shared_bytes=2_000, num_warps=8)  # 8 programs fill all 64 warps


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


# the cost model


@pytest.mark.parametrize(
    ("resources", "programs"),
    [
        (FITS, 3),  # shared: 233472 // (65536 + 1024)
        (replace(FITS, shared_bytes=0), 4),  # registers: 65536 // (128 * 128)
        (replace(FITS, shared_bytes=0, registers=129), 3),  # rounded to 136 a thread
        (replace(FITS, shared_bytes=0, registers=16), 16),  # warps: 64 // 4
        (replace(FITS, shared_bytes=0, registers=16, num_warps=1), 32),  # programs
        (replace(FITS, shared_bytes=232_448), 1),
        (replace(FITS, shared_bytes=232_449), 0),
        (replace(FITS, registers=255, num_warps=16), 0),  # 256 * 512 > 65536
    ],
)
def test_programs_on_a_multiprocessor(resources: Resources, programs: int) -> None:
    assert programs_per_sm(resources, H100) == programs
    assert occupancy(resources, H100) == programs * resources.num_warps / 64


def test_arithmetic_bound_time() -> None:
    # 989e12 * 0.7 * 64 / (64 + 4) operations a second
    assert predict_us(Cost(1e12, 1.0), FULL, H100) == pytest.approx(1e12 / (989e6 * 0.7 * 64 / 68) + LAUNCH_US)


def test_padding_counts_and_useful_operations_do_not() -> None:
    padded = predict_us(Cost(1e12, 1.0, mma_flops=4e12), FULL, H100)
    assert padded - LAUNCH_US == pytest.approx(4 * (predict_us(Cost(1e12, 1.0), FULL, H100) - LAUNCH_US))


def test_sums_run_on_the_vector_units() -> None:
    sums = predict_us(Cost(67e9, 1.0, mma_flops=1.0), FULL, H100)
    assert sums == pytest.approx(1e3 / 0.7 * 68 / 64 + LAUNCH_US, rel=1e-6)
    assert predict_us(Cost(67e9, 1.0), FULL, H100, dtype="float32") == pytest.approx(sums, rel=1e-6)


def test_memory_bound_times() -> None:
    # 64 warps of 32 threads with 64 bytes each: 128 KiB in flight, more than enough
    assert predict_us(Cost(1.0, 3.35e9), FULL, H100) == pytest.approx(1e3 / 0.85 + LAUNCH_US)
    assert predict_us(Cost(1.0, 1.0, on_chip_bytes=5.5e9), FULL, H100) == pytest.approx(600 / 0.85 + LAUNCH_US)
    starved = replace(FULL, registers=255)  # one program of 8 warps: 16 KiB in flight, half of what it takes
    assert programs_per_sm(starved, H100) == 1
    assert predict_us(Cost(1.0, 3.35e9), starved, H100) == pytest.approx(2e3 / 0.85 + LAUNCH_US)
    staged = replace(starved, shared_bytes=24 * 1024)  # three quarters, by tiles on their way
    assert predict_us(Cost(1.0, 3.35e9), staged, H100) == pytest.approx(1e3 / 0.75 / 0.85 + LAUNCH_US)


def test_equal_demands_overlap_but_in_part() -> None:
    flops = 1e3 * 989e6 * 0.7 * 64 / 68  # 1000 us
    both = predict_us(Cost(flops, 3.35e9 * 0.85), FULL, H100)
    assert both == pytest.approx(1e3 * 2**0.5 + LAUNCH_US)


def test_2048_spilled_bytes_double_the_time() -> None:
    clean, spilled = (predict_us(Cost(1e12, 1.0), replace(FULL, spill_bytes=n), H100) for n in (0, 2048))
    assert spilled - LAUNCH_US == pytest.approx(2 * (clean - LAUNCH_US))


@pytest.mark.parametrize("target", GPU_MODELS)
@pytest.mark.parametrize("field", ["flops", "bytes_moved", "on_chip_bytes", "mma_flops"])
def test_more_work_never_takes_less_time(target: str, field: str) -> None:
    cost = Cost(flops=1e11, bytes_moved=1e9, on_chip_bytes=1e9, mma_flops=1e11)
    times = [
        predict_us(replace(cost, **{field: getattr(cost, field) * 4**i}), FITS, gpu_model(target)) for i in range(5)
    ]
    assert times == sorted(times)
    assert times[0] < times[-1] or field == "flops"  # padded products stand for all


@pytest.mark.parametrize("field", ["registers", "shared_bytes", "spill_bytes"])
def test_more_registers_spills_or_shared_memory_never_speed_arithmetic_up(field: str) -> None:
    cost = Cost(flops=1e12, bytes_moved=1.0)
    values = {"registers": 64, "shared_bytes": 20_000, "spill_bytes": 64}
    times = [predict_us(cost, replace(FITS, **{field: values[field] * i}), H100) for i in (1, 2, 3)]
    assert times == sorted(times) and times[0] < times[-1]


@pytest.mark.parametrize(
    ("programs", "factor", "waves"),
    [
        (0, 1.0, 0.0),  # not known: as before
        (132 * 8, 1.0, 1.0),  # every multiprocessor holds the 8 that fit
        (132 * 8 * 3, 1.0, 3.0),
        (132 * 8 + 1, 1 + 0.5 * (2 / (1 + 1 / 1056) - 1), 1 + 1 / 1056),  # half of an almost empty second wave
        (132 * 8 * 5 // 2, 1 + 0.5 * (3 / 2.5 - 1), 2.5),
    ],
)
def test_the_last_wave_costs_half_of_what_it_idles(programs: int, factor: float, waves: float) -> None:
    terms = model_terms(Cost(1e12, 1.0), replace(FULL, num_programs=programs), H100)
    assert (terms.tail_factor, terms.waves) == pytest.approx((factor, waves))
    assert terms.occupancy == 1.0
    assert terms.arithmetic_us == pytest.approx(1e12 / (989e6 * 0.7 * 64 / 68))
    later = max(0.0, waves - 1)  # each of which takes its start
    assert terms.time_us == pytest.approx(terms.arithmetic_us * factor + WAVE_US * later + LAUNCH_US)


def test_many_tiny_programs_are_slower_than_few_that_do_the_same() -> None:
    cost = Cost(1.0, 3.35e6)
    few, many = (predict_us(cost, replace(FULL, num_programs=132 * 8 * waves), H100) for waves in (4, 64))
    assert many - few == pytest.approx(60 * WAVE_US)


@pytest.mark.parametrize(
    ("rows", "columns", "warps", "part"),
    [
        (64, 64, 4, 64),  # every warp has 16 rows of its own
        (64, 64, 8, 32),  # two warps share 16 rows, half of the columns each
        (128, 64, 8, 64),
        (16, 64, 4, 16),
        (128, 64, 2, 64),  # more rows a warp are no better
    ],
)
def test_a_tile_of_narrow_parts_is_multiplied_slowly(rows: int, columns: int, warps: int, part: int) -> None:
    resources = replace(FULL, num_warps=warps)
    plain = model_terms(Cost(1e12, 1.0), resources, H100)
    tiled = model_terms(Cost(1e12, 1.0, tile_rows=rows, tile_columns=columns), resources, H100)
    assert tiled.arithmetic_us == pytest.approx(plain.arithmetic_us * (part + 8) / part)
    assert tiled.l2_us == plain.l2_us and tiled.memory_us == plain.memory_us


@pytest.mark.parametrize(
    ("family", "changes", "tile"),
    [
        ("win_attn_fwd", {"BLOCK_T": 4, "BLOCK_N": 32}, (64, 32)),  # 16 heads a group
        ("slc_attn_fwd", {"swap": True, "BLOCK_N": 64}, (64, 16)),
        ("cmp_attn_bwd_dq", {"BLOCK_T": 4, "BLOCK_N": 32}, (64, 32)),
        ("win_attn_bwd_dkv", {"BLOCK_T": 2, "BLOCK_N": 64}, (64, 32)),
        ("cmp_pool_fwd", {}, (0, 0)),
    ],
)
def test_attention_tells_the_tile_of_its_scores(family: str, changes: Config, tile: tuple[int, int]) -> None:
    spec, problem = get_spec(family), Problem()
    found = spec.cost(problem, {**spec.default_config(problem), **changes})
    assert (found.tile_rows, found.tile_columns) == tile


def test_a_small_launch_leaves_multiprocessors_idle_and_warps_lonely() -> None:
    terms = model_terms(Cost(1e12, 1.0), replace(FULL, num_programs=66), H100)  # half of them get one program
    assert terms.tail_factor == pytest.approx(2.0)
    assert terms.arithmetic_us == pytest.approx(1e12 / (989e6 * 0.7 * 8 / (8 + 4)))  # its 8 warps hide little
    uneven = model_terms(Cost(1e12, 1.0), replace(FULL, num_programs=132 + 66), H100)
    assert uneven.tail_factor == pytest.approx(2 / 1.5)  # the multiprocessors with two decide


def test_amd_has_wider_warps_and_reserves_no_shared_memory() -> None:
    mi300 = gpu_model("hip:gfx942")
    assert programs_per_sm(replace(FITS, shared_bytes=65_536, num_warps=4), mi300) == 1
    assert programs_per_sm(replace(FITS, shared_bytes=0, registers=128, num_warps=4), mi300) == 4  # 131072 // 32768
    assert programs_per_sm(replace(FITS, shared_bytes=0, registers=64, num_warps=8), mi300) == 4  # 32 warps
    reason = reject_reason(replace(FITS, registers=256, num_warps=16, shared_bytes=0), mi300, 65_536)
    assert reason == "needs 256 registers for 1024 threads, the limit is 131072"


def test_an_h200_differs_by_its_memory() -> None:
    h200 = gpu_model("cuda:90", "NVIDIA H200")
    assert (h200.hbm_tbps, h200.mma_tflops) == (4.8, H100.mma_tflops)
    with pytest.raises(UnknownName, match="Did you mean 'cuda:90'"):
        gpu_model("cuda:91")


def test_every_target_of_the_compiler_has_a_model() -> None:
    assert set(GPU_MODELS) == set(SHARED_LIMITS_BYTES)
    for target, limit in SHARED_LIMITS_BYTES.items():
        assert programs_per_sm(replace(FITS, shared_bytes=limit), gpu_model(target)) == 1


def test_what_does_not_fit_has_no_time() -> None:
    with pytest.raises(KernelError, match="fit on a multiprocessor"):
        predict_us(Cost(1.0, 1.0), replace(FITS, num_warps=128), H100)


def test_every_family_has_a_finite_time_on_every_gpu() -> None:
    for spec in all_specs().values():
        problem = served(spec, Problem())
        small = replace(FITS, shared_bytes=8_192, num_warps=2)
        for target in GPU_MODELS:
            time_us = predict_us(spec.cost(problem, spec.default_config(problem)), small, gpu_model(target))
            assert LAUNCH_US < time_us < 1e6


# predictions


def predict(store: TuningStore, compiler: FakeCompiler, **options: object) -> list[Prediction]:
    """`predict_problem` on the toy family for an H100 with 20 candidates, unless said otherwise."""
    values: dict[str, object] = {"budget": trials(20), "target": "cuda:90", "digest_of": digest_of, **options}
    spec = values.pop("spec", SPEC)
    return predict_problem(spec, PROBLEM, store=store, compiler=compiler, **values)  # type: ignore[arg-type]


def distinct(config: Config) -> Resources:
    """Resources with a binary of its own for each config."""
    return replace(FITS, binary_sha=config_key(config), num_warps=int(config["num_warps"]))


def test_predictions_are_ranked_stored_and_no_measurements(store: TuningStore) -> None:
    compiler, listener = FakeCompiler(distinct), Listener()
    ranked = predict(store, compiler, progress=listener)
    assert len(ranked) == len(compiler.compiled) == len(set(compiler.compiled)) == 20
    assert compiler.compiled[0] == config_key(DEFAULT) and compiler.closed
    assert all(SPACE.is_legal(prediction.config) for prediction in ranked)
    guesses = [prediction.predicted_us for prediction in ranked]
    assert guesses == sorted(guesses)
    best = ranked[0]
    assert best.predicted_us == predict_us(SPEC.cost(PROBLEM, best.config), distinct(best.config), H100)

    stored = store.trials(kind="predicted")
    assert len(stored) == 20 and not store.trials() and not store.winners()
    assert {(record.provider, record.stage, record.median_us) for record in stored} == {("template", "search", None)}
    assert all(record.fingerprint == for_target("cuda:90").to_dict() for record in stored)
    for record in stored:
        told = record.resources or {}
        assert (told["registers"], told["shared_bytes"], told["spill_bytes"]) == (128, 65_536, 0)
        assert told["occupancy"] == occupancy(distinct(record.config), H100)
        assert told["model_us"] == record.predicted_us  # nothing is measured that would correct it
    assert (listener.plans[0].planned_trials, listener.outcomes[0].kind) == (20, "predicted")
    assert listener.events[-1].best_us == guesses[0] and listener.events[-1].spent == 1.0


def test_what_cannot_run_is_stored_with_its_reason_and_left_out(store: TuningStore) -> None:
    def judge(config: Config) -> Resources | tuple[str, str]:
        return {
            1: replace(distinct(config), spill_bytes=600),
            2: replace(distinct(config), shared_bytes=300_000),
            4: distinct(config),
            8: ("timeout", "the compiler ran past its time limit"),
            16: replace(distinct(config), registers=200),
        }[int(config["num_warps"])]

    ranked = predict(store, FakeCompiler(judge), budget=trials(40))
    assert {prediction.config["num_warps"] for prediction in ranked} == {4}
    told = {r.config["num_warps"]: (r.status, r.reason, r.predicted_us) for r in store.trials(kind="predicted")}
    assert told[1] == ("resource", "spills 600 bytes a thread, more than 512", None)
    assert told[2] == ("resource", "needs 300000 bytes of shared memory, the limit is 232448", None)
    assert told[4][:2] == ("ok", "")
    assert told[8] == ("timeout", "the compiler ran past its time limit", None)
    assert told[16] == ("resource", "needs 200 registers for 512 threads, the limit is 65536", None)


def test_limits_are_inclusive() -> None:
    assert reject_reason(replace(FITS, spill_bytes=512, shared_bytes=232_448), H100, 232_448) == ""
    assert "spills 513" in reject_reason(replace(FITS, spill_bytes=513), H100, 232_448)
    assert "fits on a multiprocessor" in reject_reason(replace(FITS, registers=8, num_warps=128), H100, 232_448)


def test_predicting_resumes_and_a_larger_budget_goes_on(store: TuningStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict(store, FakeCompiler(distinct, raise_at=7))
    assert len(store.trials(kind="predicted")) == 7
    rest, more, listener = FakeCompiler(distinct), FakeCompiler(distinct), Listener()
    ranked = predict(store, rest)
    assert len(rest.compiled) == 13 and len(ranked) == 20
    assert predict(store, more) == ranked and not more.compiled
    longer = predict(store, more, budget=trials(30), progress=listener)
    assert len(longer) == 30 and len(more.compiled) == 10
    assert (listener.plans[0].num_known, listener.plans[0].planned_trials) == (20, 10)
    with TuningStore("sqlite://", import_shipped=False) as fresh:
        assert predict(fresh, FakeCompiler(distinct), budget=trials(30)) == longer


def test_another_target_or_template_is_predicted_anew(store: TuningStore) -> None:
    predict(store, FakeCompiler(distinct))
    for change in ({"target": "cuda:80"}, {"digest_of": lambda spec: "newer template"}):
        compiler = FakeCompiler(distinct)
        predict(store, compiler, **change)
        assert len(compiler.compiled) == 20


def test_a_small_space_is_compiled_whole(store: TuningStore) -> None:
    small = make_spec(params=[replace(param, values=param.values[:3]) for param in SPEC.params])
    legal = {config_key(config) for config in SPACE.configs() if small.broken_constraint(PROBLEM, config) is None}
    compiler = FakeCompiler(distinct)
    predict(store, compiler, spec=small, budget=trials(300))
    assert sorted(compiler.compiled) == sorted(legal)


def test_later_measurements_correct_what_was_predicted(store: TuningStore) -> None:
    """Measured elsewhere, many warps are slow: predictions are ordered anew, and the new order is stored."""
    before = predict(store, FakeCompiler(distinct))
    assert [p.predicted_us for p in before] == [p.resources["model_us"] for p in before]
    for tokens in (1024, 2048):
        task = Task(SPEC, PROBLEM.replace(seq_q=tokens, seq_k=tokens), FINGERPRINT, digest_of(SPEC))
        for config in list(SPACE.configs())[::8]:
            told = distinct(config).to_dict()
            slow = replace(timed(10.0 * int(config["num_warps"])), resources=told)
            store.add_trial(task.trial(config, slow, "search"))
    compiler = FakeCompiler(distinct)
    after = predict(store, compiler)
    assert not compiler.compiled and len(after) == len(before)
    warps = [[int(prediction.config["num_warps"]) for prediction in ranked] for ranked in (before, after)]
    assert warps[0] != sorted(warps[0]) and warps[1] == sorted(warps[1])
    served = store.trials(kind="predicted", limit=len(after))  # the newest
    assert {config_key(r.config): r.predicted_us for r in served} == {
        config_key(p.config): p.predicted_us for p in after
    }
    num_stored = len(store.trials(kind="predicted"))
    assert predict(store, compiler) == after
    assert len(store.trials(kind="predicted")) == num_stored  # once is enough
    assert stored_predictions(SPEC, PROBLEM, target="cuda:90", store=store, digest_of=digest_of) == after


def test_minutes_end_the_compiling(store: TuningStore) -> None:
    compiler = FakeCompiler(distinct)
    predict(store, compiler, budget=Budget(max_minutes=0.5), clock=FakeClock(step_s=1.0))
    assert 5 < len(compiler.compiled) <= 30 and compiler.closed


def test_configs_with_the_same_code_are_one_prediction(store: TuningStore) -> None:
    flat = replace(SPEC, cost=lambda problem, config: Cost(1e9, 1e6))
    compiler = FakeCompiler(lambda config: replace(FITS, binary_sha=f"warps {config['num_warps']}"))
    ranked = predict(store, compiler, spec=flat, budget=trials(40))
    assert len(ranked) == 5
    assert sum(1 + len(prediction.same_code) for prediction in ranked) == 40  # all are kept
    for prediction in ranked:
        assert {c["num_warps"] for c in prediction.same_code} <= {prediction.config["num_warps"]}


def test_if_nothing_compiles_the_outcome_says_why(store: TuningStore) -> None:
    listener = Listener()
    assert predict(store, FakeCompiler(lambda config: ("compile", "no such op\nat line 3")), progress=listener) == []
    assert listener.outcomes[0].kind == "failed"
    assert listener.outcomes[0].reasons == (("compile: no such op", 20),)


def test_predictions_seed_the_search_on_the_real_gpu(store: TuningStore) -> None:
    ranked = predict(store, FakeCompiler(distinct))
    seeds = seed_configs(store, Task(SPEC, PROBLEM, FINGERPRINT, digest_of(SPEC)), 8)
    wanted = [prediction.config for prediction in ranked if prediction.config != DEFAULT]
    assert seeds == [DEFAULT, *wanted[:7]]


# the interpreter


class FakeRunner:
    """Passes and fails by a parameter's value."""

    def __init__(self) -> None:
        self.asked: list[tuple[Problem, Config]] = []

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """One check."""
        self.asked.append((problem, config))
        return TrialResult("accuracy", "wrong") if config["swap"] else timed(1.0)


CASES = tuple(PROBLEM.replace(dtype=dtype) for dtype in ("bfloat16", "float16", "float32"))


def test_every_structural_value_is_checked_in_a_safe_dtype() -> None:
    runner, told = FakeRunner(), []
    checks = check_in_interpreter(replace(SPEC, cases=CASES), runner=runner, tell=told.append)
    assert told == checks
    assert [(check.problem, check.config) for check in checks] == runner.asked
    union = {**DEFAULT, "order": "union", "BLOCK_T": 2}  # the nearest legal partner
    half, single = CASES[1], CASES[2]
    swapped = {**DEFAULT, "swap": True}
    assert runner.asked == [(half, DEFAULT), (single, DEFAULT), (half, union), (half, swapped)]
    assert [(check.ok, check.reason) for check in checks] == [(True, "")] * 3 + [(False, "accuracy: wrong")]


def test_given_configs_run_once_each_where_they_are_legal() -> None:
    illegal = {**DEFAULT, "BLOCK_T": 4}
    spec = replace(SPEC, cases=CASES)
    assert planned_checks(spec, [DEFAULT, illegal, DEFAULT]) == [(CASES[1], DEFAULT)]
    assert planned_checks(spec, max_cases=1)[0] == (CASES[1], DEFAULT)
    assert {problem.dtype for problem, _ in planned_checks(spec, max_cases=1)} == {"float16"}


@pytest.mark.parametrize("family", all_specs())
def test_all_structural_values_of_all_families_are_planned(family: str) -> None:
    spec = get_spec(family)
    checks = planned_checks(spec)
    seen = {(name, value) for _, config in checks for name, value in config.items()}
    assert seen >= {(param.name, value) for param in spec.params if param.structural for value in param.values}
    assert {problem.dtype for problem, _ in checks} <= {"float16", "float32"}
    assert {problem.layout for problem, _ in checks} == set(spec.layouts)


def test_a_structural_value_that_nothing_allows_is_left_out() -> None:
    impossible = Param("order", ("query", "union", "neither"), "", structural=True)
    spec = replace(make_spec(params=(impossible, *SPEC.params[1:])), cases=CASES)
    spec = replace(spec, constraints=(*spec.constraints, replace(spec.constraints[0], holds=_not_neither)))
    assert all(config["order"] != "neither" for _, config in planned_checks(spec))


def _not_neither(problem: Problem, config: Config) -> bool:
    return config["order"] != "neither"
