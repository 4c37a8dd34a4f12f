"""Configs that a user wants measured first: a file for `nsa-autotune tune --try`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, UnknownName
from ..files import numbered_lines
from ..kernels import get_spec
from ..spec import Config, KernelSpec, Problem

FIELDS = ("family", "config")
REMEDY = 'Write for example {"family": "win_attn_fwd", "config": {"BLOCK_N": 64}}.'

Tries = tuple[tuple[str, Config], ...]  # family and config, which may leave parameters out


def read_tries(path: Path) -> Tries:
    """The lines of a file, in its order; raises InvalidInput with the line of a mistake."""
    numbered = numbered_lines(path, "--try", "configs to try are read from a text file", REMEDY)
    if not numbered:
        raise InvalidInput("the file of --try names no config", {"--try": str(path)}, REMEDY)
    return tuple(_parse(line, {"--try": str(path), "line": number}) for number, line in numbered)


def completed(spec: KernelSpec, problem: Problem, tries: Iterable[tuple[str, Config]]) -> list[Config]:
    """The family's configs, filled up from the default; those that break a constraint of the problem are left out."""
    default = spec.default_config(problem)
    found = [{**default, **config} for family, config in tries if family == spec.family]
    return [config for config in found if spec.broken_constraint(problem, config) is None]


def _parse(line: str, where: Mapping[str, Any]) -> tuple[str, Config]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("a line must be JSON", {**where, "reason": str(error)}, REMEDY) from error
    if not isinstance(data, dict):
        raise InvalidInput("a line must be a JSON object of a family and a config", where, REMEDY)
    differing = {"unknown": sorted(set(data) - set(FIELDS)), "missing": [name for name in FIELDS if name not in data]}
    if any(differing.values()):
        values = {**where, **{what: ", ".join(names) for what, names in differing.items() if names}}
        raise InvalidInput("a line has the keys family and config, and no other", values, REMEDY)
    if not isinstance(data["config"], dict):
        raise InvalidInput("a config must be a JSON object", {**where, "config": data["config"]}, REMEDY)
    try:
        spec = get_spec(data["family"])
    except (UnknownName, TypeError) as error:
        remedy = error.remedy if isinstance(error, UnknownName) else REMEDY
        raise InvalidInput("a line must name a known family", {**where, "family": data["family"]}, remedy) from error
    _check_values(spec, data["config"], where)
    return spec.family, data["config"]


def _check_values(spec: KernelSpec, config: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    params = {param.name: param for param in spec.params}
    for name, value in config.items():
        if name not in params:
            values = {**where, "parameter": name}
            raise InvalidInput(f"{spec.family} has no such parameter", values, f"It has {', '.join(params)}.")
        known = params[name].widest
        if not any(type(value) is type(each) and value == each for each in known):
            values = {**where, name: value}
            raise InvalidInput(f"{spec.family} has no such value", values, f"It may be one of {known}.")
