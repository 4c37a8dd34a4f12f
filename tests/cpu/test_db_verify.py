"""`verify` finds every kind of damage, and nothing in a database that is as it should be."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from cpu.store_fakes import make_design, make_trial, make_winner

from nsa_autotune.db import TuningStore
from nsa_autotune.db.verify import verify


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database with a row in every table."""
    monkeypatch.setattr("nsa_autotune.db.verify.shipped_files", dict)
    path = tmp_path / "t.sqlite"
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        store.add_trials([make_trial(), make_trial(status="crash", reason="x")])
        store.set_winner(make_winner())
        store.add_design(make_design())
    return path


def findings(path: Path, judge: object = None) -> list[str]:
    with TuningStore(f"sqlite:///{path}", import_shipped=False, read_only=True) as store:
        return [f"{finding.where}: {finding.fault}" for finding in verify(store, judge)]  # type: ignore[arg-type]


def test_a_good_database_has_no_findings(path: Path) -> None:
    before = path.read_bytes()
    assert findings(path) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE nsa_trials SET tool_version = '5' WHERE id = 2", ["nsa_trials 2", "the digest is"]),
        ("UPDATE nsa_trials SET status = 'fine' WHERE id = 2", ["nsa_trials 2", "status must be one of"]),
        ("UPDATE nsa_trials SET samples_us = 'x' WHERE id = 1", ["nsa_trials 1", "cannot be read"]),
        ("UPDATE nsa_winners SET p20_us = -1", ["nsa_winners 1", "p20_us must be"]),
        ("UPDATE nsa_winners SET policy = 'graph-cold'", ["nsa_winners 1", "the digest is"]),
        ("UPDATE nsa_designs SET group_size = 0", ["nsa_designs 1", "group_size"]),
        ("UPDATE nsa_designs SET nsa = '{\"window_size\":-1}'", ["nsa_designs 1", "valid constants"]),
        ("UPDATE nsa_variants SET config = '{}'", ["nsa_variants 1", "the digest is"]),
        ("UPDATE nsa_problems SET family = 'other'", ["nsa_problems 1", "the digest is"]),
        ("UPDATE nsa_fingerprints SET facts = '{'", ["nsa_fingerprints 1", "cannot be read"]),
        ("DELETE FROM nsa_trials WHERE id = 1", ["nsa_winners", "refers to a row of nsa_trials that is missing"]),
        ("DELETE FROM nsa_variants", ["nsa_trials", "refers to a row of nsa_variants"]),
    ],
)
def test_damage_is_found(path: Path, statement: str, words: list[str]) -> None:
    with closing(sqlite3.connect(path)) as plain:
        plain.execute(statement)
        plain.commit()
    found = findings(path)
    assert any(all(word in line for word in words) for line in found), found


def test_a_damaged_page_is_found(path: Path) -> None:
    with closing(sqlite3.connect(path)) as plain:
        root = plain.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'uq_nsa_trials_digest' OR name LIKE "
            "'sqlite_autoindex_nsa_trials%'"
        ).fetchone()[0]
        size = plain.execute("PRAGMA page_size").fetchone()[0]
        plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    end = root * size
    content[end - 20 : end] = b"\xee" * 20  # the last bytes of an entry of the index
    path.write_bytes(bytes(content))
    assert any("index" in line or "wrong" in line for line in findings(path))


def test_the_rules_of_kernels_are_asked(path: Path) -> None:
    assert findings(path, lambda winner: f"{winner.family} dislikes it") == ["nsa_winners 1: slc_attn_fwd dislikes it"]


def test_shipped_files_are_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.db.verify.shipped_files", lambda: {"sm_90.jsonl": b"{}\n"})
    first, second = findings(path)
    assert first.startswith("sm_90.jsonl: line 1") and "other shipped winners" in second
