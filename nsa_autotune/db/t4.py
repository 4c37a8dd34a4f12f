"""Trials in the T4 format of the autotuning community (schema 1.0.0), which Kernel Tuner and others read.

A T4 file is about one kernel, problem, machine and policy: `group` divides trials so. Times are milliseconds there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, StoreError
from ..spec import digest
from .exchange import write_atomically
from .records import TrialRecord

T4_VERSION = "1.0.0"
INVALIDITY = {
    "ok": "correct",
    "same_code": "correct",
    "constraint": "constraints",
    "render": "compile",
    "compile": "compile",
    "resource": "compile",
    "accuracy": "correctness",
    "runtime": "runtime",
    "crash": "runtime",
    "timeout": "timeout",
}
NOT_RECORDED = ("framework", "search_algorithm", "validation")  # times of T4 that a trial lacks: written as 0
UNITS = {"compile_ms": "ms", "shared_bytes": "bytes", "spill_bytes": "bytes"}
MEASURED_US = {"time": "median_us", "time_p20": "p20_us", "time_p80": "p80_us"}


def export_t4(trials: Iterable[TrialRecord], path: Path, *, overwrite: bool = True) -> list[Path]:
    """Write one file a group and return them: `path` if there is one group, else `<stem>-<family>-<digest>.json`.

    InvalidInput if one of them is there and `overwrite` is False; then none is written.
    """
    groups = group(trials)
    if not groups:
        raise StoreError("there is no measured trial of a template to export", {}, "Name another family or GPU.")
    targets = {
        name: path if len(groups) == 1 else path.with_name(f"{path.stem}-{name}.json") for name in sorted(groups)
    }
    there = [str(target) for target in targets.values() if target.exists()]
    if there and not overwrite:
        raise InvalidInput(
            "a file is there already", {"paths": there}, "Overwrite it by --force, or name another file."
        )
    for name, target in targets.items():
        write_atomically(target, json.dumps(to_t4(groups[name]), indent=1, allow_nan=False) + "\n")
    return list(targets.values())


def group(trials: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Measured trials of templates by family and digest of what they share, each group in the order of time."""
    found: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.kind == "measured" and trial.provider == "template":
            shared = [trial.fingerprint, trial.problem_key, trial.problem, trial.template_digest, trial.policy]
            found[f"{trial.family}-{digest(shared)[:8]}"].append(trial)
    return {name: sorted(members, key=lambda t: (t.created, t.digest)) for name, members in found.items()}


def to_t4(trials: list[TrialRecord]) -> dict[str, Any]:
    """The results document of one group, with the metadata document's content beside it."""
    first = trials[0]
    versions = {name: first.fingerprint[name] for name in ("torch", "triton") if name in first.fingerprint}
    return {
        "schema_version": T4_VERSION,
        "metadata": {
            "hardware": {"hardware_description": [{name: first.fingerprint[name] for name in ("gpu", "capability")}]},
            "environment": {
                "device_query": first.fingerprint,
                "requirements": [f"{name}=={version}" for name, version in versions.items()],
            },
            "kernel": first.family,
            "template_digest": first.template_digest,
            "problem": first.problem,
            "policy": first.policy,
            "times_recorded_as_0": list(NOT_RECORDED),  # as is a compilation time that a trial does not tell
        },
        "results": [_result(trial) for trial in trials],
    }


def _result(trial: TrialRecord) -> dict[str, Any]:
    invalidity = INVALIDITY[trial.status]
    compile_ms = (trial.resources or {}).get("compile_ms", 0.0)
    return {
        "timestamp": trial.created,
        "configuration": trial.config,
        "times": {
            "compilation_time": compile_ms if isinstance(compile_ms, int | float) else 0.0,
            "runtimes": [sample / 1e3 for sample in trial.samples_us],
            **dict.fromkeys(NOT_RECORDED, 0.0),
        },
        "invalidity": invalidity,
        "correctness": float(invalidity == "correct"),
        "measurements": [*_times(trial), *_facts(trial)],
        "objectives": ["time"],
    }


def _times(trial: TrialRecord) -> list[dict[str, Any]]:
    values = {name: getattr(trial, field) for name, field in MEASURED_US.items()}
    return [{"name": name, "value": us / 1e3, "unit": "ms"} for name, us in values.items() if us is not None]


def _facts(trial: TrialRecord) -> list[dict[str, Any]]:
    """Errors and resources, as far as they are numbers or text; the stage and reason say what kind of result it is."""
    facts: dict[str, Any] = {"stage": trial.stage, "reason": trial.reason}
    facts |= {"max_error": trial.max_error, "baseline_error": trial.baseline_error, **(trial.resources or {})}
    return [
        {"name": name, "value": value, "unit": UNITS.get(name, "")}
        for name, value in sorted(facts.items())
        if value is not None and not isinstance(value, bool)
    ]
