"""The command line: what it prints, how it exits, and that a mistake gets a sentence and not a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nsa_autotune.cli.app import main
from nsa_autotune.cli.console import make_table
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db.records import TrialRecord, WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

FINGERPRINT = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
FAMILY = "win_attn_fwd"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Databases hold what a test puts there, whatever the repository ships."""
    monkeypatch.setattr("nsa_autotune.db.store.shipped_files", dict)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


def make_winner(seq: int = 8192, **changes: object) -> WinnerRecord:
    spec, problem = get_spec(FAMILY), Problem(seq_q=seq, seq_k=seq)
    record = WinnerRecord(
        fingerprint=FINGERPRINT,
        family=FAMILY,
        problem=problem.to_dict(),
        problem_key=spec.problem_key(problem),
        config=spec.default_config(problem),
        template_digest=template_digest(spec),
        median_us=120.0,
        p20_us=118.8,
        p80_us=123.0,
        samples_us=(118.0, 120.0, 125.0),
        default_config=spec.default_config(problem),
        default_median_us=240.0,
    )
    return replace(record, **changes)


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The URL of a database with two winners, one of them stale, a failed trial and a prediction."""
    url = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    winner = make_winner()
    trial = TrialRecord(
        fingerprint=FINGERPRINT,
        family=FAMILY,
        problem=winner.problem,
        problem_key=winner.problem_key,
        config=winner.config,
        template_digest=winner.template_digest,
        status="compile",
        reason="[red]not markup[/red]",
    )
    prediction = replace(trial, status="ok", reason="", kind="predicted", predicted_us=99.5)
    with TuningStore(url, import_shipped=False) as store:
        store.set_winner(winner)
        store.set_winner(make_winner(65536, template_digest="0" * 20))
        store.add_trials([trial, prediction])
    return url


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("tune", "render", "doctor", "db"))


def test_version(run: Run) -> None:
    from nsa_autotune import __version__

    assert run("--version")[:2] == (0, f"nsa-autotune {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "--preset", "gqa16-d12"), ("preset", "gqa16-d12", "'gqa16-d128'")),
        (("tune", "--seq", "8k,banana"), ("sequence lengths", "banana", "8k,32k,64k")),
        (("tune", "--heads", "63", "--kv-heads", "4"), ("multiple", "num_q_heads=63", "--heads 64 --kv-heads 4")),
        (("tune", "--seq", "8k,17m"), ("at most 16m tokens", "17m", "8k,32k,64k")),
        (("tune", "--seq", "9" * 5000), ("at most 16m tokens",)),
        (("tune", "--seq", "2k", "--seq-q", "4k"), ("more queries than keys", "seq_q=4096", "--seq-q")),
        (("tune", "--seq-q", "1,2"), ("one number of queries", "1,2", "--seq-q 1")),
        (("tune", "--phi-hidden", "0"), ("phi_hidden must be a positive int", "whole number")),
        (("tune", "--phi-hidden", "65"), ("phi_hidden must be a power of two", "phi_hidden=128")),
        (("tune", "--families", ","), ("--families names nothing", "separated by commas")),
        (("tune", "--target", "cuda:90", "--device", "cpu"), ("--device", "'cpu'", "cuda:0")),
        (("tune", "--layout", "pages"), ("layout", "pages", "batched, packed, paged")),
        (("tune", "--page-size", "32"), ("--page-size", "Add --layout paged")),
        (("tune", "--layout", "paged", "--page-size", "48"), ("page_size", "48", "16, 32, 64")),
        (("tune", "--layout", "paged", "--cache-dtype", "int8"), ("cache dtype", "int8", "fp8")),
        (("render", "--family", "cmp_decode_fwd", "--layout", "packed"), ("layout must be paged", "--layout paged")),
        (("tune", "--d-qk", "65"), ("head dim", "65", "80 -> 96")),
        (("tune", "--dtype", "bf61"), ("dtype", "bf61", "bfloat16")),
        (("tune", "--locality", "1.5"), ("locality must be in [0, 1)", "1.5", "--locality 0,0.8")),
        (("tune", "--families", "win_atn_fwd"), ("win_atn_fwd", "win_attn_fwd")),
        (("tune", "--nsa", "select_block_siz=64"), ("select_block_siz", "select_block_size")),
        (("tune", "--nsa", "select_block_size=72"), ("compress_stride (d) must divide", "72")),
        (("tune", "--budget", "quik"), ("budget", "quik", "quick")),
        (("tune", "--target", "cuda:12345"), ("target", "cuda:12345")),
        (("render", "--family", FAMILY, "--config", "num_warps=3"), ("num_warps='3'", "not one of")),
        (("render", "--family", FAMILY, "--config", "num_warps"), ("name=value", "num_warps")),
        (("render", "--family", FAMILY, "--out", "/nowhere/at/all.py"), ("cannot be written", "/nowhere/at/all.py")),
        (("render", "--family", FAMILY, "--d-qk", "100"), ("head dims", "d_qk=100")),
        (("db", "query", "--table", "winners", "--status", "ok"), ("no status", "trials")),
        (("db", "query", "--status", "okay"), ("status", "okay", "Did you mean 'ok'")),
        (("db", "query", "--kind", "guessed"), ("kind", "guessed", "Known: measured, predicted")),
        (("db", "query", "--family", "nope"), ("family", "nope")),
        (("db", "import", "/nowhere/x.jsonl"), ("cannot be read", "/nowhere/x.jsonl", "db export")),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_a_mistake_gets_a_sentence(run: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_a_file_that_is_no_database_is_left_as_it_is(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_text("these are notes, and longer than one hundred bytes, so that SQLite reads them as a header" * 3)
    before = path.read_bytes()
    code, _, err = run("db", "query", "--db", f"sqlite:///{path}")
    assert (code, path.read_bytes()) == (2, before)
    assert "damaged" in err


def test_an_unknown_option_is_no_traceback(run: Run) -> None:
    code, _, err = run("tune", "--sequence", "8k")
    assert code == 2
    assert "--sequence" in err


def test_render_prints_the_source_that_the_config_asks_for(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("render", "--family", FAMILY, "--config", "num_warps=8", "--dtype", "fp16", "--seq", "4k")
    assert code == 0
    compile(out, "rendered", "exec")
    assert '"num_warps":8' in out
    assert '"dtype":"float16"' in out

    path = tmp_path / "kernel.py"
    assert run("render", "--family", FAMILY, "--config", "num_warps=8", "--dtype", "fp16", "--out", str(path))[0] == 0
    assert path.read_text() == out
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernel.py"], "no temporary file stays"


def test_render_lists_families_and_parameters(run: Run) -> None:
    from nsa_autotune.kernels import all_specs

    out = run("render")[1]
    assert all(family in out for family in all_specs())
    out = run("render", "--family", FAMILY, "--params")[1]
    spec = get_spec(FAMILY)
    assert all(param.name in out and param.doc in out for param in spec.params)
    assert all(constraint.reason in out for constraint in spec.constraints)


def test_the_golden_files_are_up_to_date(run: Run) -> None:
    code, out, err = run("render", "--check")
    assert (code, err) == (0, "")
    assert "equal" in out


def test_a_wrong_golden_file_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_autotune.codegen import golden

    monkeypatch.setattr(golden, "check_goldens", lambda specs: ["golden/a.py: line 3 differs"])
    code, _, err = run("render", "--check")
    assert code == 2
    assert "golden/a.py: line 3 differs" in err and "render --write" in err


def test_goldens_need_a_checkout(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nsa_autotune.codegen.golden.GOLDEN_DIR", tmp_path / "missing")
    for option in ("--check", "--write"):
        code, _, err = run("render", option)
        assert code == 2 and "source checkout" in err
    assert list(tmp_path.iterdir()) == []


def test_query_as_json_and_csv(run: Run, database: str) -> None:
    code, out, _ = run("db", "query", "--db", database, "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert {(row["seq_k"], row["stale"]) for row in rows} == {(8192, False), (65536, True)}
    assert {row["speedup"] for row in rows} == {2.0}

    out = run("db", "query", "--db", database, "--format", "csv", "--problem", "seq_k=64k")[1]
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["family"], row["seq_k"], float(row["median_us"])) == (FAMILY, "65536", 120.0)


def test_query_filters(run: Run, database: str) -> None:
    def count(*arguments: str) -> int:
        code, out, err = run("db", "query", "--db", database, "--format", "json", *arguments)
        assert code == 0, err
        return len(json.loads(out))

    assert count("--gpu", "test") == 2
    assert count("--family", "slc_attn_fwd") == 0
    assert count("--problem", "seq_k=8k", "--problem", "dtype=bf16,num_q_heads=64") == 1
    assert count("--status", "compile") == 1
    assert count("--table", "trials") == 1, "predictions are not measurements"
    assert count("--kind", "predicted") == 1
    assert count("--limit", "1") == 1


def test_render_takes_queries_and_phi(run: Run) -> None:
    code, out, err = run("render", "--family", "cmp_mlp_fwd", "--phi-hidden", "64", "--seq", "4k")
    assert code == 0 and '"HIDDEN":64' in out, err
    assert run("render", "--family", FAMILY, "--seq", "4k", "--seq-q", "16")[0] == 0
    code, _, err = run("render", "--family", FAMILY, "--seq", "4k", "--seq-q", "8k")
    assert code == 2 and "seq_q=8192, seq=4096" in err


def test_csv_without_rows_is_a_header(run: Run, database: str) -> None:
    for table in ("winners", "trials"):
        query = ("db", "query", "--db", database, "--format", "csv", "--table", table)
        full = run(*query)[1].splitlines()
        code, out, err = run(*query, "--family", "slc_attn_fwd")
        assert (code, out.splitlines()) == (0, full[:1]) and len(full) > 1
        assert err == "no row; of this GPU, family and problem there are: no records at all"
        code, _, err = run(*query, "--columns", "famly")
        assert code == 2 and "famly" in err


TABLE = {
    "title": "times",
    "columns": ("family", "problem", "median us", "p20 us", "p80 us", "library"),
    "rows": [("slc_select_fwd", "T 65536 HQ 64 H 4 d 192/128 bfloat16", 12345.6, 1.25, None, "flash [x]")],
    "numbers": ("median us", "p20 us", "p80 us"),
    "less_important": ("p20 us", "p80 us", "library"),
}


def table_text(width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(make_table(**TABLE, width=width))
    return text.getvalue()


def test_a_wide_table_shows_every_column_on_one_line() -> None:
    lines = [line for line in table_text(200).splitlines() if line.strip()]
    assert lines[1].split() == ["family", "problem", "median", "us", "p20", "us", "p80", "us", "library"]
    assert lines[3].split("  ")[0].strip() == "slc_select_fwd"
    assert "T 65536 HQ 64 H 4 d 192/128 bfloat16" in lines[3] and "12346" in lines[3] and "flash [x]" in lines[3]
    assert "left out" not in table_text(200)


@pytest.mark.parametrize(("width", "left_out"), [(80, []), (60, ["p20 us"]), (54, ["p20 us", "p80 us"])])
def test_a_narrow_table_leaves_columns_out_and_breaks_no_number(width: int, left_out: list[str]) -> None:
    text = table_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "12346" in text and "slc_select_fwd" in text and "bfloat16" in text
    assert [
        name for name in TABLE["less_important"] if name in " ".join(text.partition("left out")[2].split())
    ] == left_out
    assert ("1.25" in text) == (not left_out)


@pytest.mark.parametrize("table", ["winners", "trials"])
def test_a_query_is_readable_in_80_columns(
    run: Run, database: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_autotune.cli.console.PLAIN_WIDTH", 80)
    code, out, _ = run("db", "query", "--db", database, "--table", table)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    words = out.split()
    assert {FAMILY, "family", "problem", "median_us", "65536" if table == "winners" else "status"} <= set(words)
    assert "left out" in out and "…" not in out


def test_query_as_table(run: Run, database: str) -> None:
    code, out, _ = run("db", "query", "--db", database)
    assert code == 0
    assert "T 65536 HQ 64 H 4 d 128 bfloat16" in out and "240" not in out
    out = run("db", "query", "--db", database, "--status", "compile")[1]
    assert "[red]not markup[/red]" in out
    out = run("db", "query", "--db", database, "--columns", "family,default_median_us")[1]
    assert "240" in out and "T 65536" not in out
    code, _, err = run("db", "query", "--db", database, "--columns", "famly")
    assert code == 2 and "famly" in err and "family" in err


def test_export_and_import_carry_winners(run: Run, database: str, tmp_path: Path) -> None:
    path, other = tmp_path / "winners.jsonl", f"sqlite:///{tmp_path / 'other.sqlite'}"
    assert "2 records" in run("db", "export", str(path), "--db", database)[1]
    told = "0 trials read, 0 new; 0 designs read, 0 new; 2 winners read, 2 new\n"
    assert run("db", "import", str(path), "--db", other)[1].endswith(told)
    exported = json.loads(run("db", "query", "--db", other, "--format", "json", "--gpu", "Test")[1])
    assert {row["source"] for row in exported} == {"imported"}
    assert "4 records" in run("db", "export", str(path), "--db", database, "--records", "all", "--force")[1]


def test_path_makes_no_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "not_yet.sqlite"
    assert run("db", "path", "--db", f"sqlite:///{path}")[:2] == (0, f"{path}\n")
    assert not path.exists()


def test_doctor_without_a_gpu(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = run("doctor", "--db", database)
    assert code == 0
    assert "no CUDA device" in out
    assert "1 compile" in out, "trials by status"
    assert "Test GPU" in out
    stale = "1 winner is stale, as templates have changed, and not served"
    assert f"{stale}; on their GPU: nsa-autotune recertify --families {FAMILY}" in out
    assert "nsa-autotune recertify --dry-run" in out


def test_doctor_with_a_damaged_database(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.sqlite"
    path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 4096)
    code, out, err = run("doctor", "--db", f"sqlite:///{path}")
    assert code == 2
    assert "this machine" in out and "database" in err


def test_completion_is_printed_and_lists_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    code, script, _ = run("--show-completion")
    assert code == 0 and "complete -o default -F _nsa_autotune_completion nsa-autotune" in script
    assert "--install-completion" in run("--help")[1]
    monkeypatch.setenv("_NSA_AUTOTUNE_COMPLETE", "complete_bash")
    for typed, wanted in (("nsa-autotune ", {"tune", "db", "ship"}), ("nsa-autotune db ", {"best", "query", "prune"})):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
        assert wanted <= set(run()[1].split())


def test_a_wrong_value_gets_a_plain_sentence(run: Run, database: str) -> None:
    code, _, err = run("db", "query", "--table", "nope", "--db", database)
    assert code == 2 and "'nope' is not one of 'winners', 'trials'" in err and "Value error" not in err
    code, _, err = run("db", "query", "--status", "nope", "--db", database)
    assert code == 2 and "Did you mean" not in err and "compile" in err
    assert "Did you mean 'compile'" in run("db", "query", "--status", "compiled", "--db", database)[2]


def test_ctrl_c_while_modules_load_is_an_interruption(tmp_path: Path) -> None:
    """Where Typer ought to come from stands what a signal's handler raises."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "nsa_autotune", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
