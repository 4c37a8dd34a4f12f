"""`tune --sweep`: which problems are tuned, in which order, what is left out, and that lengths share a binary."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cpu.search_fakes import FINGERPRINT, PROBLEM, SPEC, FakeMeasurer, digest_of, make_landscape, make_spec, trials
from problems import served

import nsa_autotune
from nsa_autotune.cli import tune as tune_command
from nsa_autotune.cli import tune_run
from nsa_autotune.cli.app import main
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidInput, InvalidProblem
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.presets import parse_seq_lens
from nsa_autotune.search.space import config_key
from nsa_autotune.search.sweep import largest_of_buckets, ordered, parse_counts, plan_sweep
from nsa_autotune.search.task import problem_distance
from nsa_autotune.search.tuner import tune_problem
from nsa_autotune.spec import Problem


def at(tokens: int, batch: int = 1, locality: float = 0.8) -> Problem:
    return PROBLEM.replace(seq_q=tokens, seq_k=tokens, batch=batch, locality=locality)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2k..16k", (2048, 4096, 8192, 16384)),
        ("2k..5k,100,4k", (2048, 4096, 5120, 100)),
        ("8k..8k", (8192,)),
        ("1000,1000", (1000,)),
    ],
)
def test_a_range_of_lengths_doubles_and_holds_its_end(text: str, expected: tuple[int, ...]) -> None:
    assert parse_seq_lens(text) == expected


def test_counts_are_lists_and_ranges() -> None:
    assert parse_counts("1,4", "--batch") == (1, 4)
    assert parse_counts("8..64,64,5", "--heads") == (8, 16, 32, 64, 5)


@pytest.mark.parametrize("text", ["0", "-1", "", "4,", "x", "1..", "..4", "1...4", "9999999999", "²", "4k"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--batch takes whole numbers from 1"):
        parse_counts(text, "--batch")


@pytest.mark.parametrize("call", [lambda: parse_counts("8..4", "--heads"), lambda: parse_seq_lens("8..4")])
def test_a_falling_range_is_refused(call: object) -> None:
    with pytest.raises(InvalidProblem, match=r"smaller number to the larger.*Write 4\.\.8"):
        call()  # type: ignore[operator]


def test_a_bucket_is_tuned_at_its_largest_member() -> None:
    problems = [at(5000), at(8192), at(8000), at(4096), at(5000, locality=0.0)]
    assert largest_of_buckets(SPEC, problems) == [at(8192), at(4096), at(5000, locality=0.0)]
    plan = plan_sweep([SPEC], [*problems, at(8192)])
    assert (len(plan.steps), plan.merged, plan.skipped) == (3, 2, ())


def test_each_problem_comes_when_it_is_nearest_to_those_before() -> None:
    rng = random.Random(3)
    grid = [at(512 << i, batch, locality) for i in range(4) for batch in (1, 2, 8) for locality in (0.0, 0.5)]
    rng.shuffle(grid)
    found = ordered(SPEC, grid)
    assert (found[0].seq_k, found[0].batch) == (512, 1)
    assert Counter(map(repr, found)) == Counter(map(repr, grid))

    def gap(problem: Problem, before: list[Problem]) -> float:
        return min(problem_distance(SPEC, other, problem) for other in before)

    for number in range(1, len(found)):
        before, rest = found[:number], found[number:]
        assert gap(found[number], before) == min(gap(problem, before) for problem in rest)
    assert ordered(SPEC, []) == []


def test_illegal_combinations_are_skipped_and_counted() -> None:
    specs = [get_spec("cmp_mlp_fwd"), get_spec("win_attn_fwd")]
    plan = plan_sweep(specs, [Problem(phi_hidden=65), Problem(phi_hidden=64)], {"heads do not divide": 4})
    assert [(step.spec.family, step.problem.phi_hidden) for step in plan.steps] == [
        ("cmp_mlp_fwd", 64),
        ("win_attn_fwd", 65),
    ]
    assert plan.skipped[0] == ("heads do not divide", 4)
    assert plan.skipped[1][1] == 1 and "phi_hidden must be a power of two" in plan.skipped[1][0]


def test_an_empty_sweep_is_an_error_with_its_reasons() -> None:
    with pytest.raises(InvalidProblem, match=r"no legal problem.*phi_hidden must be a power of two.*\(1\)"):
        plan_sweep([get_spec("cmp_mlp_fwd")], [Problem(phi_hidden=65)], {})


def test_each_problem_starts_from_the_winners_before() -> None:
    plan = plan_sweep([SPEC], [at(2048), at(512), at(1024)])
    landscape = make_landscape(4)
    with TuningStore("sqlite://", import_shipped=False) as store:
        before: list[str] = []
        for step in plan.steps:
            measurer = FakeMeasurer(landscape)
            winner = tune_problem(
                SPEC,
                step.problem,
                measurer=measurer,
                store=store,
                fingerprint=FINGERPRINT,
                budget=trials(40 if not before else 6),
                digest_of=digest_of,
            )
            assert winner is not None
            assert set(before) <= set(measurer.measured[:4])
            before.append(config_key(winner.config))


def test_families_follow_each_other_whole() -> None:
    other = make_spec("toy_bwd")
    plan = plan_sweep([SPEC, other], [at(512), at(1024)])
    assert [step.spec.family for step in plan.steps] == ["toy_fwd", "toy_fwd", "toy_bwd", "toy_bwd"]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[tuple[str, Problem]]]:
    runs: list[tune_run.Run] = []
    monkeypatch.setattr(tune_command, "execute", lambda run: runs.append(run) or 0)
    code = main(["tune", "--target", "cuda:90", *arguments])
    return code, [(spec.family, problem) for run in runs for spec, problem in run.work]


def test_the_command_sweeps_a_grid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--seq", "2k..8k,7k", "--batch", "1,4", "--heads", "32,64", "--kv-heads", "4,5")
    code, work = run_command(monkeypatch, "--sweep", *grid, "--families", "win_attn_fwd,gate_sum_fwd")
    assert code == 0
    found = {(f, p.seq_k, p.batch, p.num_q_heads, p.num_kv_heads) for f, p in work}
    assert found == {
        (family, tokens, batch, heads, 4)
        for family in ("win_attn_fwd", "gate_sum_fwd")
        for tokens in (2048, 4096, 8192)
        for batch in (1, 4)
        for heads in (32, 64)
    }
    assert len(work) == len(found)
    err = capsys.readouterr().err
    assert "sweep: 24 problems of 2 families" in err
    assert "8 more share a bucket" in err
    assert "16 skipped: the number of query heads must be a multiple" in err


def test_without_sweep_lists_are_taken_and_an_illegal_combination_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--families", "win_attn_fwd", "--seq", "7k,8k", "--batch", "1,2", "--heads", "32")
    code, work = run_command(monkeypatch, *line)
    assert code == 0
    assert [(p.seq_k, p.batch, p.num_q_heads) for _, p in work] == [
        (7168, 1, 32),
        (8192, 1, 32),
        (7168, 2, 32),
        (8192, 2, 32),
    ]
    code, work = run_command(monkeypatch, *line, "--kv-heads", "4,5")
    assert (code, work) == (2, [])
    assert "must be a multiple" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seq", "2k", "--heads", "64", "--kv-heads", "5,6"), ("no legal problem", "must be a multiple", "(2)")),
        (("--seq", "banana"), ("sequence lengths are positive", "banana")),
        (("--seq", "2k", "--seq-q", "4k"), ("no legal problem", "more queries than keys")),
        (("--batch", "0"), ("--batch takes whole numbers",)),
    ],
    ids=lambda value: "_".join(value),
)
def test_a_sweep_without_a_problem_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    assert run_command(monkeypatch, "--sweep", *arguments) == (2, [])
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_a_variant_has_one_source_for_all_lengths_and_batches() -> None:
    problems = [Problem(seq_q=t, seq_k=t, batch=b) for t, b in ((2048, 1), (8192, 4), (131072, 1))]
    for spec in all_specs().values():
        asked = [served(spec, problem) for problem in problems]
        config = spec.default_config(asked[0])
        assert len({spec.variant_digest(problem, config, "x") for problem in asked}) == 1, spec.family


def test_lengths_and_batches_share_one_entry_of_tritons_cache(tmp_path: Path) -> None:
    script = """
import json, os
from nsa_autotune.codegen.compile import compile_variant
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem
problems = [Problem(seq_q=t, seq_k=t, batch=b) for t, b in ((2048, 1), (131072, 1), (8192, 4))]
found = {}
for family in ("gate_sum_fwd", "win_attn_fwd"):
    spec, before = get_spec(family), len(os.listdir(os.environ["TRITON_CACHE_DIR"]))
    shas = {compile_variant(spec, p, spec.default_config(problems[0]), "cuda:90").binary_sha for p in problems}
    found[family] = [len(shas), len(os.listdir(os.environ["TRITON_CACHE_DIR"])) - before]
print(json.dumps(found))
"""
    (tmp_path / "triton").mkdir()
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "NSA_AUTOTUNE_CACHE_DIR": str(tmp_path / "generated")}
    environment = {**os.environ, **caches, "PYTHONPATH": str(Path(nsa_autotune.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter would compile nothing
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"gate_sum_fwd": [1, 1], "win_attn_fwd": [1, 1]}
