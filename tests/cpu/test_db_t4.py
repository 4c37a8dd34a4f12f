"""The T4 export: valid by its schema, and the numbers of the trials in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cpu.store_fakes import H100, make_trial

from nsa_autotune.db import TuningStore
from nsa_autotune.db.checks import STATUSES
from nsa_autotune.db.t4 import INVALIDITY, export_t4
from nsa_autotune.errors import StoreError

NUMBER, TEXT, OBJECT = {"type": "number", "minimum": 0}, {"type": "string"}, {"type": "object"}
TIMES = ("compilation_time", "framework", "search_algorithm", "validation")
RESULT = {
    "type": "object",
    "required": ["timestamp", "configuration", "times", "invalidity", "correctness", "measurements", "objectives"],
    "properties": {
        "timestamp": {"type": "string", "format": "date-time"},
        "configuration": OBJECT,
        "times": {
            "type": "object",
            "required": ["runtimes", *TIMES],
            "properties": {"runtimes": {"type": "array", "items": NUMBER}, **dict.fromkeys(TIMES, NUMBER)},
        },
        "invalidity": {"enum": ["timeout", "compile", "runtime", "correctness", "constraints", "correct"]},
        "correctness": {"type": "number"},
        "measurements": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "value", "unit"],
                "properties": {"name": TEXT, "value": {"type": ["number", "string", "array"]}, "unit": TEXT},
            },
        },
        "objectives": {"type": "array", "items": TEXT},
    },
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["schema_version", "results"],
    "properties": {
        "schema_version": {"const": "1.0.0"},
        "results": {"type": "array", "items": RESULT},
        "metadata": {
            "type": "object",
            "properties": {
                "hardware": {
                    "type": "object",
                    "properties": {"hardware_description": {"type": "array"}, "operating_system": TEXT},
                },
                "environment": {
                    "type": "object",
                    "properties": {"device_query": OBJECT, "requirements": {"type": "array", "items": TEXT}},
                },
            },
        },
    },
}


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    return found  # type: ignore[no-any-return]


def test_every_status_has_a_place(store: TuningStore, tmp_path: Path) -> None:
    assert INVALIDITY.keys() == set(STATUSES)
    bare = {"samples_us": (), "median_us": None, "p20_us": None, "p80_us": None, "resources": None}
    for number, status in enumerate(STATUSES):
        values = {} if status == "ok" else bare
        store.add_trial(make_trial(status=status, config={"BLOCK_M": number}, reason=f"why {status}", **values))
    (path,) = export_t4(store.trials(), tmp_path / "t4.json")
    results = {r["configuration"]["BLOCK_M"]: r for r in read(path)["results"]}
    found = {status: results[number]["invalidity"] for number, status in enumerate(STATUSES)}
    assert found["accuracy"] == "correctness" and found["timeout"] == "timeout" and found["crash"] == "runtime"
    assert {status for status, invalidity in found.items() if invalidity == "correct"} == {"ok", "same_code"}
    assert {r["correctness"] for r in results.values() if r["invalidity"] == "correct"} == {1.0}
    assert {r["correctness"] for r in results.values() if r["invalidity"] != "correct"} == {0.0}


def test_numbers_are_those_of_the_trial_in_ms(store: TuningStore, tmp_path: Path) -> None:
    store.add_trial(make_trial(resources={"registers": 168, "compile_ms": 250.0, "spills": False}, max_error=0.01))
    (path,) = export_t4(store.trials(), tmp_path / "t4.json")
    document = read(path)
    (result,) = document["results"]
    assert path == tmp_path / "t4.json"
    assert result["times"]["runtimes"] == pytest.approx([0.010, 0.011, 0.0125])
    assert result["times"]["compilation_time"] == 250.0
    measured = {m["name"]: (m["value"], m["unit"]) for m in result["measurements"]}
    assert measured["time"] == (pytest.approx(0.011), "ms") and measured["registers"] == (168, "")
    assert measured["max_error"] == (0.01, "") and "spills" not in measured
    assert result["objectives"] == ["time"] and result["configuration"] == {"BLOCK_M": 64, "use_tma": True}
    assert document["metadata"]["environment"]["device_query"] == H100
    assert document["metadata"]["environment"]["requirements"] == ["torch==2.11", "triton==3.6"]


def test_a_file_is_about_one_kernel_problem_and_machine(store: TuningStore, tmp_path: Path) -> None:
    store.add_trials(
        [
            make_trial(),
            make_trial(config={"BLOCK_M": 1}),
            make_trial(family="win_attn_fwd"),
            make_trial(fingerprint={**H100, "gpu": "NVIDIA H200"}),
            make_trial(kind="predicted"),
            make_trial(provider="cudnn", stage="baseline", config={}, template_digest=""),
        ]
    )
    trials = [*store.trials(), *store.trials(kind="predicted")]
    written = export_t4(trials, tmp_path / "t4.json")
    assert sorted(written) == sorted(tmp_path.glob("t4-*_fwd-*.json")) and len(written) == 3
    assert sorted(len(read(path)["results"]) for path in written) == [1, 1, 2]
    assert len({read(path)["metadata"]["kernel"] for path in written}) == 2


def test_nothing_to_export_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no measured trial"):
        export_t4([], tmp_path / "t4.json")
    assert list(tmp_path.iterdir()) == []
