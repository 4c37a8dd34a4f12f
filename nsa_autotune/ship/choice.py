"""Which winners and kernels a package holds: a decision over records of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..codegen.render import Rendered, render, template_digest
from ..db import WinnerRecord
from ..errors import InvalidConfig, InvalidInput, InvalidProblem, UnknownName
from ..kernels import FUSED, all_specs, get_spec
from ..spec import Config, KernelSpec, Problem

Wanted = Callable[[KernelSpec, WinnerRecord], bool]
ProblemsOf = Callable[[KernelSpec, Problem], Iterable[Problem]]  # as `search.presets.tuning_problems`


@dataclass(frozen=True)
class Chosen:
    """Winners of one GPU whose template is as it was; `stale` counts those left out because theirs changed."""

    gpu: str
    winners: tuple[WinnerRecord, ...]  # one a family, problem key and policy, in pipeline order
    stale: int


@dataclass(frozen=True)
class Kernel:
    """A variant to ship, and the problems that it is shipped for."""

    spec: KernelSpec
    config: Config
    rendered: Rendered
    problems: tuple[Problem, ...]
    is_winner: bool  # False: the default config, served where no winner can


def choose_gpu(names: Iterable[str], part: str) -> str:
    """The GPU with `part` in its name in any case, or with just this name; raises UnknownName or InvalidInput."""
    known = sorted(set(names))
    if part in known:
        return part
    found = [name for name in known if part.lower() in name.lower()]
    if not found or not part:
        remedy = f"GPUs with winners: {', '.join(known) or 'none'}."
        raise UnknownName("no GPU with winners has this in its name", {"--gpu": part}, remedy)
    if len(found) > 1:
        remedy = "A package serves one GPU; write the whole name."
        raise InvalidInput("--gpu fits more than one GPU", {"--gpu": part, "GPUs": found}, remedy)
    return found[0]


def choose_winners(winners: Sequence[WinnerRecord], gpu: str, wanted: Wanted) -> Chosen:
    """The newest wanted winner of every problem on one GPU; raises InvalidInput if there is none."""
    specs = all_specs()
    mine = [w for w in winners if w.fingerprint["gpu"] == gpu and w.family in specs and wanted(specs[w.family], w)]
    current = [w for w in mine if w.template_digest == template_digest(specs[w.family])]
    newest: dict[tuple[str, str, str], WinnerRecord] = {}
    for winner in sorted(current, key=lambda w: (w.created, w.digest)):
        newest[winner.family, winner.problem_key, winner.policy] = winner
    if not newest:
        values = {"gpu": gpu, "wanted winners": len(mine), "of them stale": len(mine) - len(current)}
        remedy = "Look at them with `nsa-autotune db query`; stale ones need `nsa-autotune recertify`."
        if not mine:
            remedy = f"Look at what there is with `nsa-autotune db best --gpu '{gpu}'`, and ask for that."
        raise InvalidInput("a package needs a winner of the present templates", values, remedy)
    order = list(specs)
    ranked = sorted(newest.items(), key=lambda item: (order.index(item[0][0]), item[0]))
    return Chosen(gpu, tuple(winner for _, winner in ranked), len(mine) - len(current))


def choose_kernels(winners: Sequence[WinnerRecord], families: Sequence[str], problems_of: ProblemsOf) -> list[Kernel]:
    """What to ship for the winners: their variants, and the default one of each of `families` for their problems.

    Where a fused family has no winner, its parts serve.
    """
    found: dict[str, Kernel] = {}
    for winner in winners:
        _add(found, get_spec(winner.family), Problem.from_dict(winner.problem), winner.config, is_winner=True)
    for problem in _roots(winners):
        for family in (name for name in families if name not in FUSED):
            spec = get_spec(family)
            for served in problems_of(spec, problem):
                try:
                    config = spec.default_config(served)
                except (InvalidProblem, InvalidConfig):
                    continue  # the family does not serve such a problem, tuned or not
                _add(found, spec, served, config, is_winner=False)
    return sorted(found.values(), key=lambda kernel: (kernel.spec.family, kernel.rendered.digest))


def _add(found: dict[str, Kernel], spec: KernelSpec, problem: Problem, config: Config, *, is_winner: bool) -> None:
    rendered = render(spec, problem, config)
    known = found.get(rendered.digest)
    before, won = ((), False) if known is None else (known.problems, known.is_winner)
    problems = before if problem in before else (*before, problem)
    found[rendered.digest] = Kernel(spec, dict(config), rendered, problems, is_winner or won)


def _roots(winners: Sequence[WinnerRecord]) -> list[Problem]:
    """The winners' problems; those of attention alone if there are any, since they tell of every head."""
    told = {"num_q_heads", "num_kv_heads", "d_qk", "d_v"}
    whole = [w for w in winners if told <= set(get_spec(w.family).problem_fields)]
    return list(dict.fromkeys(Problem.from_dict(w.problem) for w in whole or winners))
