"""Claim: a problem that is tuned again gets the same winner, or one that was tied with it; the GPU seldom waits.

Tunes one problem of each family --retunes times, each time from another seed into a database that is empty or, with
--known, holds what ships of other problems, and writes `results/<date>-<gpu>-tuner.md` (`-tuner-known`) and `.json`:
how often the winner was the usual one or tied with it, how far apart the winners' times are, what a run took, and how
long the GPU waited for compilers meanwhile. With --replay the problems are those of recorded spaces, and no GPU is
needed (`-tuner-replayed`); drift between runs is not met then.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from forward import RESULTS, gpu_slug, positive, results_folder, without_places, write_page

from nsa_autotune.bench.worker import MeasureWorker
from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, choose_specs, split
from nsa_autotune.cli.replay import load_spaces
from nsa_autotune.cores import usable_cores
from nsa_autotune.db.records import WinnerRecord, utc_now
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.errors import NSAError
from nsa_autotune.search.ahead import code_of, compile_ahead
from nsa_autotune.search.budget import Budget, parse_budget
from nsa_autotune.search.presets import tuning_problems
from nsa_autotune.search.progress import Effort, NullProgress, Outcome
from nsa_autotune.search.recorded import RecordedSpace
from nsa_autotune.search.replay import ReplayClock, ReplayMeasurer, ReplayPreparer
from nsa_autotune.search.space import config_key
from nsa_autotune.search.tuner import tune_problem
from nsa_autotune.spec import Config, KernelSpec, Problem

BAR = 0.95  # of the runs that must agree
COLUMNS = (
    "family",
    "problem",
    "runs",
    "agree",
    "by the first",
    "winners",
    "median us",
    "worst / best",
    "s a run",
    "trials/s",
    "waited",
)


@dataclass(frozen=True)
class Run:
    """One tuning: what won, what was tied with it, its time, and what it took."""

    config: Config
    tied: tuple[Config, ...]
    median_us: float
    effort: Effort
    codes: dict[str, str] = field(default_factory=dict)  # of these configs: identity of machine code and grid

    def code(self, config: Config) -> str:
        """Equal for configs that run the same machine code on the same grid."""
        return self.codes.get(config_key(config), config_key(config))

    @property
    def accepted(self) -> frozenset[str]:
        """Codes of the winner and its stored ties."""
        return frozenset(self.code(config) for config in (self.config, *self.tied))


@dataclass(frozen=True)
class Repeated:
    """All tunings of one problem."""

    family: str
    problem: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def usual(self) -> int:
        """The first run that chose what most runs chose."""
        codes = [run.code(run.config) for run in self.runs]
        return codes.index(Counter(codes).most_common(1)[0][0])

    def agreeing(self, with_run: int) -> int:
        """Runs of which this one's winner is the winner, or tied with it by the race of either."""
        base = self.runs[with_run]
        return sum(run.code(run.config) in base.accepted or base.code(base.config) in run.accepted for run in self.runs)

    @property
    def agrees(self) -> bool:
        """True if at least 95 % of the runs agree with the usual one: 19 of 20."""
        return self.agreeing(self.usual) >= math.ceil(BAR * len(self.runs) - 1e-9)


def repeat(tune: Callable[[int], Run | None], runs: int, family: str, problem: Problem) -> Repeated:
    """Tune from seeds 0, 1, ...; a run without a winner ends it."""
    found: list[Run] = []
    for seed in range(runs):
        run = tune(seed)
        if run is None:
            raise NSAError(f"{family}: no config works", {"seed": seed}, "See `nsa-autotune tune`.")
        found.append(run)
    return Repeated(family, problem.to_dict(), tuple(found))


class _Last(NullProgress):
    """Keeps how a tuning ended."""

    outcome: Outcome | None = None

    def finish(self, outcome: Outcome) -> None:
        """Keep it."""
        self.outcome = outcome


def winners_elsewhere(spec: KernelSpec, problem: Problem) -> list[WinnerRecord]:
    """What ships of the family's other problems, of all GPUs."""
    own = spec.problem_key(problem)
    with TuningStore("sqlite://") as store:
        winners = store.winners(family=spec.family)
    return [winner for winner in winners if spec.problem_key(Problem.from_dict(winner.problem)) != own]


def tune_once(
    spec: KernelSpec, problem: Problem, seed: int, budget: Budget, known: Sequence[WinnerRecord], **how: Any
) -> Run | None:
    """One tuning into a database of the known winners; `how` is the measurer, the preparer and the fingerprint."""
    last = _Last()
    with TuningStore("sqlite://", import_shipped=False) as store:
        for record in known:
            store.set_winner(record)
        winner = tune_problem(spec, problem, store=store, budget=budget, seed=seed, progress=last, **how)
        trials = store.trials(family=spec.family)
    if winner is None or last.outcome is None:
        return None
    named = {config_key(config) for config in (winner.config, *winner.tied)}
    codes = {config_key(t.config): code_of(t.resources or {}) for t in trials if config_key(t.config) in named}
    told = {key: code for key, code in codes.items() if code}
    return Run(winner.config, tuple(winner.tied), winner.median_us, last.outcome.effort, told)


