"""TuningDatabase: answers against hand-made rows, on SQLite in memory; and which indexes questions use."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cpu.ask_fakes import A100, FAMILY, H100, NEW, OLD, config_of, problem_of, trial, winner
from sqlalchemy import event

import nsa_autotune
from nsa_autotune.db import TuningDatabase, TuningStore
from nsa_autotune.db.counts import troubled_trials
from nsa_autotune.errors import InvalidInput, StoreError, UnknownName

RIVALS = (
    {"config": {"a": 1}, "tied": True, "blocks": 9, "log_ratio": 0.0, "low": -0.1, "high": 0.1},
    {"config": {"a": 2}, "tied": False, "blocks": 9, "log_ratio": 0.2, "low": 0.1, "high": 0.3},
)


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def columns(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


# best


def test_best_is_the_newest_winner_of_the_present_template(store: TuningStore) -> None:
    for record in (
        winner(100, day=1),
        winner(90, day=2, fingerprint={**H100, **NEW}),
        winner(80, day=3, template_digest="t0"),  # newer, but its template is gone
        winner(70, day=1, fingerprint={**A100, **OLD}, rivals=RIVALS),
        winner(60, day=1, policy="graph-cold"),
    ):
        store.set_winner(record)
    asked = TuningDatabase(store, current_templates={FAMILY: "t1"})
    found = columns(asked.best(), "gpu", "policy", "median_us", "stale")
    assert sorted(found) == [
        ("NVIDIA A100", "eager-cold", 70, False),
        (H100["gpu"], "eager-cold", 90, False),
        (H100["gpu"], "graph-cold", 60, False),
    ]
    assert [row["median_us"] for row in TuningDatabase(store).best(gpu="h100", policy="eager-cold")] == [80]
    (row,) = asked.best(gpu="A100")
    evidence = {"samples": 3, "verdict": "confirmed", "tied": 1, "rivals": 2, "created": "2026-01-01T10:00:00+00:00"}
    evidence |= {"p20_us": 70 * 0.99, "p80_us": 70 * 1.01, "tool_version": "0.1.0", **OLD}
    assert {name: row[name] for name in evidence} == evidence
    assert len(asked.best(limit=2)) == 2


def test_best_by_length_says_what_grew_and_changed(store: TuningStore) -> None:
    for tokens, median_us, config in (
        (32768, 900, config_of(num_warps=8)),
        (8192, 100, config_of(num_warps=4)),
        (16384, 250, config_of(num_warps=4)),
    ):
        store.set_winner(winner(median_us, tokens, config=config))
    store.set_winner(winner(5, problem=problem_of(8192, seq_q=1)))  # decoding is not a longer prefill
    rows = TuningDatabase(store).best(by="seq")
    assert columns(rows, "seq_q", "seq_k", "growth", "config_change") == [
        (8192, 8192, None, ""),
        (16384, 16384, 2.5, "none"),
        (32768, 32768, 3.6, "num_warps 4 -> 8"),
        (1, 8192, None, ""),
    ]
    with pytest.raises(UnknownName, match="seq"):
        TuningDatabase(store).best(by="batch")


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({"problem": {"seq_k": 16384}}, [16384]),
        ({"problem": {"seq_k": "16384", "dtype": "bfloat16"}}, [16384]),
        ({"problem": {"locality": "0.8", "window_size": "512"}}, [8192, 16384]),
        ({"gpu": "nvidia h100"}, [8192, 16384]),
        ({"policy": "graph-cold"}, []),
    ],
    ids=str,
)
def test_filters(store: TuningStore, filters: dict[str, Any], tokens: list[int]) -> None:
    for length in (8192, 16384):
        store.set_winner(winner(tokens=length))
    assert sorted(row["seq_k"] for row in TuningDatabase(store).best(**filters)) == tokens


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"gpu": "B200"}, r"no GPU of this name.*B200.*GPUs: NVIDIA H100"),
        ({"gpu": "H1%"}, "no GPU of this name"),
        ({"family": "nope"}, r"no family of this name.*nope.*Families: slc_attn_fwd"),
        ({"problem": {"seq_k": "banana"}}, r"no problem.*banana.*seq_k: 8192, 65536\."),
        ({"problem": {"locality": 0}}, r"no problem.*locality: 0\.8\."),
        ({"problem": {"window_size": 8}}, r"no problem.*window_size: 512\."),
    ],
    ids=str,
)
def test_a_name_that_no_record_has_is_told(store: TuningStore, filters: dict[str, Any], words: str) -> None:
    for length in (65536, 8192):
        store.set_winner(winner(tokens=length))
    asked = TuningDatabase(store)
    for ask in (asked.best, asked.history, asked.regressions, asked.query, asked.stats, asked.winners, asked.trials):
        with pytest.raises(UnknownName, match=words):
            ask(**filters)
    with pytest.raises(UnknownName, match=words):
        asked.compare(between=("triton", "3.6.0", "3.6.0"), **filters)


def test_an_empty_answer_about_known_names_is_no_mistake(store: TuningStore) -> None:
    store.set_winner(winner(tokens=8192))
    store.set_winner(winner(tokens=8192, fingerprint={**A100, **OLD}, problem=problem_of(16384)))
    asked = TuningDatabase(store, current_templates={FAMILY: "t1", "win_attn_fwd": "t1"})
    assert asked.best(gpu="A100", problem={"seq_k": 8192}) == asked.best(family="win_attn_fwd") == []
    assert asked.counts(gpu="A100", problem={"seq_k": 8192}) == {"winners": 0, "measured": 0, "predicted": 0}
    assert asked.counts() == {"winners": 2, "measured": 0, "predicted": 0}


def test_unknown_fields_are_refused_even_by_an_empty_database(store: TuningStore) -> None:
    for ask in (TuningDatabase(store).best, TuningDatabase(store).history, TuningDatabase(store).stats):
        with pytest.raises(UnknownName, match=r"no such field.*seq_len.*seq_k"):
            ask(problem={"seq_len": 1})


# compare


def test_gpus_side_by_side(store: TuningStore) -> None:
    for gpu, factor in ((H100, 1.0), (A100, 2.5)):
        for tokens in (8192, 16384):
            store.set_winner(winner(factor * tokens / 100, tokens, fingerprint={**gpu, **OLD}))
    store.set_winner(winner(tokens=32768))  # on one GPU only
    rows = TuningDatabase(store).compare(gpus=["h100", "a100"])
    assert columns(rows, "base", "other", "seq_k", "base_median_us", "other_median_us") == [
        (H100["gpu"], "NVIDIA A100", 8192, 81.92, pytest.approx(204.8)),
        (H100["gpu"], "NVIDIA A100", 16384, 163.84, pytest.approx(409.6)),
    ]
    assert rows[0]["ratio"] == pytest.approx(2.5)
    assert (rows[0]["ratio_low"], rows[0]["ratio_high"]) == (
        pytest.approx(2.5 * 0.99 / 1.01),
        pytest.approx(2.5 * 1.01 / 0.99),
    )
    assert rows[0]["clear"] and rows[0]["base_samples"] == 3 and rows[0]["other_verdict"] == "confirmed"
    assert columns(TuningDatabase(store).compare(), "base", "other")[0] == (H100["gpu"], "NVIDIA A100")


def test_a_difference_within_the_spreads_is_not_clear(store: TuningStore) -> None:
    store.set_winner(winner(100))
    store.set_winner(winner(101, fingerprint={**A100, **OLD}))
    (row,) = TuningDatabase(store).compare(gpus=["H100", "A100"])
    assert row["ratio"] == pytest.approx(1.01) and not row["clear"]


def test_gpus_must_be_two_and_known(store: TuningStore) -> None:
    asked = TuningDatabase(store)
    store.set_winner(winner())
    with pytest.raises(InvalidInput, match="two GPUs are compared"):
        asked.compare()
    store.set_winner(winner(fingerprint={**H100, **OLD, "gpu": "NVIDIA H100 PCIe"}))
    with pytest.raises(InvalidInput, match="several GPUs"):
        asked.compare(gpus=["H100", "PCIe"])
    with pytest.raises(UnknownName, match=r"no GPU of this name.*PCIe"):
        asked.compare(gpus=["V100", "PCIe"])
    with pytest.raises(InvalidInput, match="two GPUs"):
        asked.compare(gpus=["PCIe"])
    with pytest.raises(InvalidInput, match="one thing"):
        asked.compare(gpus=["PCIe", "HBM3"], between=("triton", "a", "b"))


def test_versions_and_configs_side_by_side(store: TuningStore) -> None:
    store.set_winner(winner(100, day=1))
    store.set_winner(winner(80, day=2, fingerprint={**H100, **NEW}))
    asked = TuningDatabase(store)
    (row,) = asked.compare(between=("triton", "3.6.0", "3.9.0"))
    assert (row["base"], row["other"], row["ratio"]) == ("triton 3.6.0", "triton 3.9.0", 0.8)
    assert asked.compare(between=("triton", "3.9.0", "3.6.0"), policy="graph-cold") == []
    with pytest.raises(UnknownName, match=r"nothing was measured with this triton.*3\.7\.0.*triton: 3\.6\.0, 3\.9\.0"):
        asked.compare(between=("triton", "3.6.0", "3.7.0"))
    with pytest.raises(UnknownName, match=r"tool_version: 0\.1\.0"):
        asked.regressions(between=("tool_version", "0.1.0", "9.9.9"))
    with pytest.raises(UnknownName, match="template_digest: t1"):
        asked.regressions(between=("template_digest", "t1", "t7"))
    with pytest.raises(UnknownName, match=r"no such version.*triton"):
        asked.compare(between=("python", "3.11", "3.12"))

    store.add_trials(
        [
            trial(50, config=config_of(num_warps=4, num_stages=2)),
            trial(40, config=config_of(num_warps=4, num_stages=3), day=2),
            trial(60, config=config_of(num_warps=8, num_stages=2)),
            trial(None, config=config_of(num_warps=8, num_stages=3)),
            trial(1, config=config_of(num_warps=8, num_stages=3), kind="predicted", predicted_us=1.0),
        ]
    )
    (row,) = asked.compare(configs=[{"num_warps": "4"}, {"num_warps": 8}], family=FAMILY)
    assert (row["base_median_us"], row["other_median_us"], row["ratio"]) == (40, 60, 1.5)
    assert row["base_verdict"] == "search" and json.loads(row["base_config"])["num_stages"] == 3
    (row,) = asked.compare(configs=[{"use_tma": "false", "num_stages": 2}, {"num_warps": "8"}], family=FAMILY)
    assert row["base_median_us"] == (50 if not config_of()["use_tma"] else None)
    with pytest.raises(InvalidInput, match="within one family"):
        asked.compare(configs=[{}, {}])
    with pytest.raises(UnknownName, match="no such name"):
        asked.compare(configs=[{'a"b': 1}, {"num_warps": 8}], family=FAMILY)


# history


def test_history_keeps_what_a_later_winner_replaced(store: TuningStore) -> None:
    first, second = config_of(num_warps=4), config_of(num_warps=8)
    store.add_trials(
        [
            trial(100, day=1, stage="final", config=first),
            trial(120, day=1, stage="final", config=second),
            trial(50, day=1, stage="search", config=second),  # a search is no race
            trial(90, day=5, stage="final", config=second, tool_version="0.2.0"),
        ]
    )
    store.set_winner(winner(100, day=1, config=first))
    store.set_winner(winner(90, day=5, config=second, tool_version="0.2.0"))  # takes its place: the same versions
    store.set_winner(winner(99, day=9, config=second, fingerprint={**H100, **NEW}, tool_version="0.2.0"))
    rows = TuningDatabase(store).history(gpu="H100", family=FAMILY)
    assert columns(rows, "created", "median_us", "verdict", "before_median_us") == [
        ("2026-01-09T10:00:00+00:00", 99, "confirmed", 90),
        ("2026-01-05T10:00:00+00:00", 90, "confirmed", 100),
        ("2026-01-01T10:00:00+00:00", 100, "final", None),
    ]
    assert [row["ratio"] for row in rows] == [pytest.approx(1.1), pytest.approx(0.9), None]
    assert rows[1]["changed"] == "tool_version 0.1.0 -> 0.2.0; num_warps 4 -> 8"
    assert rows[0]["changed"].startswith("driver 570 -> 580, cuda 12.8 -> 13.0, torch 2.11 -> 2.13, triton 3.6.0 -> ")


def test_regressions_are_losses_beyond_the_limit_greatest_first(store: TuningStore) -> None:
    for tokens, now in ((8192, 102), (16384, 104), (32768, 150), (65536, 90)):
        store.set_winner(winner(100, tokens, day=1))
        store.set_winner(winner(120, tokens, day=2, fingerprint={**H100, **OLD, "driver": "575"}))
        store.set_winner(winner(now, tokens, day=3, fingerprint={**H100, **NEW}))
    asked = TuningDatabase(store)
    between = ("triton", "3.6.0", "3.9.0")
    assert columns(asked.regressions(between=between), "seq_k", "before_median_us") == [(32768, 120)]
    drivers = ("driver", "570", "580")
    assert columns(asked.regressions(between=drivers), "seq_k", "ratio") == [(32768, 1.5), (16384, 1.04)]
    assert len(asked.regressions(between=drivers, loss=0.01)) == 3
    each = columns(asked.regressions(), "seq_k", "ratio")
    assert each[0] == (32768, 1.25) and [ratio for _, ratio in each[1:]] == [1.2] * 4
    assert len(asked.regressions(limit=1)) == 1
    with pytest.raises(InvalidInput, match="loss"):
        asked.regressions(loss=-1)


# stats


def test_counts(store: TuningStore) -> None:
    store.add_trials(
        [
            trial(day=1),
            trial(None, day=2),
            trial(None, day=3, status="crash"),
            trial(tokens=16384, day=4),
            trial(None, kind="predicted", status="ok", predicted_us=1.0),
            trial(fingerprint={**A100, **OLD}),
        ]
    )
    store.set_winner(winner(day=6))
    store.set_winner(winner(day=5, verdict="provisional", fingerprint={**H100, **NEW}))
    a100, h100 = TuningDatabase(store).stats()
    assert (a100["gpu"], a100["trials"], a100["tuned"], a100["coverage"], a100["newest_winner"]) == (
        "NVIDIA A100", 1, 0, 0.0, None
    )  # fmt: skip
    expected = {"problems": 2, "tuned": 1, "coverage": 0.5, "trials": 4, "ok": 2, "compile": 1, "crash": 1}
    expected |= {"timeout": 0, "predicted": 1, "winners": 2, "confirmed": 1, "provisional": 1}
    expected |= {"newest_trial": "2026-01-04T10:00:00+00:00", "newest_winner": "2026-01-06T10:00:00+00:00"}
    assert {name: h100[name] for name in expected} == expected
    (row,) = TuningDatabase(store).stats(gpu="H100", problem={"seq_k": 16384})
    assert (row["problems"], row["trials"], row["tuned"]) == (1, 1, 0)


def test_troubled_trials_are_all_of_a_config_that_crashed(store: TuningStore) -> None:
    bad, good = config_of(num_warps=4), config_of(num_warps=8)
    wanted = [
        trial(None, day=1, config=bad, status="crash"),
        trial(10, day=2, config=bad),
        trial(11, day=3, config=bad, problem=problem_of(8000)),  # the same bucket
    ]
    others = [
        trial(10, config=good),
        trial(10, config=bad, fingerprint={**H100, **NEW}),
        trial(10, config=bad, tokens=16384),
        trial(None, config=bad, kind="predicted", status="ok", predicted_us=1.0),
    ]
    store.add_trials(wanted + others)
    with store.reading() as session:
        assert troubled_trials(session) == wanted[::-1]


# sql


def test_sql_reads(store: TuningStore) -> None:
    store.add_trials([trial(day=1), trial(None, day=2), trial(None, day=3)])
    found = TuningDatabase(store).sql("SELECT status, count(*) AS n FROM nsa_trials GROUP BY status ORDER BY n")
    assert found.rows == [{"status": "ok", "n": 1}, {"status": "compile", "n": 2}] and not found.cut
    found = TuningDatabase(store).sql("SELECT id FROM nsa_trials ORDER BY id", limit=2)
    assert (found.rows, found.cut) == ([{"id": 1}, {"id": 2}], True)
    assert TuningDatabase(store).sql("SELECT x'00ff' AS b, NULL AS n").rows == [{"b": "00ff", "n": None}]
    assert TuningDatabase(store).sql("SELECT 1 AS a WHERE 0").columns == ("a",)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM nsa_trials", "may only read"),
        ("INSERT INTO nsa_shipped_files VALUES ('a', 'b')", "may only read"),
        ("UPDATE nsa_trials SET status = 'ok' RETURNING id", "may only read"),
        ("WITH a AS (SELECT 1) DELETE FROM nsa_trials", "may only read"),
        ("DROP TABLE nsa_trials", "may only read"),
        ("CREATE TEMP TABLE t (a)", "may only read"),
        ("PRAGMA query_only = OFF", "may only read"),
        ("ATTACH '{folder}/other.sqlite' AS other", "may only read"),
        ("VACUUM INTO '{folder}/other.sqlite'", "may only read"),
        ("SELECT load_extension('/tmp/x.so')", "may only read"),
        ("COMMIT", "may only read"),
        ("SELECT 1; DELETE FROM nsa_trials", "one statement"),
        ("SELECT colour FROM nsa_trials", "no such column: colour"),
        ("SELEC 1", "does not understand"),
        ("", "must ask for something"),
        ("SELECT 1 AS a, 2 AS a", "names of their own"),
    ],
)
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "file"])
def test_sql_refuses_what_is_no_question(tmp_path: Path, memory: bool, statement: str, message: str) -> None:
    url = "sqlite://" if memory else f"sqlite:///{tmp_path}/tuning.sqlite"
    with TuningStore(url, import_shipped=False) as store:
        store.add_trial(trial())
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(InvalidInput, match=message):
            TuningDatabase(store).sql(statement.format(folder=tmp_path))
        assert len(store.trials()) == 1 and sorted(path.name for path in tmp_path.iterdir()) == before
        store.add_trial(trial(day=2))  # the connection writes again afterwards
        assert len(store.trials()) == 2


def test_a_long_statement_ends_with_ctrl_c(tmp_path: Path) -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    with TuningStore(f"sqlite:///{tmp_path}/t.sqlite", import_shipped=False) as store, TuningDatabase(store) as asked:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            asked.sql(endless)
        assert asked.sql("SELECT 1e999 AS far, 2 AS near").rows == [{"far": "inf", "near": 2}]


# the facade


@pytest.mark.usefixtures("nothing_shipped")
def test_the_package_offers_it_and_it_closes_what_it_opened(tmp_path: Path) -> None:
    assert nsa_autotune.TuningDatabase is TuningDatabase
    TuningStore(f"sqlite:///{tmp_path}/t.sqlite").close()
    with TuningDatabase(f"sqlite:///{tmp_path}/t.sqlite") as asked:
        assert asked.query(table="trials", status="ok") == []
    with pytest.raises(StoreError, match="closed"):
        asked.best()
    with TuningStore("sqlite://", import_shipped=False) as store:
        with TuningDatabase(store) as asked:
            pass
        assert asked.best() == []


# plans


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TuningStore]:
    """20,000 trials, as benchmarks/database.py makes a million."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        from database_fill import fill
    finally:
        sys.path.remove(str(folder))
    path = tmp_path_factory.mktemp("large") / "tuning.sqlite"
    filled = fill(path, 20_000)
    assert (filled.trials, filled.winners, filled.problems) == (20_000, 160, 16)
    with TuningStore(f"sqlite:///{path}", import_shipped=False) as store:
        yield store


