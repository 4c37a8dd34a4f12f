"""Spec, problem and config to source text; knows no kernel."""

from __future__ import annotations

import ast
import hashlib
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import jinja2.meta

from ..errors import RenderError
from ..spec import Config, KernelSpec, Problem, Value, canonical_json
from .linemap import LineMarks, Origin, strip_marks, take_marks
from .paths import template_dir

COMPILE_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


@dataclass(frozen=True)
class Rendered:
    """One variant's source, the origin of its lines, and its digests."""

    family: str
    source: str
    line_map: list[Origin | None]
    digest: str
    template_digest: str


def _emit(text: str, indent: int = 0) -> str:
    """Drop the text's last newline and indent all lines but the first, which the template indents itself."""
    lines = text.strip("\n").split("\n")
    space = " " * indent
    return "\n".join([lines[0], *(space + line if strip_marks(line).strip() else "" for line in lines[1:])])


def _literal(value: Value) -> str:
    """A Python literal, strings in double quotes."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=[LineMarks],
    )
    environment.filters["emit"] = _emit
    environment.filters["literal"] = _literal
    return environment


@cache
def _digest_of(folder: Path, template: str) -> str:
    content = hashlib.sha256()
    for name in _sources_of(folder, template):
        content.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return content.hexdigest()[:20]


def _sources_of(folder: Path, template: str) -> list[str]:
    """The template and every file it imports, directly or through another, each once."""
    names = [template]
    for name in names:  # grows while it is walked
        names += sorted(_imports_of(folder, name) - set(names))
    return names


@cache
def _imports_of(folder: Path, template: str) -> frozenset[str]:
    """The files that a template names; kept, since most families import the same ones."""
    tree = _environment(folder).parse((folder / template).read_text(encoding="utf-8"), template)
    return frozenset(found for found in jinja2.meta.find_referenced_templates(tree) if found)


def template_digest(spec: KernelSpec) -> str:
    """Digest of a family's template and of the macro files it imports: a change elsewhere makes no winner stale."""
    try:
        return _digest_of(template_dir(), spec.template)
    except OSError as error:
        raise RenderError("a family needs its template", {"file": error.filename}, "Reinstall nsa_autotune.") from error
    except jinja2.TemplateError as error:
        raise RenderError(f"{spec.family} does not render: {error.message}", _where(error, spec.template)) from error


def _where(error: jinja2.TemplateError, template: str) -> dict[str, object]:
    """Template and line of an error: its own, or the innermost template frame of its traceback."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"template": error.name or template, "line": error.lineno}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
    if not frames:
        return {"template": template}
    return {"template": Path(frames[-1].filename).name, "line": frames[-1].lineno}


def compile_options(config: Config) -> dict[str, Value]:
    """The part of a config that Triton's compiler takes; maxnreg=0 means no cap."""
    return {name: config[name] for name in COMPILE_OPTIONS if config.get(name)}


def render(spec: KernelSpec, problem: Problem, config: Config) -> Rendered:
    """Source of the variant (problem, config); raises InvalidProblem, InvalidConfig or RenderError."""
    spec.check_problem(problem)
    spec.check_config(problem, config)
    structure, constants = spec.structure(problem, config), spec.constants(problem, config)
    templates_digest = template_digest(spec)
    variant_digest = spec.variant_digest(problem, config, templates_digest)
    switches = {name: value for name, value in structure.items() if not name.endswith("chunks")}
    try:
        text = (
            _environment(template_dir())
            .get_template(spec.template)
            .render(
                **structure,
                template=spec.template,
                template_digest=templates_digest,
                variant_digest=variant_digest,
                problem_json=canonical_json({**switches, **constants}),
                config_json=canonical_json(config),
                constants=constants,
                options=compile_options(config),
                config={param.name: config[param.name] for param in spec.params},  # in one order always
            )
        )
    except jinja2.TemplateError as error:
        raise RenderError(f"{spec.family} does not render: {error.message}", _where(error, spec.template)) from error
    source, line_map = take_marks(text)
    try:
        ast.parse(source)
    except SyntaxError as error:
        origin = line_map[(error.lineno or 1) - 1]
        raise RenderError(f"{spec.family} renders to invalid Python: {error.msg}", {"template line": origin}) from error
    return Rendered(spec.family, source, line_map, variant_digest, templates_digest)
