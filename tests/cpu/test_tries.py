"""Configs to measure first: the file of `tune --try`, how it is filled up, and what the search does with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_autotune.cli.app import main
from nsa_autotune.cli.tries import completed, read_tries
from nsa_autotune.errors import InvalidInput
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem, canonical_json

SPEC = get_spec("win_attn_fwd")
PROBLEM = Problem(seq_q=1024, seq_k=1024, num_q_heads=16, num_kv_heads=1, d_qk=64, d_v=64)


def write(folder: Path, *lines: object) -> Path:
    """A file of these lines; what is no text becomes JSON."""
    path = folder / "try.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_a_partial_config_is_filled_up_from_the_default(tmp_path: Path) -> None:
    lines = (
        {"family": "win_attn_fwd", "config": {"BLOCK_N": 32}},
        "",
        {"family": "gate_sum_fwd", "config": {}},
        {"family": "win_attn_fwd", "config": {"BLOCK_T": 32}},  # 512 rows are more than any tile may have
    )
    tries = read_tries(write(tmp_path, *lines))
    assert [family for family, _ in tries] == ["win_attn_fwd", "gate_sum_fwd", "win_attn_fwd"]
    default = SPEC.default_config(PROBLEM)
    assert default["BLOCK_N"] != 32
    assert completed(SPEC, PROBLEM, tries) == [{**default, "BLOCK_N": 32}]
    assert completed(get_spec("slc_attn_fwd"), PROBLEM, tries) == []


STEPS = [Problem(batch=batch, seq_q=1, seq_k=length, layout="paged") for batch, length in ((64, 8192), (1, 65536))]
LONG = [Problem(seq_q=65536, seq_k=65536)]


@pytest.mark.parametrize(("file", "problems"), [("decode", STEPS), ("forward", LONG), ("backward", LONG)])
def test_the_configs_of_the_benchmarks_are_legal(file: str, problems: list[Problem]) -> None:
    tries = read_tries(Path(__file__).parents[2] / "benchmarks" / "tries" / f"{file}.jsonl")
    for family in {family for family, _ in tries}:
        for problem in problems:
            found = completed(get_spec(family), problem, tries)
            assert len(found) == sum(each == family for each, _ in tries), f"{family}: some break a constraint"
            assert len({canonical_json(config) for config in found}) == len(found), f"{family}: one stands twice"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "a line must be JSON"),
        ("[" * 100_000, "a line must be JSON"),
        ("[1]", "a JSON object of a family and a config"),
        ({"family": "win_attn_fwd"}, "line=2, missing='config'"),
        ({"family": "win_attn_fwd", "config": {}, "problem": {}}, "line=2, unknown='problem'"),
        ({"family": "win_attn_fwd", "config": []}, "a config must be a JSON object"),
        ({"family": "win_attn_fw", "config": {}}, "must name a known family"),
        ({"family": ["x"], "config": {}}, "must name a known family"),
        ({"family": "win_attn_fwd", "config": {"BLOCK_X": 1}}, "no such parameter"),
        ({"family": "win_attn_fwd", "config": {"BLOCK_N": 65}}, "no such value"),
        ({"family": "win_attn_fwd", "config": {"use_tma": 1}}, "no such value"),
        ({"family": "win_attn_fwd", "config": {"BLOCK_N": [64]}}, "no such value"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: object, words: str) -> None:
    path = write(tmp_path, {"family": "gate_sum_fwd", "config": {}}, line)
    with pytest.raises(InvalidInput) as caught:
        read_tries(path)
    assert words in str(caught.value) and caught.value.values["line"] == 2


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="read from a text file"):
        read_tries(tmp_path / "none.jsonl")


def test_a_file_without_a_line_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the file of --try names no config"):
        read_tries(write(tmp_path, " "))


def test_a_target_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"family": "win_attn_fwd", "config": {"BLOCK_N": 32}})
    assert main(["tune", "--target", "cuda:90,cuda:80", "--try", str(path)]) == 2
    assert f"--try measures, and a --target is absent; got --try='{path}', --target='cuda:90,cuda:80'" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--try", str(path)]) == 2
    said = capsys.readouterr().err
    assert "--try measures, and torch finds no GPU here" in said and "--target" not in said
