"""The database: what goes in comes out, keys, queries, JSON lines. The same contract in memory and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cpu.store_fakes import times_of

from nsa_autotune.config import NSAConfig
from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.db.checks import TRIAL_RULES, WINNER_RULES
from nsa_autotune.db.exchange import MAX_LINE_BYTES, format_line
from nsa_autotune.db.merge import ImportSummary
from nsa_autotune.errors import StoreError, UnknownName
from nsa_autotune.spec import Problem, canonical_json

H100 = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "driver": "570",
    "cuda": "12.8",
    "torch": "2.11",
    "triton": "3.6",
}
H200 = {**H100, "gpu": "NVIDIA H200"}
PROBLEM = Problem(seq_q=8192, seq_k=8192, locality=0.0)


def make_trial(**changes: object) -> TrialRecord:
    problem = changes.pop("problem", PROBLEM)
    assert isinstance(problem, Problem)
    values = {
        "fingerprint": H100,
        "family": "slc_attn_fwd",
        "problem": problem.to_dict(),
        "problem_key": canonical_json({"seq_q": problem.seq_q, "locality": problem.locality}),
        "config": {"BLOCK_M": 64, "num_warps": 4, "use_tma": True, "scale": 0.5, "order": "union"},
        "template_digest": "t1",
        "status": "ok",
        "samples_us": (10.0, 11.0, 12.5),
        "median_us": 11.0,
        "p20_us": 10.4,
        "p80_us": 11.9,
        "resources": {"registers": 168, "shared_bytes": 98304},
        "max_error": 0.01,
        "baseline_error": 0.02,
        "created": "2025-03-01T10:00:00.000000+00:00",
        "tool_version": "0.1.0",
    }
    return TrialRecord(**{**values, **changes, **times_of(changes)})  # type: ignore[arg-type]


def make_winner(**changes: object) -> WinnerRecord:
    trial = make_trial(**{name: changes.pop(name) for name in ("problem", "fingerprint") if name in changes})
    names = {f.name for f in fields(WinnerRecord)}
    values = {name: getattr(trial, name) for name in names if hasattr(trial, name)}
    values |= {
        "default_config": {"BLOCK_M": 16},
        "default_median_us": 22.0,
        "library": "sdpa",
        "library_median_us": 33.0,
    }
    return WinnerRecord(**{**values, **changes, **times_of(changes)})


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TuningStore]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/new folder/tuning.sqlite"
    with TuningStore(url, import_shipped=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def memory() -> Iterator[TuningStore]:
    """One store for many tests that must not change it."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Iterator[TuningStore]:
    with TuningStore(f"sqlite:///{tmp_path}/other.sqlite", import_shipped=False) as opened:
        yield opened


def test_rules_cover_all_fields() -> None:
    assert {f.name for f in fields(TrialRecord)} == TRIAL_RULES.keys()
    assert {f.name for f in fields(WinnerRecord)} == WINNER_RULES.keys()


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(make_trial(), id="ok"),
        pytest.param(
            make_trial(status="compile", reason="ptxas: é\n'quoted'", samples_us=(), median_us=None, resources=None),
            id="failed",
        ),
        pytest.param(make_trial(kind="predicted", samples_us=(), median_us=None, predicted_us=7.25), id="predicted"),
        pytest.param(make_trial(provider="cudnn", stage="baseline", config={}, template_digest=""), id="library"),
    ],
)
def test_trial_comes_back_equal(store: TuningStore, trial: TrialRecord) -> None:
    store.add_trial(trial)
    assert store.trials(kind=trial.kind) == [trial]


def test_trial_is_added_once(store: TuningStore) -> None:
    first = store.add_trial(make_trial())
    assert store.add_trial(make_trial(median_us=11)) == first  # 11 and 11.0 are the same
    later = store.add_trial(make_trial(created="2025-03-01T10:00:00.000001+00:00"))
    assert later != first
    assert [t.created[-9:-6] for t in store.trials()] == ["001", "000"]  # newest first


