"""`nsa-autotune render`: the source of one variant, a family's parameters, or the golden files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidInput
from ..spec import KernelSpec, Problem
from . import options
from .console import errors, make_table, output, write_text


def render(
    family: Annotated[str | None, typer.Option("--family", help="Which kernel; none lists them.")] = None,
    preset: options.PresetOption = None,
    seq: options.SeqOption = "",
    seq_q: options.SeqQOption = None,
    dtype: options.DtypeOption = None,
    batch: options.BatchOption = None,
    heads: options.HeadsOption = None,
    kv_heads: options.KvHeadsOption = None,
    d_qk: options.DqkOption = None,
    d_v: options.DvOption = None,
    phi_hidden: options.PhiHiddenOption = None,
    layout: options.LayoutOption = None,
    page_size: options.PageSizeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    nsa: options.NsaOption = None,
    config: Annotated[list[str] | None, typer.Option("--config", help="A parameter, name=value; repeatable.")] = None,
    params: Annotated[bool, typer.Option("--params", help="Print the parameters and constraints instead.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the source to this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the golden files with what is rendered now.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the golden files anew.")] = False,
) -> None:
    """Render one kernel as plain Python, or check the golden files."""
    if check or write:
        _goldens(write=write)
        return
    if family is None:
        _list_families()
        return
    choice = options.ProblemChoice(
        preset=preset,
        seq=seq,
        dtypes=tuple(options.split(dtype, "--dtype")),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        d_qk=d_qk,
        d_v=d_v,
        layout=layout,
        page_size=page_size,
        cache_dtype=cache_dtype,
        nsa=options.assignments(nsa, "--nsa"),
        phi_hidden=phi_hidden,
        seq_q=seq_q,
    )
    (spec,) = options.choose_specs([family])
    if layout is None and spec.layouts == ("paged",):
        choice = replace(choice, layout="paged")
    problem = choice.problems(default_preset="gqa16-d128")[0]
    if problem.layout not in spec.layouts:
        spec.check_problem(problem)
    if params:
        _print_params(spec, problem)
    else:
        _render_one(spec, problem, options.assignments(config, "--config"), out)


def _render_one(spec: KernelSpec, problem: Problem, changes: dict[str, str], out: Path | None) -> None:
    from ..codegen.render import render as render_source
    from ..search.presets import tuning_problems

    served = tuning_problems(spec, problem)[0]
    rendered = render_source(spec, served, options.choose_config(spec, served, changes))
    if out is None:
        typer.echo(rendered.source, nl=False)
        return
    write_text(out, rendered.source)
    errors().print(f"{out}: {spec.family}, digest {rendered.digest}", markup=False)


def _list_families() -> None:
    from ..kernels import all_specs

    rows = [(family, len(spec.params), spec.template, spec.doc) for family, spec in all_specs().items()]
    output().print(make_table("families", ("family", "parameters", "template", "what it does"), rows, {"parameters"}))


def _print_params(spec: KernelSpec, problem: Problem) -> None:
    from ..search.presets import tuning_problems

    default = spec.default_config(tuning_problems(spec, problem)[0])
    rows = [
        (p.name, " ".join(map(str, p.values)), default[p.name], "lines" if p.structural else "values", p.doc)
        for p in spec.params
    ]
    columns = ("parameter", "values", "default", "changes", "what it does")
    output().print(make_table(f"{spec.family}: {spec.doc}", columns, rows))
    rules = [("config", constraint.reason) for constraint in spec.constraints]
    rules += [("problem", rule.reason) for rule in spec.rules]
    output().print(make_table("what must hold", ("of the", "rule"), rules))


def _goldens(*, write: bool) -> None:
    from ..codegen import golden
    from ..kernels import all_specs

    if not golden.GOLDEN_DIR.is_dir():
        folder = {"folder": str(golden.GOLDEN_DIR)}
        raise InvalidInput("golden files are part of a source checkout", folder, "Run this in one, as in make goldens.")
    specs = all_specs().values()
    if write:
        paths = golden.write_goldens(specs)
        typer.echo(f"{len(paths)} golden files are written; review them with git diff")
        return
    differences = golden.check_goldens(specs)
    for difference in differences:
        errors().print(str(difference), markup=False, soft_wrap=True)
    if differences:
        raise InvalidInput(
            "the golden files must equal what the templates render",
            {"files that differ": len(differences)},
            "If the change is meant, run `nsa-autotune render --write` and review the result.",
        )
    typer.echo("the golden files equal what the templates render")
