"""The run behind `nsa-autotune recertify`: one stale winner after the other, then a table of how each ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..codegen.target import target_of_capability
from ..errors import StoreError
from ..spec import KernelSpec, Problem
from .console import errors, make_table, output, problem_text
from .recertify_compile import find_compiler, jobs_of
from .tune_report import verdict_text
from .tune_run import EXIT_INTERRUPTED, EXIT_NO_WINNER

if TYPE_CHECKING:
    from ..bench.worker import MeasureWorker
    from ..db.records import WinnerRecord
    from ..db.store import TuningStore
    from ..search.ahead import Preparer
    from ..search.budget import Budget
    from ..search.drift import Stale
    from ..search.progress import Outcome
    from ..search.recertify import Loss, Recertified, Search
    from ..search.task import Task
    from .progress import TuneDisplay

NOTHING_STALE = "nothing is stale"
WORDS = {"carried": "carried", "kept": "raced: kept", "replaced": "raced: replaced", "failed": "no config works"}


@dataclass(frozen=True)
class Run:
    """What one command is to do."""

    families: tuple[str, ...]
    budget: Budget | None  # of a search after a real loss; None only reports
    db: str | None
    device: str
    target: str | None  # None is the GPU at hand
    gpu: str  # part of the names of GPUs, with a target
    jobs: int


@dataclass(frozen=True)
class Present:
    """What winners have to agree with: fields of the fingerprint, and each family's template."""

    here: dict[str, str]
    specs: Mapping[str, KernelSpec]
    digests: Mapping[str, str]


def execute(run: Run) -> int:
    """Recertify on the device with a live display and print how each winner ended, also after Ctrl-C; the exit code."""
    from ..codegen.load import require_caches
    from ..db.store import TuningStore
    from .progress import TuneDisplay

    interrupted = False
    done: list[Recertified] = []
    require_caches()
    with TuningStore(run.db, must_exist=True) as store:
        if store.read_only:
            values = {"database": str(store.location)}
            raise StoreError("recertifying needs a database that can be written", values, "Name another with --db.")
        present = find_present(run)
        stale = find_stale(run, store, present)
        display = TuneDisplay(errors(), len(stale))
        try:
            with display:
                measure(run, store, display, present, stale, done)
        except KeyboardInterrupt:
            interrupted = True
        print_endings(done)
        if interrupted:
            text = f"stopped; everything measured is kept in {store.location}; the same command resumes"
            errors().print(text, style="yellow", markup=False, soft_wrap=True)
            return EXIT_INTERRUPTED
    return EXIT_NO_WINNER if any(item.winner is None for item in done) else 0


def forecast(run: Run) -> int:
    """Compile, and print what would carry over and what would race; nothing is measured or stored."""
    from ..db.store import TuningStore
    from ..search import recertify
    from .progress import TuneDisplay

    rows: list[tuple[object, ...]] = []
    with TuningStore(run.db, must_exist=True) as store:
        present = find_present(run)
        stale = find_stale(run, store, present)
        target = run.target or target_of_capability(present.here["capability"])
        display = TuneDisplay(errors(), len(stale))
        compiler = find_compiler(target, run.jobs, jobs_of(stale, present.specs, store), display.say)
        try:
            with display:
                for item in stale:
                    useful = compiler if recertify.is_recorded(item, store) else None
                    compiled = recertify.compile_candidates(item, present.specs[item.winner.family], store, useful)
                    machine = item.winner.fingerprint["gpu"]
                    told = (item.reason, recertify.forecast(compiled), item.winner.median_us)
                    rows.append((*_head(item.winner), machine, *told))
        except KeyboardInterrupt:
            errors().print("stopped; what was compiled is kept in Triton's cache", style="yellow", soft_wrap=True)
            return EXIT_INTERRUPTED
    if not rows:
        output().print(NOTHING_STALE)
        return 0
    columns = ("family", "problem", "GPU", "changed", "what would happen", "then us")
    output().print(make_table("stale winners; nothing was measured", columns, rows, ("then us",), ("then us", "GPU")))
    return 0


def find_present(run: Run) -> Present:
    """The fingerprint of the GPU at hand, or for a target what decides on machine code, and the templates."""
    from ..codegen.render import template_digest
    from ..dispatch.fingerprint import compilers, current
    from ..kernels import all_specs

    here = current(run.device).to_dict() if run.target is None else compilers(run.target)
    specs = {family: spec for family, spec in all_specs().items() if family in run.families}
    return Present(here, specs, {family: template_digest(spec) for family, spec in specs.items()})


def find_stale(run: Run, store: TuningStore, present: Present) -> list[Stale]:
    """The stale winners of the GPU at hand, or of the target's GPUs."""
    from ..search.drift import stale_winners

    if run.target is None:
        winners = store.winners(gpu=present.here["gpu"])
    else:
        arch = run.target.split(":")[1]
        winners = store.winners(capability=f"{arch[:-1]}.{arch[-1]}")
        winners = [winner for winner in winners if run.gpu.lower() in winner.fingerprint["gpu"].lower()]
    return stale_winners(winners, present.here, present.specs, present.digests)


