"""`db merge`, `prune`, `verify` and the T4 export as a user types them."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cpu.store_fakes import RIVAL

from nsa_autotune.cli import db_share
from nsa_autotune.cli.app import main
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem, canonical_json

FINGERPRINT = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
SPEC = get_spec("win_attn_fwd")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)
    monkeypatch.setattr("nsa_autotune.db.verify.shipped_files", dict)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), " ".join(captured.err.split())

    return call


def make_winner(median_us: float = 120.0, **changes: object) -> WinnerRecord:
    problem = Problem()
    record = WinnerRecord(
        fingerprint=FINGERPRINT,
        family=SPEC.family,
        problem=problem.to_dict(),
        problem_key=SPEC.problem_key(problem),
        config=SPEC.default_config(problem),
        template_digest=template_digest(SPEC),
        median_us=median_us,
        p20_us=median_us,
        p80_us=median_us,
        samples_us=(median_us,),
    )
    return replace(record, **changes)


def make_trial(**changes: object) -> TrialRecord:
    return replace(make_winner().as_trial(), stage="search", **changes)


@pytest.fixture
def here(tmp_path: Path) -> str:
    return database(tmp_path / "here.sqlite", make_winner(120.0))


def database(path: Path, *records: WinnerRecord | TrialRecord) -> str:
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        for record in records:
            if isinstance(record, WinnerRecord):
                store.set_winner(record)
            else:
                store.add_trial(record)
    return f"sqlite:///{path}"


def test_what_ships_is_left_out_and_told_so(run: Run, tmp_path: Path) -> None:
    """True of another program's winners, and of one's own that come back from an export."""
    one = database(tmp_path / "one.sqlite", make_winner(source="shipped"))
    other = database(tmp_path / "other.sqlite")
    told = "1 shipped winner left out, for each copy of the program brings its own"
    export = tmp_path / "winners.jsonl"
    assert run("db", "export", str(export), "--db", one)[0] == 0
    assert told in run("db", "merge", str(export), "--db", one)[1]
    assert told in run("db", "merge", str(tmp_path / "one.sqlite"), "--db", other)[1]


def test_merge_says_which_winner_serves(run: Run, here: str, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    confirmed = make_winner(100.0, verdict="confirmed", rivals=(RIVAL,))
    database(other, confirmed, make_winner(5.0, template_digest="t2"), make_trial())
    code, out, err = run("db", "merge", str(other), "--db", here)
    assert (code, err) == (0, "")
    assert "1 trial read, 1 new; 0 designs read, 0 new; 2 winners read, 1 new" in out
    assert "1 of them do not serve, for the one here goes first" in out
    assert "T 8192 HQ 64 H 4 d 128 bfloat16" in out and "{" not in out, "problems in words"
    assert "both measurements are kept" in out and "120 100 here" in out
    code, out, _ = run("db", "merge", f"sqlite:///{other}", "--own", "--db", here)
    assert code == 0 and "came" in out.split()
    with TuningStore(here) as store:
        assert {(w.median_us, w.source) for w in store.winners()} == {(100.0, "local"), (5.0, "local")}
        assert {t.median_us for t in store.trials(stage="final")} == {100.0, 120.0}


def test_merge_takes_an_export(run: Run, here: str, tmp_path: Path) -> None:
    export = tmp_path / "all.jsonl"
    assert run("db", "export", str(export), "--records", "all", "--db", here)[0] == 0
    fresh = f"sqlite:///{tmp_path}/fresh.sqlite"
    code, out, _ = run("db", "merge", str(export), "--db", fresh)
    assert code == 0 and "1 winner read, 1 new" in out
    export.write_text(export.read_text().replace('"median_us":120.0', '"median_us":NaN'))
    code, out, err = run("db", "merge", str(export), "--db", fresh)
    assert code == 2 and "line 1" in err and "NaN is not JSON" in err and "Nothing was imported" in err


def test_an_import_again_has_nothing_new(run: Run, here: str, tmp_path: Path) -> None:
    export = tmp_path / "all.jsonl"
    database(tmp_path / "here.sqlite", make_trial())
    assert run("db", "export", str(export), "--records", "all", "--db", here)[0] == 0
    code, out, _ = run("db", "import", str(export), "--db", here)
    assert code == 0 and out.endswith(
        "all.jsonl: 1 trial read, 0 new; 0 designs read, 0 new; 1 winner read, 0 new; 1 of them were here already"
    )
    export.write_text("\n")
    assert run("db", "import", str(export), "--db", here)[:2] == (0, f"{export}: holds no record; nothing was added")


@pytest.mark.parametrize("command", ["import", "merge"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"NOPE": 1}}, "is missing"),
        ({"config": {**make_winner().config, "num_warps": "__import__('os')"}}, "num_warps"),
        ({"config": {**make_winner().config, "num_warps": 4.0}}, "num_warps=4.0"),
        ({"problem_key": '{"seq_k":8192}'}, "the problem's key is"),
    ],
    ids=["unknown", "code", "float", "key"],
)
def test_winners_that_their_kernel_refuses_stay_out(
    run: Run, here: str, tmp_path: Path, command: str, changes: dict[str, object], words: str
) -> None:
    other, export = tmp_path / "other.sqlite", tmp_path / "other.jsonl"
    bad = make_winner(1.0, **changes)
    url, before = database(other, make_winner(template_digest="t2"), bad), run("db", "query", "--db", here)
    assert run("db", "export", str(export), "--db", url)[0] == 0
    for source in (export, other) if command == "merge" else (export,):
        code, _, err = run("db", command, str(source), "--db", here)
        assert code == 2 and words in err and SPEC.family in err and "Nothing was" in err
    assert run("db", "query", "--db", here) == before
    assert words in run("db", "verify", "--db", url)[1]


def test_what_is_unknown_stays_as_data(run: Run, here: str, tmp_path: Path) -> None:
    newer = make_winner(1.0, family="no_such_family", config={"NOPE": 1})
    database(tmp_path / "other.sqlite", newer, make_winner(1.0, template_digest="t9", config={"OLD": 1}))
    assert run("db", "merge", str(tmp_path / "other.sqlite"), "--db", here)[0] == 0
    assert run("db", "verify", "--db", here)[0] == 0
    for asked in ("db query", "db stats", "db stats --show stale --now triton=9", "doctor"):
        assert run(*asked.split(), "--db", here)[0] == 0
    with TuningStore(here) as store:
        assert [w.median_us for w in store.winners(template_digest=template_digest(SPEC))] == [1.0, 120.0]


def test_control_characters_of_a_database_are_written_out(run: Run, here: str, tmp_path: Path) -> None:
    spoilt = {**FINGERPRINT, "gpu": "\x1b[2Jcleared"}
    with closing(sqlite3.connect(tmp_path / "here.sqlite")) as plain:  # an earlier version took such names
        values = [spoilt["gpu"], canonical_json(spoilt)]
        plain.execute("UPDATE nsa_fingerprints SET gpu = ?, facts = ?", values)
        plain.commit()
    for asked in ("doctor", "db query", "db query --format csv", "db query --format json", "db verify"):
        _, out, err = run(*asked.split(), "--db", here)
        assert "[2Jcleared" in out and "\x1b" not in out + err, asked


def test_merge_of_nothing(run: Run, here: str, tmp_path: Path) -> None:
    code, _, err = run("db", "merge", str(tmp_path / "none.sqlite"), "--db", here)
    assert code == 2 and "no such file" in err
    assert not (tmp_path / "none.sqlite").exists()
    code, _, err = run("db", "merge", f"sqlite:///{tmp_path}/none.sqlite", "--db", here)
    assert code == 2 and "no such database" in err


def test_prune_counts_first(run: Run, here: str, tmp_path: Path) -> None:
    config = {**make_winner().config, "num_warps": 1}
    database(tmp_path / "here.sqlite", make_trial(), make_trial(config=config, created="2024-01-01T00:00:00+00:00"))
    asked = ("db", "prune", "--older-than", "2025-01-01", "--db", here)
    code, out, _ = run(*asked, "--dry-run")
    assert code == 0 and "1 trial would go" in out and "win_attn_fwd ok 1" in out
    assert run(*asked)[1].endswith("1 trial is gone")
    assert "0 trials would go; 1 more" in run("db", "prune", "--family", SPEC.family, "--dry-run", "--db", here)[1]
    code, _, err = run("db", "prune", "--db", here)
    assert code == 2 and "needs a condition" in err and "--predicted" not in err
    code, _, err = run("db", "prune", "--predicted", "--db", here)
    assert code == 2 and "--predicted only chooses predictions" in err


def test_verify_tells_by_its_exit_code(run: Run, here: str, tmp_path: Path) -> None:
    code, out, _ = run("db", "verify", "--db", here)
    assert code == 0 and "as it should be" in out
    illegal = make_winner(template_digest=template_digest(SPEC), config={**make_winner().config, "num_warps": 3})
    misplaced = make_winner(problem_key='{"seq_k":1}')
    database(tmp_path / "here.sqlite", illegal, misplaced, make_winner(template_digest="t0", config={"old": 1}))
    code, out, _ = run("db", "verify", "--db", here)
    assert (
        code == 1
        and "2 findings" in out
        and "num_warps=3" in out
        and "problem_key must hold fields of the problem" in out
    )
    with closing(sqlite3.connect(tmp_path / "here.sqlite")) as plain:
        plain.execute("UPDATE nsa_winners SET median_us = -1")
        plain.commit()
    code, out, _ = run("db", "verify", "--db", here)
    assert code == 1 and "3 findings" in out and "median_us must be" in out
    code, _, err = run("db", "verify", "--db", f"sqlite:///{tmp_path}/none.sqlite")
    assert code == 2 and "no such database" in err and not (tmp_path / "none.sqlite").exists()


def test_an_export_overwrites_nothing_by_itself(run: Run, here: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("mine")
    for more in ((), ("--format", "t4")):
        code, _, err = run("db", "export", str(path), "--db", here, *more)
        assert code == 2 and "there already" in err and "--force" in err and path.read_text() == "mine"
    assert run("db", "export", str(path), "--force", "--db", here)[1].endswith("a.jsonl: 1 record")
    code, out, err = run("db", "export", "-", "--db", here)
    assert (code, out.replace(" ", ""), err) == (0, path.read_text().replace(" ", "").strip(), "")
    code, _, err = run("db", "export", str(tmp_path / "no" / "a.jsonl"), "--db", here)
    assert code == 2 and "the folder of the file is missing" in err and ".a.jsonl." not in err
    assert run("db", "export", "-", "--format", "t4", "--db", here)[0] == 2


def test_an_export_replaces_files_only(run: Run, here: str, tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "a.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    code, _, err = run("db", "export", str(pipe), "--force", "--db", here)
    assert code == 2 and "regular file" in err and pipe.is_fifo()
    assert run("db", "export", str(link), "--force", "--db", here)[0] == 0
    assert link.is_symlink() and "winner" in target.read_text()
    code, _, err = run("db", "best", "--format", "csv", "--out", str(pipe), "--db", here)
    assert code == 2 and "no regular file" in err and pipe.is_fifo()


def test_many_files_of_t4_overwrite_nothing_either(run: Run, here: str, tmp_path: Path) -> None:
    database(tmp_path / "here.sqlite", make_trial(), make_trial(policy="graph-cold"))
    asked = ("db", "export", str(tmp_path / "t4.json"), "--format", "t4", "--db", here)
    assert run(*asked)[0] == 0 and len(list(tmp_path.glob("t4-*.json"))) == 2
    assert run(*asked)[0] == 2 and run(*asked, "--force")[0] == 0


def test_export_in_t4(run: Run, here: str, tmp_path: Path) -> None:
    database(tmp_path / "here.sqlite", make_trial())
    path = tmp_path / "t4.json"
    code, out, _ = run("db", "export", str(path), "--format", "t4", "--db", here)
    assert (code, out) == (0, str(path))
    (result,) = json.loads(path.read_text())["results"]
    assert result["configuration"] == make_winner().config and result["times"]["runtimes"] == [0.12]


def test_ages() -> None:
    now = datetime(2026, 3, 10, 12, tzinfo=UTC)
    assert db_share.parse_age("3d", now) == "2026-03-07T12:00:00.000000+00:00"
    assert db_share.parse_age("36h", now) == "2026-03-09T00:00:00.000000+00:00"
    assert db_share.parse_age("1w", now) == "2026-03-03T12:00:00.000000+00:00"
    assert db_share.parse_age("2026-01-31", now) == "2026-01-31T00:00:00.000000+00:00"
    for wrong in ("", "3", "3y", "-3d", "yesterday", "99999w"):
        with pytest.raises(InvalidInput, match="Write 90d"):
            db_share.parse_age(wrong, now)