def test_unstorable_parts_of_a_failure_are_told_in_words(store: TuningStore) -> None:
    trial = make_trial(status="accuracy", reason="bad \ud800\x00 byte", max_error=math.nan, baseline_error=math.inf)
    store.add_trial(trial)
    (found,) = store.trials()
    assert (found.max_error, found.baseline_error) == (None, None)
    assert found.reason == r"baseline_error was inf. max_error was nan. bad \ud800\x00 byte"
    assert len(make_trial(reason="x" * 10**6).reason) == 8000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "fine"}, "status"),
        ({"kind": "guessed"}, "kind"),
        ({"stage": "begin"}, "stage"),
        ({"median_us": math.inf}, "median_us"),
        ({"median_us": -1.0}, "median_us"),
        ({"samples_us": (1.0, math.nan)}, "samples_us"),
        ({"config": {"BLOCK_M": [64]}}, "config"),
        ({"config": {"BLOCK_M": math.nan}}, "config"),
        ({"fingerprint": {"gpu": "x"}}, "fingerprint"),
        ({"problem_key": "seq_q=1"}, "problem_key"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2025-03-01T10:00:00+02:00"}, "created"),
        ({"family": ""}, "family"),
        ({"resources": {"registers": None}}, "resources"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_trial_is_refused_and_nothing_written(store: TuningStore, changes: dict[str, object], named: str) -> None:
    with pytest.raises(StoreError, match=f"^{named} must be"):
        store.add_trials([make_trial(), make_trial(**changes)])
    assert store.trials() == []


def test_trial_filters(store: TuningStore) -> None:
    trials = {
        "a": make_trial(),
        "b": make_trial(fingerprint=H200),
        "c": make_trial(family="win_attn_fwd"),
        "d": make_trial(status="timeout", stage="final"),
        "e": make_trial(template_digest="t2", provider="cudnn"),
        "f": make_trial(kind="predicted"),
        "g": make_trial(problem=PROBLEM.replace(seq_k=16384, seq_q=16384)),
    }
    store.add_trials(list(trials.values()))

    def found(**filters: str) -> str:
        records = store.trials(**filters)  # type: ignore[arg-type]
        return "".join(sorted(name for name, trial in trials.items() if trial in records))

    assert found() == "abcdeg"
    assert found(kind="predicted") == "f"
    assert found(gpu="NVIDIA H200") == "b"
    assert found(gpu="NVIDIA H") == ""
    assert found(fingerprint_digest=trials["b"].fingerprint_digest) == "b"
    assert found(family="win_attn_fwd") == "c"
    assert found(status="timeout") == found(stage="final") == "d"
    assert found(template_digest="t2") == found(provider="cudnn") == "e"
    assert found(problem_key=trials["g"].problem_key) == "g"
    assert len(store.trials(limit=2)) == 2


def test_winner_comes_back_equal_and_is_replaced(store: TuningStore) -> None:
    assert store.set_winner(make_winner())
    assert store.winners() == [make_winner()]
    # another problem of the same bucket
    better = make_winner(median_us=9.0, config={"BLOCK_M": 128}, problem=PROBLEM.replace(batch=3))
    assert store.set_winner(better)
    assert store.winners() == [better]
    for other in (make_winner(template_digest="t2"), make_winner(fingerprint=H200), make_winner(family="win_attn_fwd")):
        assert store.set_winner(other)
    assert len(store.winners()) == 4


def test_local_beats_imported_beats_shipped(store: TuningStore) -> None:
    shipped, imported, local = (make_winner(source=s) for s in ("shipped", "imported", "local"))
    assert [store.set_winner(w) for w in (shipped, imported, shipped, local, imported, shipped, local)] == [
        True, True, False, True, False, False, True
    ]  # fmt: skip
    assert store.winners() == [local]


def test_winner_filters(store: TuningStore) -> None:
    winners = {
        "a": make_winner(),
        "b": make_winner(fingerprint={**H200, "capability": "9.1"}),
        "c": make_winner(family="win_attn_fwd", source="shipped"),
        "d": make_winner(template_digest="t2"),
    }
    for winner in winners.values():
        store.set_winner(winner)

    def found(**filters: str) -> str:
        records = store.winners(**filters)
        return "".join(sorted(name for name, winner in winners.items() if winner in records))

    assert found() == "abcd"
    assert found(gpu=H100["gpu"]) == found(capability="9.0") == "acd"
    assert found(fingerprint_digest=winners["b"].fingerprint_digest) == "b"
    assert found(source="shipped") == "c"
    assert found(family="slc_attn_fwd", template_digest="t1") == "ab"
    assert found(problem_key="{}") == ""


@pytest.mark.parametrize("changes", [{"samples_us": ()}, {"median_us": 0.0}, {"source": "mine"}], ids=str)
def test_winner_without_evidence_is_refused(store: TuningStore, changes: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        store.set_winner(make_winner(**changes))
    assert store.winners() == []


def test_winner_links_its_final_measurement(store: TuningStore) -> None:
    from sqlalchemy import text

    ids = store.add_trials(
        [
            make_trial(stage="final"),
            make_trial(),
            make_trial(status="timeout", stage="final"),
            make_trial(kind="predicted", stage="final"),
            make_trial(config={"BLOCK_M": 1}, stage="final"),
        ]
    )
    store.set_winner(make_winner())
    with store._transaction() as session:
        assert session.execute(text("SELECT trial_id FROM nsa_winners")).all() == [(ids[0],)]


def test_store_used_after_close_says_so(store: TuningStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.winners()


# query


@pytest.fixture
def filled(store: TuningStore) -> TuningStore:
    return fill(store)


@pytest.fixture(scope="module")
def questioned() -> Iterator[TuningStore]:
    """The same records, in a store that many questions share."""
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield fill(opened)


def fill(store: TuningStore) -> TuningStore:
    far = PROBLEM.replace(seq_q=65536, seq_k=65536, locality=0.8, nsa=NSAConfig(window_size=1024))
    store.set_winner(make_winner(created="2025-03-01T10:00:00+00:00"))
    store.set_winner(
        make_winner(problem=far, median_us=44.0, default_median_us=None, created="2025-03-02T10:00:00+00:00")
    )
    store.set_winner(make_winner(fingerprint=H200, family="win_attn_fwd", created="2025-03-03T10:00:00+00:00"))
    store.add_trials([make_trial(), make_trial(status="timeout", reason="over 10 s"), make_trial(kind="predicted")])
    return store


def test_query_rows_are_flat_and_exact(filled: TuningStore) -> None:
    (row,) = filled.query(gpu="h100", problem={"seq_q": 8192}, current_templates={"slc_attn_fwd": "t1"})
    assert all(value is None or isinstance(value, str | int | float) for value in row.values())
    expected = {
        **H100,
        "family": "slc_attn_fwd",
        "seq_q": 8192,
        "seq_k": 8192,
        "num_q_heads": 64,
        "num_kv_heads": 4,
        "d_qk": 128,
        "d_v": 128,
        "dtype": "bfloat16",
        "locality": 0.0,
        "median_us": 11.0,
        "p20_us": 10.4,
        "p80_us": 11.9,
        "default_median_us": 22.0,
        "speedup": 2.0,
        "library": "sdpa",
        "library_median_us": 33.0,
        "samples": 3,
        "config": '{"BLOCK_M":64,"num_warps":4,"order":"union","scale":0.5,"use_tma":true}',
        "source": "local",
        "stale": False,
        "created": "2025-03-01T10:00:00+00:00",
    }
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("filters", "days"),
    [
        ({}, "321"),
        ({"limit": 2}, "32"),
        ({"gpu": "h100"}, "21"),
        ({"gpu": "H%0"}, ""),
        ({"family": "win_attn_fwd"}, "3"),
        ({"problem": {"seq_q": 65536}}, "2"),
        ({"problem": {"seq_q": "65536", "locality": "0.8"}}, "2"),
        ({"problem": {"locality": "0"}}, "31"),
        ({"problem": {"window_size": 1024}}, "2"),
        ({"problem": {"window_size": 512, "dtype": "bfloat16"}, "gpu": "h200"}, "3"),
        ({"problem": {"dtype": "float16"}}, ""),
        ({"problem": {"seq_q": "many"}}, ""),
    ],
    ids=str,
)
def test_query_filters(questioned: TuningStore, filters: dict[str, object], days: str) -> None:
    assert "".join(row["created"][9] for row in questioned.query(**filters)) == days  # type: ignore[arg-type]


def test_query_trials(filled: TuningStore) -> None:
    rows = filled.query(table="trials")
    assert sorted((row["kind"], row["status"], row["reason"]) for row in rows) == [
        ("measured", "ok", ""),
        ("measured", "timeout", "over 10 s"),
    ]
    assert [row["status"] for row in filled.query(table="trials", status="timeout")] == ["timeout"]
    assert [row["kind"] for row in filled.query(table="trials", kind="predicted")] == ["predicted"]


def test_query_marks_stale(filled: TuningStore) -> None:
    assert {row["stale"] for row in filled.query()} == {None}
    stale = {row["family"]: row["stale"] for row in filled.query(current_templates={"slc_attn_fwd": "t9"})}
    assert stale == {"slc_attn_fwd": True, "win_attn_fwd": True}


@pytest.mark.parametrize(
    "filters",
    [
        {"table": "losers"},
        {"kind": "all"},
        {"table": "trials", "status": "fine"},
        {"status": "ok"},
        {"kind": "predicted"},
        {"problem": {"seq": 1}},
        {"problem": {"nsa": {}}},
    ],
    ids=str,
)
def test_query_refuses_unknown_names(questioned: TuningStore, filters: dict[str, object]) -> None:
    with pytest.raises(UnknownName):
        questioned.query(**filters)  # type: ignore[arg-type]


# JSON lines


def test_jsonl_round_trip(filled: TuningStore, other: TuningStore, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert filled.export_jsonl(first) == 6
    lines = first.read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["trial"] * 3 + ["winner"] * 3
    assert all(line == canonical_json(json.loads(line)) for line in lines)
    for again in range(2):  # a second time adds nothing
        new = {"new": 0, "new_trials": 0} if again else {"new": 3, "new_trials": 3}
        assert other.import_jsonl(first, source=None) == ImportSummary(winners=3, trials=3, **new)
    assert other.winners() == filled.winners()
    for kind in ("measured", "predicted"):
        assert {t.digest for t in other.trials(kind=kind)} == {t.digest for t in filled.trials(kind=kind)}
    other.export_jsonl(second)
    assert second.read_bytes() == first.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*jsonl*")) == ["a.jsonl", "b.jsonl"]  # no temporary file stays


def test_jsonl_order_does_not_depend_on_insertion(store: TuningStore, other: TuningStore, tmp_path: Path) -> None:
    winners = [make_winner(template_digest=f"t{i}", created=f"2025-03-0{1 + i % 2}T00:00:00+00:00") for i in range(6)]
    for winner in winners:
        store.set_winner(winner)
    for winner in reversed(winners):
        other.set_winner(winner)
    assert store.export_jsonl(tmp_path / "a") == other.export_jsonl(tmp_path / "b") == 6
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_export_filters(filled: TuningStore, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert filled.export_jsonl(path, records=("winner",), gpu=H200["gpu"]) == 1
    assert json.loads(path.read_text())["family"] == "win_attn_fwd"
    with pytest.raises(UnknownName, match="losers"):
        filled.export_jsonl(path, records=("losers",))


def test_import_marks_winners_and_keeps_local_ones(store: TuningStore, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    foreign = make_winner(median_us=1.0)
    path.write_text(f"{format_line(foreign)}\n{format_line(make_winner(template_digest='t2'))}\n")
    store.set_winner(make_winner())
    assert store.import_jsonl(path) == ImportSummary(winners=2, new=1, kept=1)
    assert {(w.template_digest, w.source, w.median_us) for w in store.winners()} == {
        ("t1", "local", 11.0),
        ("t2", "imported", 11.0),
    }


RIVAL = {"config": {"BLOCK_M": 32}, "tied": True, "blocks": 60, "log_ratio": 0.004, "low": -0.002, "high": 0.009}


def changed(**changes: object) -> Callable[[], bytes]:
    data = {**json.loads(format_line(make_winner())), **changes}
    return lambda: json.dumps(data).encode()


def without(name: str) -> Callable[[], bytes]:
    data = {key: value for key, value in json.loads(format_line(make_winner())).items() if key != name}
    return lambda: json.dumps(data).encode()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(lambda: b"{", id="no-json"),
        pytest.param(lambda: b"[]", id="no-object"),
        pytest.param(lambda: b"\xff\xfe", id="no-utf8"),
        pytest.param(lambda: b"[" * 100_000, id="deep"),
        pytest.param(lambda: b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', id="long"),
        pytest.param(lambda: changed()().replace(b'"median_us": 11.0', b'"median_us": 1, "median_us": 2'), id="twice"),
        pytest.param(lambda: changed()().replace(b'"median_us": 11.0', b'"median_us": NaN'), id="nan"),
        pytest.param(lambda: changed()().replace(b'"median_us": 11.0', b'"median_us": -Infinity'), id="infinity"),
        pytest.param(lambda: changed()().replace(b'"median_us": 11.0', b'"median_us": 1e999'), id="overflow"),
        pytest.param(changed(median_us=10**400), id="huge-int"),
        pytest.param(changed(median_us="11"), id="text-for-number"),
        pytest.param(changed(median_us=True), id="bool-for-number"),
        pytest.param(changed(schema_version=3), id="newer-schema"),
        pytest.param(changed(schema_version=True), id="bool-schema"),
        pytest.param(without("schema_version"), id="no-schema"),
        pytest.param(changed(record="loser"), id="record"),
        pytest.param(changed(record=["winner"]), id="record-list"),
        pytest.param(changed(colour="red"), id="unknown-field"),
        pytest.param(without("config"), id="missing-field"),
        pytest.param(changed(config=["BLOCK_M"]), id="config-list"),
        pytest.param(changed(config={"BLOCK_M": None}), id="config-null"),
        pytest.param(changed(fingerprint={**H100, "torch": 2.11}), id="fingerprint-number"),
        pytest.param(changed(problem={}, problem_key="[]"), id="key-list"),
        pytest.param(changed(problem={**PROBLEM.to_dict(), "seq_q": -1}), id="problem-value"),
        pytest.param(changed(problem={**PROBLEM.to_dict(), "colour": 1}), id="problem-field"),
        pytest.param(changed(problem={**PROBLEM.to_dict(), "locality": "0"}), id="problem-type"),
        pytest.param(changed(problem={**PROBLEM.to_dict(), "nsa": 5}), id="problem-nsa"),
        pytest.param(changed(family="\ud800"), id="surrogate"),
        pytest.param(changed(family="a\x00b"), id="nul"),
        pytest.param(changed(family="../../etc/passwd"), id="family-path"),
        pytest.param(changed(fingerprint={**H100, "gpu": "\x1b[2J"}), id="escape-gpu"),
        pytest.param(changed(config={"order\x1b]0;": "union"}), id="escape-config"),
        pytest.param(changed(config={"order": "a\nb"}), id="newline-config"),
        pytest.param(changed(library="\x9b31m"), id="escape-c1"),
        pytest.param(changed(tool_version="\u202e1.0"), id="direction"),
        pytest.param(changed(problem_key='{"locality":0.0,"seq_q":0}'), id="key-zero"),
        pytest.param(changed(problem_key='{"locality":0.0,"seq_q":"x"}'), id="key-text"),
        pytest.param(changed(problem_key='{"locality":0.0,"seq_q":[1]}'), id="key-array"),
        pytest.param(changed(problem_key='{"locality": 0.0, "seq_q": 8192}'), id="key-spaces"),
        pytest.param(changed(problem_key='{"locality":0,"seq_q":8192}'), id="key-number"),
        pytest.param(changed(problem_key='{"colour":1}'), id="key-unknown"),
        pytest.param(changed(problem_key='{"nsa":{"window_size":1}}'), id="key-constant"),
        pytest.param(changed(problem_key='{"nsa":5}'), id="key-constants"),
        pytest.param(changed(median_us=1e-300, p20_us=1e-300, p80_us=1e-300), id="time-of-no-sample"),
        pytest.param(changed(p80_us=13.0), id="percentile-of-no-sample"),
        pytest.param(changed(verdict="confirmed"), id="confirmed-against-nothing"),
        pytest.param(changed(samples_us=[]), id="no-samples"),
        pytest.param(changed(samples_us="123"), id="samples-text"),
        pytest.param(changed(created="2025-03-01"), id="no-time-zone"),
        pytest.param(changed(source="unknown"), id="source"),
        pytest.param(changed(policy=""), id="policy"),
        pytest.param(changed(verdict="best"), id="verdict"),
        pytest.param(changed(rivals=[{"config": {}}]), id="rival-without-numbers"),
        pytest.param(changed(rivals=[{**RIVAL, "tied": 1}]), id="rival-tied"),
        pytest.param(changed(rivals=[{**RIVAL, "blocks": 0}]), id="rival-blocks"),
        pytest.param(changed(rivals=[{**RIVAL, "config": [1]}]), id="rival-config"),
        pytest.param(changed(resources=[168]), id="resources"),
    ],
)
def test_bad_line_is_named_and_nothing_changes(tmp_path: Path, memory: TuningStore, line: Callable[[], bytes]) -> None:
    store, path = memory, tmp_path / "bad.jsonl"
    store.set_winner(make_winner())
    good = make_winner(template_digest="t2")
    path.write_bytes(format_line(good).encode() + b"\n\n" + line() + b"\n")
    with pytest.raises(StoreError, match=r"^line 3 of .*bad\.jsonl: ") as caught:
        store.import_jsonl(path)
    assert len(str(caught.value)) < 2000
    assert store.winners() == [make_winner()]


def test_files_that_cannot_be_read_or_written(store: TuningStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        store.import_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(StoreError, match="cannot be written"):
        store.export_jsonl(tmp_path / "none" / "a.jsonl")
    target = tmp_path / "folder.jsonl"
    target.mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        store.export_jsonl(target)
    assert not list(tmp_path.glob(".folder*"))


def test_export_is_byte_for_byte_what_import_takes(store: TuningStore, tmp_path: Path) -> None:
    winner = replace(make_winner(), default_config=None, default_median_us=None, library="", library_median_us=None)
    assert winner.speedup is None
    winner = replace(winner, rivals=(RIVAL, {**RIVAL, "tied": False}), verdict="confirmed", resources={"registers": 9})
    assert winner.tied == [RIVAL["config"]]
    store.set_winner(winner)
    store.export_jsonl(tmp_path / "a")
    with TuningStore("sqlite://", import_shipped=False) as fresh:
        fresh.import_jsonl(tmp_path / "a", source=None)
        assert fresh.winners() == [winner]


# predictions


def test_predictions_are_the_newest_and_fastest_of_each_problem(store: TuningStore) -> None:
    target = {"gpu": "target cuda:90", "capability": "9.0"}

    def guess(stages: int, guess_us: float | None, second: int, **changes: object) -> None:
        values = {"fingerprint": target, "kind": "predicted", "config": {"num_stages": stages}, "samples_us": ()}
        values |= {"predicted_us": guess_us, "median_us": None, "created": f"2026-01-01T00:00:{second:02d}+00:00"}
        store.add_trial(make_trial(**{**values, **changes}))

    longer = Problem(seq_q=65_536, seq_k=65_536)
    guess(1, 5.0, 1)
    guess(2, 1.0, 2)
    guess(2, 9.0, 3)  # judged anew
    guess(3, 7.0, 4)
    guess(4, 0.5, 5)
    guess(4, None, 6, status="resource")  # found not to fit
    guess(5, 2.0, 7, problem=longer)
    guess(6, 0.1, 8, fingerprint={"gpu": "target cuda:80", "capability": "8.0"})
    guess(7, 0.1, 9, template_digest="older")
    guess(8, 0.1, 9, kind="measured")
    first = make_trial()
    asked = {"family": first.family, "capability": "9.0", "template_digest": first.template_digest}
    found = {r.config["num_stages"]: r.predicted_us for r in store.predictions(**asked)}
    assert found == {1: 5.0, 2: 9.0, 3: 7.0, 5: 2.0}
    assert {r.config["num_stages"] for r in store.predictions(**asked, limit=1)} == {1, 5}
    assert store.predictions(**{**asked, "family": "other"}) == []
