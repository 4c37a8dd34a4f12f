"""What was served below the exact step: counted, exported, read again with errors by line, and planned by tune."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cpu.test_dispatch import HERE, LONGER, PROBLEM, SPEC, FakeSource, FakeWinner, config, winner

import nsa_autotune
from nsa_autotune.cli.app import main
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.ladder import Step
from nsa_autotune.dispatch.misses import MOST_MISSES, Misses, read_misses
from nsa_autotune.errors import InvalidInput, NotTuned
from nsa_autotune.kernels import get_spec
from nsa_autotune.ops import serve
from nsa_autotune.spec import Problem


def dispatcher(*winners: FakeWinner, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Dispatcher:
    """A dispatcher on the GPU `HERE` whose kernels do nothing."""
    served = Dispatcher(FakeSource(*winners), fingerprint=HERE, **how)
    kernel = SimpleNamespace(serve=lambda trusted, ordinary: lambda tensors: None)
    monkeypatch.setattr(served, "_load", lambda *_: kernel)
    return served


def launch(served: Dispatcher, problem: Problem, times: int = 1) -> None:
    """Calls of one shape."""
    for _ in range(times):
        served.launch(SPEC, problem, lambda: problem, "cuda:0", {})


def test_launches_below_the_exact_step_are_counted_by_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served = dispatcher(winner(4), monkeypatch=monkeypatch)
    launch(served, PROBLEM, 5)  # exact
    launch(served, LONGER, 2)
    launch(served, LONGER.replace(seq_q=30_000, seq_k=30_000), 3)  # the same bucket
    launch(served, PROBLEM.replace(d_qk=64, d_v=64), 1)
    assert served.export_misses(tmp_path / "misses.jsonl") == 2
    first, second = map(json.loads, (tmp_path / "misses.jsonl").read_text().splitlines())
    assert (first["family"], first["count"], first["step"]) == (SPEC.family, 5, Step.NEAREST)
    assert Problem.from_dict(first["problem"]) == LONGER
    assert (second["count"], second["step"]) == (1, Step.DEFAULT)
    assert read_misses(tmp_path / "misses.jsonl") == [(SPEC, LONGER), (SPEC, PROBLEM.replace(d_qk=64, d_v=64))]


def test_a_refusal_is_a_miss_of_both_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    lenient = dispatcher(monkeypatch=monkeypatch)
    with pytest.raises(NotTuned):
        launch(lenient.stricter(), PROBLEM)
    (miss,) = lenient.misses.most_asked()
    assert (miss.problem, miss.count, miss.to_dict()["step"]) == (PROBLEM, 1, "refused")


def test_misses_are_bounded() -> None:
    misses = Misses()
    for heads in range(1, MOST_MISSES + 3):
        misses.note(SPEC, PROBLEM.replace(num_q_heads=heads, num_kv_heads=heads), Step.DEFAULT).count += 1
    assert len(misses) == MOST_MISSES == 1000 and misses.left_out == 2
    misses.note(SPEC, PROBLEM.replace(num_q_heads=1, num_kv_heads=1), Step.DEFAULT).count += 1
    assert misses.left_out == 2 and misses.most_asked()[0].count == 2


def test_the_default_dispatchers_misses_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = dispatcher(monkeypatch=monkeypatch)
    monkeypatch.setattr(serve, "default_dispatcher", lambda: served)
    launch(served, PROBLEM)
    assert nsa_autotune.export_misses(tmp_path / "misses.jsonl") == 1
    assert read_misses(tmp_path / "misses.jsonl") == [(SPEC, PROBLEM)]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "misses.jsonl"
    path.write_text("old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(InvalidInput, match="No space left"):
        Misses().export(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


GOOD = {"family": SPEC.family, "problem": PROBLEM.to_dict(), "count": 3, "step": "default config"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "a line must be JSON"),
        ("[]", "a line must be a JSON object of family, problem, count, step"),
        ({**GOOD, "family": "win_attn_fwdd"}, "known family.*Did you mean win_attn_fwd"),
        ({**GOOD, "count": -1}, "count must be a whole number"),
        ({**GOOD, "problem": {**PROBLEM.to_dict(), "seq_k": 0}}, "seq_k must be a positive int"),
        ({**GOOD, "problem": {**PROBLEM.to_dict(), "d_qk": 72}}, "head dims must be multiples of 16"),
        ({**GOOD, "problem": {"seq_k": 8192}}, "just the fields of Problem"),
        ({**GOOD, "problem": {**PROBLEM.to_dict(), "nsa": {"window_size": 512}}}, "just the fields of Problem"),
        ({**GOOD, "problem": 7}, "fields of Problem"),
        ({**GOOD, "problem": {**PROBLEM.to_dict(), "locality": "high"}}, "fields of Problem"),
        ({**GOOD, "family": ["win_attn_fwd"]}, "fields of Problem"),
    ],
)
def test_a_mistake_is_told_with_its_line(line: Any, sentence: str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "misses.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    with pytest.raises(InvalidInput, match=sentence) as caught:
        read_misses(path)
    assert caught.value.values["line"] == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="misses are read from a text file"):
        read_misses(tmp_path / "none.jsonl")


# tune --from-misses


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tune is about to do."""
    found: list[Any] = []
    monkeypatch.setattr("nsa_autotune.cli.tune.execute", lambda run: found.extend(run.work) or 0)
    return found