SHAPE = {"seq_k": 65536}
QUESTIONS = {
    "best": lambda asked: asked.best(gpu="H200", family=FAMILY, limit=50),
    "query by family": lambda asked: asked.query(table="trials", family=FAMILY, status="ok", limit=50),
    "query by GPU": lambda asked: asked.query(table="trials", gpu="H200", status="render", limit=50),
    "query by problem": lambda asked: asked.query(table="trials", gpu="H200", problem=SHAPE, limit=50),
    "history": lambda asked: asked.history(gpu="H200", family=FAMILY),
    "regressions": lambda asked: asked.regressions(),
    "stats": lambda asked: asked.stats(),
    "lookup": lambda asked: asked.store.known_winners(family=FAMILY),
    "troubled": lambda asked: with_session(asked, troubled_trials),
}


def with_session(asked: TuningDatabase, question: Any) -> Any:
    with asked.store.reading() as session:
        return question(session)


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_question_reads_all_trials(large: TuningStore, name: str) -> None:
    """SQLite's own plan of every statement sent: trials are found by an index, or counted in one that covers them."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, text: str, values: Any, *_: object) -> None:
        sent.append((text, values))

    event.listen(large._engine, "before_cursor_execute", note)
    try:
        QUESTIONS[name](TuningDatabase(large))
    finally:
        event.remove(large._engine, "before_cursor_execute", note)
    with closing(sqlite3.connect(str(large.location.path))) as db:
        steps = [
            row[3]
            for text, values in sent
            if text != "BEGIN"
            for row in db.execute(f"EXPLAIN QUERY PLAN {text}", values)
        ]
    assert steps and not [step for step in steps if step.startswith("SCAN nsa_trials") and "INDEX" not in step]
    if name == "lookup":
        assert not [step for step in steps if step.startswith("SCAN")]
