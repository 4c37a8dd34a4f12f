"""benchmarks/tuner.py: who agrees with whom, the page, and repeated tunings on known times with noise."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cpu.search_fakes import DEFAULT, FINGERPRINT, PROBLEM, SPEC, FakeMeasurer, digest_of, make_landscape, trials

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.bench.timing import summarize
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import NSAError
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.progress import Effort
from nsa_autotune.search.space import config_key
from nsa_autotune.spec import Config, Problem

FOLDER = Path(__file__).parents[2] / "benchmarks"
LONGER = PROBLEM.replace(seq_q=2048, seq_k=2048)
FACTS = {"gpu": "Fake 100", "date": "2026-01-02", "triton": "3"}


@pytest.fixture(scope="module")
def tuner() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are found as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("tuner")
        for name in ("tuner", "forward"):
            sys.modules.pop(name, None)


def warps(count: int) -> Config:
    return {**DEFAULT, "num_warps": count}


def repeated(tuner: ModuleType, others: Sequence[int]) -> Any:
    """Runs that 4 warps won, tied with 8, and then what each other number of warps won."""
    effort = Effort(10, 5.0, 1.0)
    first = tuner.Run(warps(4), (warps(8),), 100.0, effort)
    runs = (first, *(tuner.Run(warps(count), (), 101.0, effort) for count in others))
    return tuner.Repeated("win_attn_fwd", PROBLEM.to_dict(), runs)


def test_a_run_agrees_by_the_usual_winner_or_a_tie_with_it(tuner: ModuleType) -> None:
    found = repeated(tuner, [4] * 10 + [8] * 8 + [2])
    assert (found.usual, found.agreeing(0), len(found.runs), found.agrees) == (0, 19, 20, True)
    assert repeated(tuner, [4] * 17 + [2, 1]).agrees is False
    row = dict(zip(tuner.COLUMNS, tuner.row(found), strict=True))
    assert (row["agree"], row["by the first"], row["winners"], row["worst / best"]) == ("19 of 20", "19", "3", "1.010")
    assert (row["s a run"], row["trials/s"], row["waited"]) == ("5.0", "2.0", "20%")


def test_an_unusual_first_run_is_no_measure_for_the_others(tuner: ModuleType) -> None:
    """The first chose 4 warps, tied with 8; most chose 8, one 2 warps, tied with 8 by its own race; one chose 1."""
    effort = Effort(10, 5.0, 1.0)
    found = repeated(tuner, [8] * 16)
    others = (tuner.Run(warps(2), (warps(8),), 101.0, effort), tuner.Run(warps(1), (), 101.0, effort))
    found = replace(found, runs=(*found.runs, *others))
    assert (found.usual, found.agreeing(found.usual), found.agreeing(0)) == (1, 18, 17)
    assert found.agrees is False and replace(found, runs=found.runs[:-1]).agrees is True


def test_configs_that_run_the_same_code_are_one_winner(tuner: ModuleType) -> None:
    codes = dict(zip((tuner.config_key(warps(count)) for count in (1, 2, 4, 8)), "abac", strict=True))
    found = repeated(tuner, [1, 2])
    found = replace(found, runs=tuple(replace(run, codes=codes) for run in found.runs))
    assert found.agreeing(0) == 2, "1 and 4 warps are one code"
    assert dict(zip(tuner.COLUMNS, tuner.row(found), strict=True))["winners"] == "2"
    assert tuner.code_of({"binary_sha": "x", "call_sha": "y"}) == "x y" and tuner.code_of({}) == ""


def test_the_page_names_command_versions_and_what_was_missed(tuner: ModuleType) -> None:
    text = tuner.page([repeated(tuner, [2])], FACTS, "python benchmarks/tuner.py", "60 trials")
    assert "Fake 100, 2026-01-02" in text and "`python benchmarks/tuner.py`" in text and "triton 3" in text
    assert "| 1 of 2 (missed) | 1 |" in text and "budget of a run: 60 trials" in text


@pytest.mark.parametrize("option", ["--retunes", "--jobs"])
def test_nothing_is_no_number_of_runs(option: str, tuner: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tuner.main([option, "0"])
    assert "a whole number from 1 on is needed; got 0" in capsys.readouterr().err


class Noisy(FakeMeasurer):
    """Times of a landscape with 1 % of noise; a race shares its drift."""

    def __init__(self, seed: int) -> None:
        super().__init__(make_landscape(1, fail_share=0.0))
        self.rng = random.Random(seed)

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """Five samples."""
        return self._samples(config, [1.0] * 5)

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 60, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        """Sixty samples."""
        drift = [1 + 0.05 * math.sin(block / 7) for block in range(rounds)]
        return [self._samples(config, drift) for config in configs]

    def _samples(self, config: Config, drift: list[float]) -> TrialResult:
        true_us = self.time_us(config)
        assert true_us is not None
        return TrialResult("ok", **vars(summarize([true_us * d * self.rng.gauss(1, 0.01) for d in drift])))


def test_tunings_of_a_whole_space_agree_and_count_their_effort(tuner: ModuleType) -> None:
    """With the whole space measured only noise is left, and races see through it."""

    def tune(seed: int) -> Any:
        how = {"measurer": Noisy(seed), "preparer": None, "fingerprint": FINGERPRINT, "digest_of": digest_of}
        return tuner.tune_once(SPEC, PROBLEM, seed, trials(1000), (), **how)

    found = tuner.repeat(tune, 2, SPEC.family, PROBLEM)
    assert found.agreeing(0) == 2 and found.agrees
    assert all(run.effort.trials > 900 and run.effort.seconds > run.effort.waited_seconds for run in found.runs)
    with pytest.raises(NSAError, match="no config works"):
        tuner.repeat(lambda seed: None, 3, SPEC.family, PROBLEM)


def test_known_winners_are_those_of_other_problems_and_are_tried_first(tuner: ModuleType) -> None:
    spec = get_spec("win_attn_fwd")
    problem = Problem(seq_q=8192, seq_k=8192, num_q_heads=64, num_kv_heads=4, d_qk=128, d_v=128)
    with TuningStore("sqlite://") as store:
        shipped = store.winners(family=spec.family)
    known, own = tuner.winners_elsewhere(spec, problem), spec.problem_key(problem)
    keys = {winner.problem_key for winner in shipped}
    assert own in keys and {winner.problem_key for winner in known} == keys - {own}

    other = {**DEFAULT, "num_warps": 8}
    record = replace(known[0], family=SPEC.family, config=other, problem=LONGER.to_dict())
    record = replace(record, problem_key=SPEC.problem_key(LONGER), fingerprint=FINGERPRINT)
    measurer = FakeMeasurer(make_landscape(1))
    how = {"measurer": measurer, "fingerprint": FINGERPRINT, "digest_of": digest_of}
    tuner.tune_once(SPEC, PROBLEM, 0, trials(20), (record,), **how)
    assert measurer.measured[:2] == [config_key(DEFAULT), config_key(other)]


def test_recorded_spaces_are_tuned_again_without_a_gpu(tuner: ModuleType, tmp_path: Path) -> None:
    recorded = Path(__file__).parent / "recorded" / "h200.jsonl.gz"
    arguments = ["--replay", str(recorded), "--families", "cmp_pool_bwd", "--retunes", "2", "--budget", "12"]
    tuner.main([*arguments, "--folder", str(tmp_path)])
    (page,) = tmp_path.glob("*-h200-tuner-replayed.md")
    text = page.read_text(encoding="utf-8")
    assert text.count("| cmp_pool_bwd | T ") == 2 and " of 2" in text and "12 trials" in text