def write(path: Path, *entries: tuple[str, Problem]) -> str:
    """A file of misses."""
    lines = [{**GOOD, "family": family, "problem": problem.to_dict()} for family, problem in entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_tune_takes_just_the_misses(planned: list[Any], tmp_path: Path) -> None:
    entries = [("win_attn_fwd", LONGER), ("gate_sum_bwd", PROBLEM), ("win_attn_fwd", PROBLEM)]
    path = write(tmp_path / "misses.jsonl", *entries)
    assert main(["tune", "--from-misses", path, "--target", "cuda:90"]) == 0
    assert planned == [(get_spec(family), problem) for family, problem in entries]
    planned.clear()
    assert main(["tune", "--from-misses", path, "--target", "cuda:90", "--families", "gate_sum_bwd"]) == 0
    assert planned == [(get_spec("gate_sum_bwd"), PROBLEM)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seq", "8k"], "names its problems itself"),
        (["--nsa", "window_size=256"], "names its problems itself"),
        (["--families", "cmp_pool_fwd"], "names no problem of these families"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    options: list[str], sentence: str, planned: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "misses.jsonl", ("win_attn_fwd", PROBLEM))
    assert main(["tune", "--from-misses", path, "--target", "cuda:90", *options]) != 0
    assert sentence in " ".join(capsys.readouterr().err.split()) and not planned


# winners are read once


def test_a_new_length_of_a_bucket_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    served = dispatcher(winner(4), monkeypatch=monkeypatch)
    launch(served, PROBLEM)
    ladder = []
    monkeypatch.setattr("nsa_autotune.dispatch.dispatcher.choose", lambda *_: ladder.append(1))
    odd = PROBLEM.replace(seq_q=8000, seq_k=8000)
    launch(served, odd)
    assert served.choose(SPEC, odd).config == config(4)
    assert not ladder and served._source.asked == 1 and served.stats == {Step.EXACT: 2}


def test_a_bucket_shares_no_config_that_breaks_a_rule_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    served = dispatcher(winner(4), monkeypatch=monkeypatch)
    served.choose(SPEC, PROBLEM)
    legal = type(SPEC).broken_constraint
    monkeypatch.setattr(
        type(SPEC), "broken_constraint", lambda spec, p, c: "too short" if p.seq_k < 8192 else legal(spec, p, c)
    )
    assert served._choose(SPEC, PROBLEM, HERE).config == config(4)
    with pytest.raises(Exception, match="too short"):  # the default breaks it as well: the ladder was asked
        served.choose(SPEC, PROBLEM.replace(seq_q=8000, seq_k=8000))


def test_a_retune_is_seen_after_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    served = dispatcher(monkeypatch=monkeypatch)
    twin = served.stricter()
    launch(served, PROBLEM)
    for found in ((), (winner(4),)):
        served._source.found = found
        with pytest.raises(NotTuned):
            twin.choose(SPEC, PROBLEM)
    launch(served, PROBLEM.replace(seq_q=8000, seq_k=8000))
    assert served.stats == {Step.DEFAULT: 2}
    served.refresh()
    launch(served, PROBLEM)
    assert served.stats == {Step.DEFAULT: 2, Step.EXACT: 1}
    assert twin.choose(SPEC, PROBLEM).step is Step.EXACT