def measure(
    run: Run, store: TuningStore, display: TuneDisplay, present: Present, stale: list[Stale], done: list[Recertified]
) -> None:
    """Recertify all, one policy after the other; what is done is appended to `done`."""
    from ..bench.worker import MeasureWorker
    from ..search.ahead import compile_ahead
    from ..search.recertify import recertify_winner

    capability = present.here["capability"]
    ahead = jobs_of(stale, present.specs, store)
    compiler = find_compiler(target_of_capability(capability), run.jobs, ahead, display.say)
    if compiler is None:
        display.note(f"nothing can be compiled ahead for capability {capability}: every stale winner races")
    waiting = [winner.policy for winner in _unconfirmed(store, present)]
    for policy in dict.fromkeys([*(item.winner.policy for item in stale), *waiting]):
        with (
            MeasureWorker(run.device, policy=policy) as worker,
            compile_ahead(capability, run.jobs) as preparer,
        ):
            search = make_search(run, worker, store, display, present, preparer)
            for item in (item for item in stale if item.winner.policy == policy):
                number = len(done)
                display.say(f"{number + 1}/{len(stale)} {_text(item.winner)}")
                task = _task(item.winner, present)
                found = recertify_winner(item, task, measurer=worker, store=store, compiler=compiler, search=search)
                done.append(found)
                display.outcomes[number:] = [_outcome(found, task.spec, task.problem)]
                display.note(f"{_text(item.winner)}: {ending_text(found)}")
            confirm(worker, store, display, present, done)


def make_search(
    run: Run, worker: MeasureWorker, store: TuningStore, display: TuneDisplay, present: Present, preparer: Preparer
) -> Search | None:
    """Tunes a problem anew within the run's budget; None if losses are only reported."""
    from ..search.tuner import tune_problem

    budget = run.budget
    if budget is None:
        return None

    def search(spec: KernelSpec, problem: Problem) -> WinnerRecord | None:
        return tune_problem(
            spec,
            problem,
            measurer=worker,
            store=store,
            fingerprint=present.here,
            budget=budget,
            progress=display,
            preparer=preparer,
        )

    return search


def confirm(
    worker: MeasureWorker, store: TuningStore, display: TuneDisplay, present: Present, done: list[Recertified]
) -> None:
    """Race provisional winners that stand in for stale ones again, in a new process."""
    from ..search.confirm import confirm_winner

    waiting = [winner for winner in _unconfirmed(store, present) if winner.policy == worker.policy]
    if waiting:
        worker.renew()
    for winner in waiting:
        display.say(f"confirming {_text(winner)}")
        confirmed = confirm_winner(_task(winner, present), measurer=worker, store=store)
        for number, item in enumerate(done):
            if item.winner is not None and item.winner.digest == winner.digest:
                done[number] = replace(item, winner=confirmed)


def print_endings(done: Sequence[Recertified]) -> None:
    """The table of what became of each stale winner."""
    if not done:
        output().print(NOTHING_STALE)
        return
    rows = [_row(item) for item in done]
    columns = ("family", "problem", "changed", "ending", "verdict", "then us", "now us", "loss")
    numbers = ("then us", "now us", "loss")
    output().print(make_table("recertified winners", columns, rows, numbers, ("verdict", "then us", "changed")))
    lost = [item for item in done if item.loss is not None and item.loss.is_real]
    unsearched = ",".join(dict.fromkeys(item.stale.winner.family for item in lost if not item.searched))
    if unsearched:
        text = f"over 3 % were lost: nsa-autotune tune --retune --families {unsearched} searches anew"
        errors().print(text, style="yellow", markup=False, soft_wrap=True)


def ending_text(item: Recertified) -> str:
    """How one stale winner ended, with what was lost if that is more than noise."""
    parts = [WORDS[item.ending]]
    if item.loss is not None and item.loss.is_real:
        parts.append(f"lost {loss_text(item.loss)}")
    return ", ".join([*parts, *(["searched anew"] if item.searched else [])])


def loss_text(loss: Loss) -> str:
    """The larger of both losses in percent, or that the old winner does not work any more."""
    if math.isinf(loss.overtaken):
        return "the old winner"
    return f"{100 * math.expm1(max(loss.slower, loss.overtaken)):.1f}%"


def _row(item: Recertified) -> tuple[object, ...]:
    winner, measured = item.winner, item.ending != "carried"
    lost = loss_text(item.loss) if item.loss is not None and item.loss.is_real else ""
    ending = WORDS[item.ending] + (", searched" if item.searched else "")
    now_us = winner.median_us if winner is not None and measured else None
    verdict = verdict_text(winner) if winner is not None else ""
    return (*_head(item.stale.winner), item.stale.reason, ending, verdict, item.stale.winner.median_us, now_us, lost)


def _head(winner: WinnerRecord) -> tuple[str, str]:
    return winner.family, problem_text(winner.problem, winner.family)


def _text(winner: WinnerRecord) -> str:
    return " ".join(_head(winner))


def _task(winner: WinnerRecord, present: Present) -> Task:
    """A winner's problem under the present fingerprint and template."""
    from ..search.task import Task

    spec, problem = present.specs[winner.family], Problem.from_dict(winner.problem)
    return Task(spec, problem, present.here, present.digests[winner.family], winner.policy)


def _outcome(found: Recertified, spec: KernelSpec, problem: Problem) -> Outcome:
    """For the display, which counts problems by their outcomes."""
    from ..search.progress import Outcome

    return Outcome("failed" if found.winner is None else "tuned", spec, problem, found.winner)


def _unconfirmed(store: TuningStore, present: Present) -> list[WinnerRecord]:
    from ..search.recertify import unconfirmed

    winners = [w for w in store.winners(gpu=present.here["gpu"]) if w.family in present.specs]
    return unconfirmed(winners, present.here, present.digests)