def row(repeated: Repeated) -> tuple[str, ...]:
    """One line of the table."""
    times = [run.median_us for run in repeated.runs]
    effort = sum((run.effort for run in repeated.runs), Effort())
    problem = Problem.from_dict(repeated.problem)
    return (
        repeated.family,
        f"T {problem.seq_k}, HQ {problem.num_q_heads}, H {problem.num_kv_heads}, d {problem.d_qk}/{problem.d_v}",
        str(len(times)),
        f"{repeated.agreeing(repeated.usual)} of {len(times)}" + ("" if repeated.agrees else " (missed)"),
        str(repeated.agreeing(0)),
        str(len({run.code(run.config) for run in repeated.runs})),
        f"{median(times):.1f}",
        f"{max(times) / min(times):.3f}",
        f"{effort.seconds / len(times):.1f}",
        f"{effort.trials / effort.seconds:.1f}",
        f"{effort.waited_seconds / effort.seconds:.0%}",
    )


def page(found: Sequence[Repeated], facts: dict[str, str], command: str, budget: str) -> str:
    """The dated page."""
    lines = [
        f"# Tuning again and again on {facts['gpu']}, {facts['date']}",
        "",
        f"`{command}`; budget of a run: {budget}.",
        "; ".join(f"{name} {value}" for name, value in facts.items() if name not in ("gpu", "date")) + ".",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row(repeated)) + " |" for repeated in found),
        "",
        "agree: runs whose winner is what most runs chose, or was tied with it by the race of either; by the first:",
        "the same, beside the first run. winners: different ones. Configs that run the same machine code on the same",
        "grid are one. worst / best: of the winners' medians, each from a race of its own. waited: share of a run in",
        "which nothing was ready to be measured. The first run compiles what later ones find in Triton's cache.",
    ]
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace) -> tuple[list[Repeated], dict[str, str], Budget]:
    """Tune everything on the device."""
    here, budget = current(options.device), parse_budget(options.budget)
    specs = choose_specs(split([options.families or "win_attn_fwd"]))
    problems = list(ProblemChoice(options.preset, options.seq).problems(options.preset))
    found = []
    with MeasureWorker(options.device) as worker, compile_ahead(here.capability, options.jobs) as preparer:
        for spec, problem in [(s, part) for whole in problems for s in specs for part in tuning_problems(s, whole)]:
            how = {"measurer": worker, "preparer": preparer, "fingerprint": here.to_dict()}
            how |= {"known": winners_elsewhere(spec, problem) if options.known else ()}

            def tune(seed: int, spec: KernelSpec = spec, problem: Problem = problem, how: Any = how) -> Run | None:
                run = tune_once(spec, problem, seed, budget, **how)
                errors().print(f"{spec.family} run {seed + 1}: {run.median_us if run else None} us", markup=False)
                return run

            found.append(repeat(tune, options.retunes, spec.family, problem))
    return found, {**here.to_dict(), "date": utc_now()[:10]}, budget


def replayed(options: argparse.Namespace) -> tuple[list[Repeated], dict[str, str], Budget]:
    """Tune every recorded space; the seconds of a run are those of the machine at hand."""
    budget, found = parse_budget(options.budget), []
    spaces = load_spaces([options.replay], None, split([options.families]), None)
    for space in spaces:
        known = winners_elsewhere(space.family, space.problem) if options.known else ()

        def tune(seed: int, space: RecordedSpace = space, known: Sequence[WinnerRecord] = known) -> Run | None:
            clock = ReplayClock()
            how: dict[str, Any] = {"measurer": ReplayMeasurer(space, seed, clock)}
            how |= {
                "preparer": ReplayPreparer(space, clock),
                "known": known,
                "fingerprint": space.fingerprint,
                "clock": clock,
                "digest_of": lambda _: space.template_digest,
            }
            return tune_once(space.spec, space.problem, seed, budget, **how)

        found.append(repeat(tune, options.retunes, space.family.family, space.problem))
        errors().print(" | ".join(row(found[-1])[:6]), markup=False)
    return found, {**spaces[0].fingerprint, "date": utc_now()[:10]}, budget


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; 0 if every problem's runs agree, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gqa16-d128")
    parser.add_argument("--seq", default="8k")
    parser.add_argument("--families", default="", help="win_attn_fwd if none, with --replay all of the file")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="an export with the trials of whole spaces")
    parser.add_argument("--known", action="store_true", help="with the winners that ship of other problems, not empty")
    parser.add_argument("--retunes", type=positive, default=20)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--jobs", type=positive, default=usable_cores())
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
    try:
        found, facts, budget = replayed(options) if options.replay else measure(options)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    command = shlex.join(["python", "benchmarks/tuner.py", *without_places(arguments)])
    text = page(found, facts, command, str(budget))
    print(text)
    data = json.dumps({"facts": facts, "command": command, "runs": [asdict(r) for r in found]}, indent=1)
    kind = ("-replayed" if options.replay else "") + ("-known" if options.known else "")
    stem = f"{facts['date']}-{gpu_slug(facts['gpu'])}-tuner{kind}"
    for path in write_page(options.folder / stem, text, data + "\n"):
        print(path)
    return int(not agree(found))


def agree(found: Iterable[Repeated]) -> bool:
    """True if the runs of every problem agree."""
    return all(repeated.agrees for repeated in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
