"""`nsa-autotune db best|compare|history|stats|sql`: what they print and write, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cpu.ask_fakes import A100, FAMILY, H100, NEW, OLD, config_of, trial, winner
from cpu.recorded_fakes import invented_records, invented_time

from nsa_autotune.cli.app import main
from nsa_autotune.cli.rows import OBJECTS
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db import TuningStore
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.worth import PED_ANOVA, parameter_worth
from nsa_autotune.spec import Config, Problem, canonical_json

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Winners of two GPUs and two versions, the older one stale; two trials."""
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)
    current = template_digest(get_spec(FAMILY))
    with TuningStore(f"sqlite:///{tmp_path}/tuning.sqlite") as store:
        store.set_winner(winner(100, day=1))
        store.set_winner(winner(110, day=2, fingerprint={**H100, **NEW}, template_digest=current))
        store.set_winner(winner(250, day=3, fingerprint={**A100, **NEW}, template_digest=current))
        store.add_trials([trial(40, config=config_of(num_warps=8)), trial(None, status="timeout")])
    return f"sqlite:///{tmp_path}/tuning.sqlite"


@pytest.fixture
def ask(url: str, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run `db ...` on the database: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["db", *arguments, "--db", url])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


def test_best_as_table_json_and_csv(ask: Ask, tmp_path: Path) -> None:
    code, out, _ = ask("best", "--gpu", "h100")
    assert code == 0 and "best: 1 row" in out and "2026-01-02" in out and "confirmed" in out
    (row,) = json.loads(ask("best", "--gpu", "h100", "--format", "json")[1])
    assert (row["median_us"], row["stale"], row["triton"], row["samples"]) == (110, False, "3.9.0", 3)
    assert isinstance(row["config"], dict) and row["nsa"]["window_size"] == 512  # objects, not text of objects
    ((text,),) = csv.reader(io.StringIO(ask("sql", "SELECT '{x' AS config", "--format", "csv")[1].splitlines()[1]))
    assert json.loads(ask("sql", "SELECT '{x' AS config", "--format", "json")[1]) == [{"config": text}]
    code, out, _ = ask("best", "--by", "seq", "--format", "csv", "--out", str(tmp_path / "best.csv"))
    assert code == 0 and out.endswith("best.csv: 2 rows\n")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "best.csv").read_text())))
    assert [(row["median_us"], row["growth"]) for row in rows] == [("250.0", ""), ("110.0", "")]


def test_compare(ask: Ask) -> None:
    (row,) = json.loads(ask("compare", "--gpu", "H100,A100", "--format", "json")[1])
    assert (row["base_median_us"], row["other_median_us"], row["clear"]) == (110, 250, True)
    (row,) = json.loads(ask("compare", "--between", "triton=3.6.0..3.9.0", "--gpu", "H100", "--format", "json")[1])
    assert (row["gpu"], row["ratio"]) == (H100["gpu"], 1.1)
    warps = config_of()["num_warps"]
    code, out, err = ask("compare", "--config", f"num_warps={warps}", "--config", "num_warps=8", "--family", FAMILY)
    assert code == 0 and "compare: 0 rows" in out, err  # the trial with the default config failed


def test_history_and_regressions(ask: Ask) -> None:
    rows = json.loads(ask("history", "--gpu", "H100", "--format", "json")[1])
    assert [(row["median_us"], row["ratio"]) for row in rows] == [(110, 1.1), (100, None)]
    code, out, _ = ask("history", "--regressions", "--between", "triton=3.6.0..3.9.0")
    assert code == 0 and "regressions: 1 row" in out
    assert "regressions: 0 rows" in ask("history", "--regressions", "--loss", "15%")[1]
    assert "regressions: 1 row" in ask("history", "--regressions", "--loss", "0.05")[1]


def test_stats(ask: Ask) -> None:
    rows = json.loads(ask("stats", "--format", "json")[1])
    assert [(row["gpu"], row["winners"], row["trials"], row["timeout"]) for row in rows] == [
        ("NVIDIA A100", 1, 0, 0), (H100["gpu"], 2, 2, 1)
    ]  # fmt: skip
    out = ask("stats")[1]
    assert "timeout" in out and "same_code" not in out, "a table leaves out statuses that never were"


