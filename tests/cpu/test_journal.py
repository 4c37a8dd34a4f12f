"""The journal names what a dead host was at, survives being cut anywhere, and belongs to one tuner at a time."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from nsa_autotune.bench.journal import (
    RACE,
    Journal,
    StageLines,
    append,
    is_suspicion,
    journal_name,
    read_lines,
    suspects,
)
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.codegen.paths import state_dir
from nsa_autotune.errors import WorkerError
from nsa_autotune.spec import Config, Problem

PROBLEM = Problem().to_dict()
CONFIGS: list[Config] = [{"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 256}]


def die_at(folder: Path, *told: tuple[int, str], configs: list[Config] = CONFIGS, provider: str = "") -> Path:
    """The journal of a tuner that asked for three variants and died after these stages were told."""
    journal = Journal("cuda:0", folder, {"driver": "1"})
    journal.ask(provider or "fake", PROBLEM, configs, provider)
    lines = StageLines(str(journal.path))
    lines.begin()
    for index, stage in told:
        lines.tell(index, stage)
    os.close(journal._file)  # as the kernel does for a dead process: the lock is free, nothing is tidied up
    return journal.path


def blamed(folder: Path) -> list[tuple[object, str, int]]:
    """Block, stage and company of those that the next tuner finds unfinished."""
    with Journal("cuda:0", folder) as journal:
        return [(s.config.get("BLOCK"), s.stage, s.others) for s in journal.unfinished()]


GATED = [(i, stage) for i in range(3) for stage in ("problem", "render", "compile", "launch", "accuracy")]
RACING = [*GATED, (0, RACE), (1, RACE), (2, RACE)]


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([], []),
        ([(0, "problem"), (0, "render"), (0, "inputs")], []),  # nothing of the variant ran yet
        ([(0, "compile")], [(64, "compile", 0)]),
        ([(0, "compile"), (0, "launch"), (0, "accuracy"), (1, "compile"), (1, "launch")], [(128, "launch", 0)]),
        ([(0, "compile"), (0, "launch"), (0, "accuracy"), (0, "launch")], [(64, "launch", 0)]),
        (RACING, [(256, "accuracy", 0)]),
        ([*RACING, (0, "timing")], [(64, "timing", 0)]),
        ([*RACING, (0, "timing"), (0, "timing"), (1, "timing")], [(128, "timing", 0)]),
        (
            [*RACING, (0, "timing"), (1, "timing"), (2, "timing"), (0, "timing")],  # samples leave no lines
            [(256, "timing", 2), (128, "timing", 2), (64, "timing", 2)],
        ),
        ([*GATED, (1, RACE), (1, "timing")], [(128, "timing", 0)]),
        (
            [*RACING, (0, "timing"), (1, "timing"), (0, RACE), (2, RACE), (0, "timing"), (2, "timing")],  # 1 raised
            [(256, "timing", 1), (64, "timing", 1)],
        ),
    ],
    ids=["asked", "host", "compile", "second", "again", "clock", "first", "warm_up", "race", "alone", "second_race"],
)
def test_the_killer_is_named(tmp_path: Path, told: list[tuple[int, str]], found: list[tuple[object, str, int]]) -> None:
    die_at(tmp_path, *told)
    assert blamed(tmp_path) == found
    assert blamed(tmp_path) == found, "what nobody settled stays"


def test_a_sample_writes_nothing(tmp_path: Path) -> None:
    path = die_at(tmp_path, *RACING, *[(i % 3, "timing") for i in range(300)])
    kinds = [next(iter(line)) for line in read_lines(path)]
    assert kinds == ["open", "ask"] + ["at"] * 9 + ["clock"] + ["at"] * 3
    assert len([line for line in read_lines(path) if line.get("stage") == "timing"]) == 3


def test_a_suspect_becomes_a_crash_that_names_the_journal(tmp_path: Path) -> None:
    path = die_at(tmp_path, *RACING, (0, "timing"), (1, "timing"), (2, "timing"))
    with Journal("cuda:0", tmp_path) as journal:
        suspect = journal.unfinished()[0]
    result = suspect.result()
    assert isinstance(result, TrialResult) and result.status == "crash"
    assert str(path) in result.reason and "'timing'" in result.reason and suspect.when in result.reason
    assert "2 others on the clock" in result.reason
    assert suspect.context == {"driver": "1"}, "of the run that died"
    assert is_suspicion(result.reason) and not is_suspicion("In stage 'launch': signal SIGKILL.")


def test_a_library_is_named_as_what_it_is(tmp_path: Path) -> None:
    die_at(tmp_path, (0, "library"), configs=[{}], provider="cudnn_sdpa")
    with Journal("cuda:0", tmp_path) as journal:
        (suspect,) = journal.unfinished()
    assert (suspect.provider, suspect.config) == ("cudnn_sdpa", {})


def test_every_cut_of_a_journal_can_be_read(tmp_path: Path) -> None:
    path = die_at(tmp_path, *RACING, (0, "timing"))
    whole, named = path.read_bytes(), set()
    for size in [*range(0, len(whole), 7), len(whole)]:
        path.write_bytes(whole[:size])
        named.update((s.config["BLOCK"], s.stage) for s in suspects(read_lines(path), "there"))
    assert named == {(c["BLOCK"], s) for c in CONFIGS for s in ("compile", "launch", "accuracy")} | {(64, "timing")}


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = die_at(tmp_path, (0, "compile"))
    with path.open("ab") as file:
        file.write(b'{"at": 1, "sta')  # as a full disk leaves it
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    append(handle, {"at": 2, "stage": "launch", "when": "now"})
    os.close(handle)
    assert blamed(tmp_path) == [(256, "launch", 0)]


@pytest.mark.parametrize(
    "line", [b'{"at": 9, "stage": "launch", "when": "now"}', b'{"at": 0}', b'{"at": "x", "stage": 1}']
)
def test_lines_of_another_version_are_told_and_stop_nobody(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = die_at(tmp_path, (0, "compile"))
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert blamed(tmp_path) == []
    assert "does not understand" in caplog.text


def test_a_clean_end_leaves_an_empty_journal(tmp_path: Path) -> None:
    with Journal("cuda:0", tmp_path) as journal:
        journal.ask("fake", PROBLEM, CONFIGS)
        assert journal.path.read_bytes() != b""
        journal.answered()
    assert journal.path.read_bytes() == b""
    journal.close()  # twice is once


def test_what_was_not_answered_or_not_settled_stays(tmp_path: Path) -> None:
    die_at(tmp_path, (1, "launch"))
    with Journal("cuda:0", tmp_path) as journal:
        journal.ask("fake", PROBLEM, CONFIGS[:1])
        journal.answered()
    assert blamed(tmp_path) == [(128, "launch", 0)]
    with Journal("cuda:0", tmp_path) as journal:
        journal.settle()
        assert journal.unfinished() == []
        journal.ask("fake", PROBLEM, CONFIGS)
    assert [line for line in read_lines(journal.path) if "ask" in line], "the answer is missing"


def test_a_second_tuner_on_the_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.bench.journal.LOCK_WAIT_S", 0.05)
    with Journal("cuda:0", tmp_path) as first:
        first.ask("fake", PROBLEM, CONFIGS)
        before = first.path.read_bytes()
        with pytest.raises(WorkerError, match=rf"one tuner at a time.*other_process={os.getpid()}.*--device"):
            Journal("cuda:0", tmp_path)
        assert first.path.read_bytes() == before
        Journal("cuda:1", tmp_path).close()
    Journal("cuda:0", tmp_path).close()


@pytest.mark.parametrize(
    ("device", "visible", "name"),
    [
        ("cuda:0", None, "journal-box-cuda-0.jsonl"),
        ("cuda", None, "journal-box-cuda-0.jsonl"),
        ("cuda:1", "2,5", "journal-box-cuda-5.jsonl"),
        ("cuda:5", "", "journal-box-cuda-5.jsonl"),
        ("cuda:0", "GPU-8f/1", "journal-box-cuda-GPU-8f-1.jsonl"),
        ("cpu", "3", "journal-box-cpu-0.jsonl"),
    ],
)
def test_a_device_has_one_journal_by_whatever_number_it_goes(device: str, visible: str | None, name: str) -> None:
    assert journal_name(device, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, "box") == name


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkerError, match=r"journal that can be written.*NSA_AUTOTUNE_STATE_DIR"):
        Journal("cuda:0", tmp_path / "file")


def test_a_full_disk_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal("cuda:0", tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nsa_autotune.bench.journal.os.write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            journal.ask("fake", PROBLEM, CONFIGS)
            journal.answered()
    monkeypatch.undo()
    journal.close()
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]


def test_a_line_is_on_disk_before_the_stage_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("nsa_autotune.bench.journal.os.fsync", lambda file: synced.append(os.fstat(file).st_size))
    path = die_at(tmp_path, (0, "launch"))
    assert synced[-1] == path.stat().st_size
    assert json.loads(path.read_bytes().split(b"\n")[-2])["stage"] == "launch"


def test_the_state_folder_is_chosen_as_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert state_dir() == Path(os.environ["NSA_AUTOTUNE_STATE_DIR"])
    monkeypatch.delenv("NSA_AUTOTUNE_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "nsa_autotune"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert state_dir() == Path("/home/somebody/.local/state/nsa_autotune")
