"""Golden files: rendered variants of all structures, compared byte for byte: a review sees what a change does."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..files import write_atomic
from ..spec import Config, KernelSpec, Problem, Value
from .load import source_path
from .paths import CHECKOUT
from .render import render

GOLDEN_DIR = CHECKOUT / "kernels_generated" / "golden"
WINNERS_DIR = CHECKOUT / "kernels_generated" / "winners"
PROBLEMS = {
    "batched": Problem(),
    "packed": Problem(batch=4, layout="packed"),
    "d192_128": Problem(d_qk=192, d_v=128),
    "paged": Problem(batch=8, seq_q=1, layout="paged"),
    "paged_fp8": Problem(batch=8, seq_q=1, layout="paged", cache_dtype="float8_e4m3fn"),
}
ALL_STRUCTURES = ("batched", "paged")  # of these problems, the default's of the others


def structural_configs(spec: KernelSpec, problem: Problem) -> Iterator[Config]:
    """Few legal configs near the default in which each two structural switches take all values that they can together.

    Pairs, since combinations of all switches double with each new one; the configs with the most new pairs go first.
    """
    legal = [(config, _pairs(spec, config)) for config in all_structures(spec, problem)]
    left = set().union(*(pairs for _, pairs in legal))
    while left:
        config, pairs = max(legal, key=lambda each: len(each[1] & left))  # the first of equals: near the default
        left -= pairs
        yield config


def _pairs(spec: KernelSpec, config: Config) -> set[tuple[tuple[str, Value], ...]]:
    """The values of each two structural switches; of the only one, or none."""
    chosen = [(param.name, config[param.name]) for param in spec.params if param.structural]
    return set(itertools.combinations(chosen, min(2, len(chosen))))


def all_structures(spec: KernelSpec, problem: Problem) -> Iterator[Config]:
    """One legal config for each legal combination of the structural switches, as near to the default as can be."""
    default = spec.default_config(problem)
    switches = [param for param in spec.params if param.structural]
    others = [param for param in spec.params if not param.structural]
    for values in itertools.product(*(param.values for param in switches)):
        config = {**default, **{param.name: value for param, value in zip(switches, values, strict=True)}}
        if spec.broken_constraint(problem, config) is None:
            yield config
            continue
        for param in others:  # one other value away: query-major and union need different tiles
            near = ({**config, param.name: value} for value in param.values)
            fitting = next((c for c in near if spec.broken_constraint(problem, c) is None), None)
            if fitting is not None:
                yield fitting
                break


def golden_sources(specs: Iterable[KernelSpec]) -> dict[str, str]:
    """File name to source: the structures of the plain problem, the default's for the others."""
    sources: dict[str, str] = {}
    for spec in specs:
        for label, problem in PROBLEMS.items():
            if problem.layout not in spec.layouts:
                continue
            configs = structural_configs(spec, problem) if label in ALL_STRUCTURES else [spec.default_config(problem)]
            for config in configs:
                name = "__".join([spec.family, label, *_switches(spec, config)])
                sources[f"{name}.py"] = render(spec, problem, config).source
    return sources


def _switches(spec: KernelSpec, config: Config) -> list[str]:
    """The structural values that are on, as parts of a file name."""
    values = [(param.name, config[param.name]) for param in spec.params if param.structural]
    return [name if value is True else str(value) for name, value in values if value is not False]


def check_goldens(specs: Iterable[KernelSpec], folder: Path = GOLDEN_DIR) -> list[str]:
    """Differences between the golden files and what the templates render now; empty if there are none."""
    wanted = golden_sources(specs)
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} belongs to no structure" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            lines = difflib.unified_diff(
                found[name].splitlines(), wanted[name].splitlines(), name, "now", lineterm="", n=1
            )
            problems.append("\n".join(itertools.islice(lines, 12)))
    return problems


def write_goldens(specs: Iterable[KernelSpec], folder: Path = GOLDEN_DIR) -> list[Path]:
    """Write what the templates render now; files of structures that are gone are removed."""
    wanted = golden_sources(specs)
    for path in folder.glob("*.py"):
        if path.name not in wanted:
            path.unlink()
    for name, source in wanted.items():
        write_atomic(folder / name, source)
    return [folder / name for name in wanted]


def write_winner(spec: KernelSpec, problem: Problem, config: Config, arch: str, folder: Path = WINNERS_DIR) -> Path:
    """A readable copy of a served variant: `winners/<arch>/<family>__<digest>.py`."""
    rendered = render(spec, problem, config)
    path = source_path(rendered, folder / arch)
    write_atomic(path, rendered.source)
    return path