def test_stale_by_what_changed(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_autotune.cli.doctor.gpu_name", lambda: None)
    assert json.loads(ask("stats", "--show", "stale", "--format", "json")[1]) == []
    now = ("stats", "--show", "stale", "--gpu", "H100", "--now", "triton=3.10,driver=580")
    rows = json.loads(ask(*now, "--format", "json")[1])
    assert [(row["changed"], row["then"], row["now"], row["winners"]) for row in rows] == [
        ("triton", "3.9.0", "3.10", 1)
    ]
    code, out, _ = ask(*now)
    assert code == 0 and "held against triton 3.10, driver 580" in out
    code, _, err = ask("stats", "--show", "stale", "--now", "python=3.12")
    assert code == 2 and "driver, cuda, torch" in err


@pytest.mark.parametrize("command", ["best", "compare", "history", "stats"])
def test_csv_without_rows_is_the_same_header(ask: Ask, command: str) -> None:
    full = ask(command, "--format", "csv")[1].splitlines()
    none = ask(command, "--format", "csv", "--family", "win_attn_fwd")[1].splitlines()
    assert len(full) > 1 and none == full[:1]


def test_sql(ask: Ask) -> None:
    code, out, _ = ask("sql", "SELECT status, count(*) AS n FROM nsa_trials GROUP BY status", "--format", "csv")
    assert (code, out) == (0, "status,n\nok,1\ntimeout,1\n")
    code, out, err = ask("sql", "SELECT id FROM nsa_trials", "--limit", "1")
    assert code == 0 and "sql: 1 row" in out and "more rows than 1" in err
    code, _, err = ask("sql", "DELETE FROM nsa_trials")
    assert code == 2 and "may only read" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("best", "--family", "slc_atn_fwd"), ("slc_atn_fwd", "slc_attn_fwd")),
        (("best", "--policy", "warm"), ("no such measurement policy", "graph-warm")),
        (("best", "--problem", "tokens=1"), ("no such field", "seq_k")),
        (("best", "--format", "parquet"), ("--out rows.parquet",)),
        (("best", "--out", "x.csv"), ("a table is printed", "--format csv")),
        (("best", "--format", "csv", "--out", "/nowhere/x.csv"), ("cannot be written", "/nowhere/x.csv")),
        (("best", "--gpu", "B200"), ("no GPU of this name", "NVIDIA A100")),
        (("query", "--gpu", "B200"), ("no GPU of this name", "NVIDIA A100")),
        (("history", "--problem", "seq_k=banana"), ("banana", "seq_k: 8192")),
        (("compare", "--between", "triton=9.9..9.8"), ("triton", "3.6.0, 3.9.0")),
        (("compare", "--config", "num_warps=8", "--config", "nope=8", "--family", FAMILY), ("nope", "num_warps")),
        (("compare", "--config", "num_warps=8", "--config", "num_warps=99", "--family", FAMILY), ("num_warps: ", "8")),
        (("export", "-", "--gpu", "B200"), ("no GPU of this name", "NVIDIA A100")),
        (("export", "-", "--family", "nope"), ("no family of this name", FAMILY)),
        (("studies", "new", "--gpu", "B200"), ("no GPU of this name", "NVIDIA A100")),
        (("prune", "--gpu", "B200"), ("no GPU of this name", "NVIDIA A100")),
        (("prune", "--family", "nope"), ("no family of this name", FAMILY)),
        (("compare", "--gpu", "V100,H100"), ("no GPU of this name", "NVIDIA A100")),
        (("compare", "--gpu", "H100,A100", "--between", "triton=1..2"), ("one thing is compared",)),
        (("compare", "--between", "triton"), ("VERSION=OLD..NEW",)),
        (("compare", "--between", "cpu=1..2"), ("no such version",)),
        (("compare", "--config", "num_warps=4", "--family", FAMILY), ("two configs are compared",)),
        (("compare", "--config", "num_warps=4", "--config", "num_warps=8"), ("within one family",)),
        (("history", "--loss", "3%"), ("--regressions",)),
        (("history", "--regressions", "--loss", "much"), ("--loss 3%",)),
        (("stats", "--now", "triton=3.9.0"), ("--show stale",)),
        (("stats", "--show", "worth"), ("belong to a family",)),
        (("stats", "--show", "worth", "--family", FAMILY), ("importance needs 20 configs",)),
        (("stats", "--show", "worth", "--family", "win_attn_fwd"), ("no measured trial",)),
        (("sql", "SELECT"), ("does not understand",)),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_mistakes_get_a_sentence(ask: Ask, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, err = ask(*arguments)
    assert code == 2 and all(word in err for word in words), err
    assert out == ""


# Parquet


def test_parquet_comes_back_equal(ask: Ask, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "best.parquet"
    code, out, _ = ask("best", "--format", "parquet", "--out", str(path))
    assert code == 0 and out.endswith("best.parquet: 2 rows\n")
    rows = json.loads(ask("best", "--format", "json")[1])
    texts = {name: canonical_json(rows[0][name]) for name in OBJECTS if rows[0].get(name) is not None}
    assert texts and parquet.read_table(path).to_pylist()[0] == {**rows[0], **texts}  # an object is its JSON there
    assert [p.name for p in tmp_path.glob("*parquet*")] == ["best.parquet"]
    mixed = "SELECT 1 AS a UNION ALL SELECT 'text'"
    code, _, err = ask("sql", mixed, "--format", "parquet", "--out", str(tmp_path / "mixed.parquet"))
    assert code == 2 and "one type" in err and not (tmp_path / "mixed.parquet").exists()


def test_without_pyarrow_a_sentence(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = ask("best", "--format", "parquet", "--out", str(tmp_path / "x.parquet"))
    assert code == 2 and "nsa-autotune[parquet]" in err and not list(tmp_path.glob("*parquet*"))


# what a parameter is worth

PROBLEM = Problem(seq_q=8192, seq_k=8192)


def only_warps_count(config: Config) -> float:
    return 100.0 * (1 + abs(int(config["num_warps"]) - 4))


def test_the_parameter_that_decides_is_the_most_important() -> None:
    trials = invented_records("win_attn_fwd", PROBLEM, 200, time_us=only_warps_count)
    worth = parameter_worth(get_spec("win_attn_fwd"), trials)
    assert worth.params[0].param == "num_warps" and worth.params[0].best_value == 4
    assert sum(param.importance for param in worth.params) == pytest.approx(1.0)
    assert worth.params[0].importance > 2 * worth.params[1].importance
    assert worth.params[0].loss_without > 1 and worth.params[1].loss_without < 0.05
    assert worth.configs == sum(t.status == "ok" for t in trials) and worth.best_us == pytest.approx(100, rel=0.02)


def test_worth_needs_one_origin_and_enough_configs() -> None:
    trials = invented_records(FAMILY, PROBLEM, 30, fail_share=0.0)
    with pytest.raises(InvalidInput, match="needs 20 configs"):
        parameter_worth(get_spec(FAMILY), trials[:19])
    later = invented_records(FAMILY, PROBLEM.replace(seq_q=16384, seq_k=16384), 5)
    with pytest.raises(InvalidInput, match="one problem, machine"):
        parameter_worth(get_spec(FAMILY), [*trials, *later])


def test_worth_names_the_evaluator_and_the_evidence(ask: Ask, url: str) -> None:
    with TuningStore(url) as store:
        family, spec = "win_attn_fwd", get_spec("win_attn_fwd")
        store.add_trials(invented_records(family, PROBLEM, 60, time_us=invented_time(spec, PROBLEM)))
    code, out, err = ask("stats", "--show", "worth", "--family", family)
    assert code == 0, err
    assert "of Optuna on" in out and "NVIDIA H100" in out and "triton 3.6.0" in out and "2026-01-01" in out
    rows = json.loads(ask("stats", "--show", "worth", "--family", family, "--format", "json")[1])
    assert {row["evaluator"] for row in rows} <= {PED_ANOVA, "fANOVA"} and rows[0]["configs"] > 20
    with TuningStore(url) as store:
        store.add_trials(invented_records(family, PROBLEM.replace(seq_q=16384, seq_k=16384), 1))
    code, _, err = ask("stats", "--show", "worth", "--family", family)
    assert code == 2 and "one problem on one GPU" in err
    assert ask("stats", "--show", "worth", "--family", family, "--problem", "seq_k=8k")[0] == 0


READING = [
    *(("db", name) for name in ("best", "query", "compare", "history", "stats", "verify")),
    ("db", "sql", "SELECT 1"), ("db", "export", "out"), ("db", "studies", "out"), ("db", "prune", "--failed"),
    ("report", "--out", "out"), ("ship", "--gpu", "H100", "--out", "out"), ("doctor",), ("replay",), ("cover",),
    ("recertify", "--dry-run"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_what_only_reads_makes_no_database(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--db", "sqlite:///typo/tuning.sqlite"]) == 2
    assert "there is no such database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "question",
    [
        ("best",), ("best", "--by", "seq"), ("history",), ("query",), ("query", "--table", "trials"), ("stats",),
        ("query", "--kind", "predicted"), ("compare", "--gpu", "H100,A100"), ("compare", "--gpu", "H100,A100,B200"),
        ("compare", "--between", "triton=3.6.0..3.9.0"),
        ("compare", "--family", FAMILY, "--config", "num_warps=8,num_stages=1", "--config", "num_warps=4,num_stages=2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_row_keeps_its_gpu_and_no_word_is_broken_in_80_columns(
    ask: Ask, url: str, question: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TuningStore(url) as store:
        store.set_winner(winner(60, day=3, fingerprint={**A100, **NEW, "gpu": "NVIDIA B200"}))
        store.add_trials([trial(20, day=4, fingerprint={**A100, **OLD}, config=config_of(num_warps=8, num_stages=1))])
        store.add_trials([trial(20, config=config_of(num_warps=w, num_stages=s)) for w, s in ((8, 1), (4, 2))])
        predicted = {"kind": "predicted", "predicted_us": 1.75, "samples_us": (), "p20_us": None, "p80_us": None}
        store.add_trials([trial(None, status="ok", fingerprint=gpu, **predicted) for gpu in (H100, A100)])
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = ask(*question)
    assert code == 0, err
    assert max(map(len, out.splitlines()[1:])) <= 80 and "\u2026" not in out
    words = set(out.split())
    assert {"H100"} <= words and FAMILY in words, out
    assert "A100" in words or "--between" in question or "--config" in question, out
    for broken in words - {"NVIDIA"}:
        assert broken not in ("NVID", "NVIDI", "slc_att", "bfloat1", "bfloat"), out
    assert ("1.75" in words) == ("predicted" in question)


def test_one_gpu_is_said_once(ask: Ask) -> None:
    out = ask("best", "--gpu", "H100")[1]
    assert out.startswith("best: 1 row, gpu NVIDIA H100 80GB HBM3\n") and out.count("H100") == 1
    assert "gpu" in ask("query", "--gpu", "H100", "--columns", "gpu")[1].splitlines()[2], "asked for by name"


def test_an_empty_answer_says_what_there_is(ask: Ask, url: str) -> None:
    with TuningStore(url) as store:
        predicted = {"kind": "predicted", "predicted_us": 1.75, "samples_us": (), "p20_us": None, "p80_us": None}
        b200 = {**A100, "gpu": "NVIDIA B200"}
        store.add_trials([trial(None, status="ok", fingerprint=b200, tokens=n, **predicted) for n in (8192, 65536)])
    code, out, err = ask("best", "--gpu", "B200", "--format", "json")
    assert (code, out) == (0, "[]\n")
    assert err == "no row; of this GPU, family and problem there are: 2 predictions (db query --kind predicted)"
    assert "2 predictions" in ask("query", "--gpu", "B200", "--table", "trials")[2]
    assert ask("history", "--regressions", "--loss", "50%")[2] == "", "no regression says enough"


def test_a_part_of_the_gpus_name_will_do(ask: Ask, url: str, tmp_path: Path) -> None:
    code, out, err = ask("export", str(tmp_path / "a.jsonl"), "--gpu", "h100", "--records", "all")
    assert code == 0 and "4 records" in out, err
    assert all("H100" in line for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert ask("studies", str(tmp_path / "s.sqlite"), "--gpu", "h100")[0] == 0
    kept = (
        "0 trials would go; 1 more meet the conditions and stay: trials of winners' configs, their races and baselines"
    )
    assert kept in ask("prune", "--gpu", "h100", "--failed", "--dry-run")[1]
    assert ask("prune", "--gpu", "a100", "--failed", "--dry-run")[1] == "0 trials would go\n"
