"""`nsa-autotune ship`: the winners of one GPU as a package of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UnknownName
from ..spec import KernelSpec
from . import options
from .console import count_text, errors, output

if TYPE_CHECKING:
    from ..db import WinnerRecord


def ship(
    gpu: Annotated[str, typer.Option("--gpu", help="The GPU whose winners are shipped; a part of its name will do.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the package; `pip install` it.")],
    name: Annotated[str, typer.Option("--name", help="What is imported; nsa_tuned_<gpu> if none.")] = "",
    families: Annotated[
        list[str] | None, typer.Option("--families", help="Kernels to ship; all of them if none, which a model needs.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Winners for this named problem only.")] = None,
    seq: Annotated[str, typer.Option("--seq", help="Winners for these lengths only, such as 8k,64k.")] = "",
    problem: Annotated[
        list[str] | None, typer.Option("--problem", help="Winners with this value, such as d_qk=128; repeatable.")
    ] = None,
    aot: Annotated[
        list[str] | None,
        typer.Option("--aot", help="Add binaries for these targets, such as cuda:90: it starts without compiling."),
    ] = None,
    db: options.DbOption = None,
) -> None:
    """Write a pip-installable package of the tuned module, which needs torch and triton only."""
    from ..db import TuningStore
    from ..search.presets import tuning_problems
    from ..ship.package import Order, make_package
    from .db import problem_filter

    chosen = options.split(families, "--families")
    order = Order(
        gpu=gpu,
        wanted=_filter(preset, seq, problem_filter(options.assignments(problem, "--problem"))),
        problems_of=tuning_problems,
        families=tuple(spec.family for spec in options.choose_specs(chosen)) if chosen else (),
        name=name,
        targets=tuple(options.split(aot, "--aot")),
    )
    messages = errors()

    def report(text: str) -> None:
        messages.print(f"no binary: {text}", markup=False, soft_wrap=True)

    if order.targets:
        text = f"compiling every kernel for {', '.join(order.targets)}: a second or a few each"
        messages.print(text, markup=False, soft_wrap=True)
    with TuningStore(db, must_exist=True) as store:
        made = make_package(store, order, out, report)
    if made.stale:
        left_out = count_text(made.stale, "winner of a changed template is", "winners of changed templates are")
        messages.print(f"{left_out} left out", markup=False)
    if made.untuned:
        text = f"no winner of {made.gpu} for {', '.join(made.untuned)}: the default config is shipped"
        messages.print(text, markup=False, soft_wrap=True)
    if made.foreign:
        text = (
            f"{made.gpu} cannot load the binaries for {', '.join(made.foreign)}; other GPUs may, where they are allowed"
        )
        messages.print(text, markup=False, soft_wrap=True)
    binaries = f", {count_text(made.binaries, 'compiled binary', 'compiled binaries')}" if order.targets else ""
    counts = f"{count_text(made.winners, 'winner')} of {made.gpu}, {count_text(made.kernels, 'kernel')}{binaries}"
    output().print(f"{made.name}: {counts}; pip install {out}", markup=False, soft_wrap=True)


def _filter(preset: str | None, seq: str, fields: dict[str, str]) -> Callable[[KernelSpec, WinnerRecord], bool]:
    """Whether a winner is for one of the problems that the options describe."""
    from ..search.presets import parse_seq_lens, tuning_problems

    problems = options.ProblemChoice(preset=preset, seq=seq).problems(preset) if preset else []
    lengths = parse_seq_lens(seq) if seq else ()
    _check_fields(fields)

    def wanted(spec: KernelSpec, winner: WinnerRecord) -> bool:
        flat = {**winner.problem, **winner.problem["nsa"]}
        if problems:
            keys = {spec.problem_key(served) for p in problems for served in tuning_problems(spec, p)}
            if winner.problem_key not in keys:
                return False
        elif lengths and winner.problem["seq_k"] not in lengths:
            return False
        return all(_same(flat.get(field), text) for field, text in fields.items())

    return wanted


def _check_fields(fields: dict[str, str]) -> None:
    from ..spec import Problem

    known = Problem(layout="paged", seq_q=1).to_dict()  # all fields there are
    known = {**known, **known.pop("nsa")}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UnknownName("a problem has no such field", {"fields": unknown}, f"Fields: {', '.join(sorted(known))}.")


def _same(stored: object, text: str) -> bool:
    """Equal, the text being a number where the stored value is one."""
    if stored is None or isinstance(stored, str):
        return stored == text
    try:
        return float(text) == stored
    except ValueError:
        return False
