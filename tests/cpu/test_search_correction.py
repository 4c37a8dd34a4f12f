"""The corrected cost model: laws that it must learn, and data from which it must learn nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from cpu.recorded_fakes import A100, H100, invented_records, some_configs
from problems import served

from nsa_autotune.db.records import TrialRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.correction import Correction, fit, groups_of
from nsa_autotune.search.guess import compiled_of, gpu_of, model_us, target_of
from nsa_autotune.search.roofline import gpu_model
from nsa_autotune.search.space import config_key
from nsa_autotune.search.task import Task, seed_configs
from nsa_autotune.spec import Config, Problem

SPEC = get_spec("win_attn_fwd")
LENGTHS = (2048, 8192, 32_768)
PROBLEMS = [Problem(seq_q=tokens, seq_k=tokens) for tokens in LENGTHS]
NEW = Problem(seq_q=16_384, seq_k=16_384)
COUNT = 80


def by_law(problem: Problem, exponent: float = 1.5, fingerprint: dict[str, str] = H100) -> list[TrialRecord]:
    """Trials of a machine that is the plain model times num_warps to the power of `exponent`."""
    records = invented_records(SPEC.family, problem, COUNT, fail_share=0.0, fingerprint=fingerprint)

    def lawful(record: TrialRecord) -> TrialRecord:
        time_us = (model_us(SPEC, record) or math.nan) * int(record.config["num_warps"]) ** exponent
        return replace(record, samples_us=(time_us,), median_us=time_us, p20_us=time_us, p80_us=time_us)

    return [lawful(record) for record in records]


def errors_of(correction: Correction, truth: list[TrialRecord]) -> list[float]:
    """log(guess / time) of each record."""
    found = []
    for record in truth:
        guess_us = correction.guess_of(record)
        assert guess_us is not None and record.median_us is not None
        found.append(math.log(guess_us / record.median_us))
    return found


def test_a_law_is_learned_and_holds_for_a_problem_never_seen() -> None:
    correction = fit(SPEC, [record for problem in PROBLEMS for record in by_law(problem)])
    assert correction.is_used
    assert "corrected by 240 configs of 3 problems" in correction.note
    errors = np.abs(errors_of(correction, by_law(NEW)))
    assert errors.max() < 0.1  # the plain model is off by up to 8 ** 1.5, a log of 3.1
    plain = [abs(math.log((model_us(SPEC, r) or 0.0) / (r.median_us or 0.0))) for r in by_law(NEW)]
    assert max(plain) > 3.0


def test_measurements_on_one_gpu_correct_another() -> None:
    there = [record for problem in PROBLEMS for record in by_law(problem, fingerprint=A100)]
    errors = np.array(errors_of(fit(SPEC, there), by_law(NEW, fingerprint=H100)))
    assert np.ptp(errors) < 0.2  # the order is right, whatever the level


def test_it_depends_on_the_records_and_not_on_their_order() -> None:
    records = [record for problem in PROBLEMS for record in by_law(problem)]
    shuffled = random.Random(1).sample(records, len(records))
    record = by_law(NEW)[3]
    assert fit(SPEC, records).guess_of(record) == fit(SPEC, shuffled).guess_of(record)


def test_a_slow_problem_is_not_blamed_on_its_configs() -> None:
    """One problem is ten times slower than the model says, and small tiles were measured there only."""
    slow = [
        replace(record, median_us=10 * (record.median_us or 0.0), samples_us=())
        for record in by_law(PROBLEMS[0])
        if int(record.config["BLOCK_N"]) <= 32
    ]
    rest = [r for problem in PROBLEMS[1:] for r in by_law(problem) if int(r.config["BLOCK_N"]) > 32]
    assert len(slow) > 8 and np.ptp(errors_of(fit(SPEC, slow + rest), by_law(NEW))) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_chance_teaches_nothing_and_the_plain_model_stays(seed: int) -> None:
    """Times that are the model's but for noise of 0.2 %: what a correction gains by chance is too little to use it."""

    def noisy(record: TrialRecord) -> TrialRecord:
        chance = random.Random(f"{seed} {config_key(record.config)} {record.problem['seq_k']}").gauss(0, 0.002)
        return replace(record, median_us=(record.median_us or 0.0) * math.exp(chance))

    correction = fit(SPEC, [noisy(record) for problem in PROBLEMS for record in by_law(problem, exponent=0.0)])
    assert not correction.is_used
    assert correction.note.startswith("the plain model: corrected by 3 problems")
    record = by_law(NEW, exponent=0.0)[5]
    gpu = gpu_of(record.fingerprint)
    assert gpu is not None
    assert correction.guess_us(NEW, record.config, record.resources, gpu) == model_us(SPEC, record)
    assert correction.guess_of(record) is None  # what is stored stands


@pytest.mark.parametrize("problems", [0, 1])
def test_one_problem_alone_cannot_be_judged(problems: int) -> None:
    correction = fit(SPEC, [record for problem in PROBLEMS[:problems] for record in by_law(problem)])
    assert not correction.is_used
    assert correction.note == f"the plain model: {problems} measured problems, and 2 are needed to judge another"


def test_only_usable_measurements_are_learned_from() -> None:
    records = by_law(NEW)
    (whole,) = groups_of(SPEC, records)
    assert len(whole.time_us) == COUNT and whole.rows.shape[0] == COUNT
    spoilt = [
        replace(records[0], status="accuracy"),
        replace(records[1], kind="predicted", predicted_us=1.0),
        replace(records[2], provider="flex_attention"),
        replace(records[3], resources=None),
        replace(records[4], resources={"registers": 64}),
        replace(records[5], config={**records[5].config, "BLOCK_N": 48}),
        replace(records[6], median_us=None),
    ]
    (rest,) = groups_of(SPEC, spoilt + records[7:])
    assert len(rest.time_us) == COUNT - 7
    assert groups_of(SPEC, [replace(r, fingerprint={**H100, "capability": "7.5"}) for r in records]) == []
    newer = [replace(record, template_digest="newer") for record in records]
    assert len(groups_of(SPEC, records + newer)) == 2  # two templates are not one another's measure


def test_a_config_measured_often_is_one_row_with_its_median() -> None:
    records = by_law(NEW)
    again = [replace(records[0], median_us=us, samples_us=(us,), stage="final") for us in (1.0, 1e9)]
    (group,) = groups_of(SPEC, records + again)
    assert len(group.time_us) == COUNT
    assert records[0].median_us in group.time_us.tolist()


@pytest.mark.parametrize("family", list(all_specs()))
def test_every_family_can_be_corrected(family: str) -> None:
    spec = get_spec(family)
    records = []
    for tokens in (4096, 8192):
        problem = served(spec, Problem(seq_q=tokens, seq_k=tokens))
        slow = invented_records(family, problem, 40, fail_share=0.0, time_us=lambda config: 5.0 * config["num_warps"])
        records += slow
    correction = fit(spec, records)
    guesses = [correction.guess_us(NEW, r.config, r.resources, gpu_model("cuda:90")) for r in records]
    assert all(guess is not None and math.isfinite(guess) and guess > 0 for guess in guesses)


# what the model is told of a record


def test_the_gpu_of_a_record_is_found_by_its_fingerprint() -> None:
    assert (
        target_of(H100) == "cuda:90" and target_of({"gpu": "target hip:gfx942", "capability": "gfx942"}) == "hip:gfx942"
    )
    assert gpu_of(H100) == gpu_model("cuda:90")
    h200 = gpu_of({**H100, "gpu": "NVIDIA H200"})
    assert h200 is not None and h200.hbm_tbps == 4.8
    assert gpu_of({"gpu": "Tesla T4", "capability": "7.5"}) is None


def test_a_persistent_kernel_starts_programs_on_every_multiprocessor() -> None:
    told = {"registers": 64, "shared_bytes": 1024, "spill_bytes": 0, "num_warps": 4, "num_programs": 2}
    gpu = gpu_model("cuda:90")
    plain, persistent = (compiled_of(told, config, gpu) for config in ({}, {"programs_per_sm": 2}))
    assert plain is not None and plain.num_programs == 2
    assert persistent is not None and persistent.num_programs == 2 * 132
    assert compiled_of({**told, "num_warps": 128}, {}, gpu) is None
    assert compiled_of(None, {}, gpu) is None


# seeds


@pytest.fixture
def store() -> Iterator[TuningStore]:
    """An empty database in memory."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def test_seeds_follow_the_corrected_order(store: TuningStore) -> None:
    target = {**H100, "gpu": "target cuda:90"}
    for record in by_law(NEW):
        guess_us = model_us(SPEC, record)
        store.add_trial(replace(record, kind="predicted", fingerprint=target, predicted_us=guess_us, samples_us=()))
    task = Task(SPEC, NEW, H100, by_law(NEW)[0].template_digest)

    def warps(configs: list[Config]) -> list[int]:
        return [int(config["num_warps"]) for config in configs[1:]]  # the default comes first

    plain = seed_configs(store, task, 17)
    for problem in PROBLEMS:
        for record in by_law(problem):
            store.add_trial(record)
    truth = {config_key(r.config): r.median_us or 0.0 for r in by_law(NEW)}
    corrected = seed_configs(store, task, 17)
    best = sorted(truth.values())[:20]
    assert max(truth[config_key(config)] for config in corrected[1:]) <= 1.05 * best[-1]
    assert sum(warps(corrected)) < sum(warps(plain))
    assert {config_key(c) for c in corrected} <= {config_key(c) for c in some_configs(SPEC, NEW, COUNT)}
