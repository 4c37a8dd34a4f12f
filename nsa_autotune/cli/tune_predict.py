"""How `tune --target` predicts: problem after problem, each claimed, so that no other process compiles it too."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..codegen.render import template_digest
from ..db.claims import Unit
from ..db.shared import SharedStore
from ..dispatch.fingerprint import for_target
from ..errors import ClaimLost
from ..search.budget import Budget, Meter
from ..search.lease import Lease, unit_of
from ..search.task import Task
from .console import problem_text
from .tune_measure import LOOK_AGAIN_S, left_text, waiting_text
from .tune_report import Guess
from .tune_run import Run, share

if TYPE_CHECKING:
    from ..search.ranking import Prediction
    from ..spec import KernelSpec, Problem
    from .progress import TuneDisplay

Part = tuple[str, "KernelSpec", "Problem"]  # target first


def predict(run: Run, store: SharedStore, display: TuneDisplay, guesses: list[Guess]) -> None:
    """Rank every problem's configs for each absent GPU; what is found is appended to `guesses`."""
    left: list[Part] = [(target, *work) for target in run.targets for work in run.work]
    meter = Meter(run.budget)
    with Lease(store, since_s=store.now_s()) as lease:
        while left:
            busy: list[Part] = []
            for number, part in enumerate(left):
                to_do = len(left) - number + len(busy)
                if not _try(part, share(run.budget, meter.minutes, to_do), run, store, display, lease, guesses):
                    busy.append(part)
            if len(busy) == len(left):
                if run.budget.max_minutes is not None and meter.minutes >= run.budget.max_minutes:
                    display.note(left_text(len(left)))
                    return
                display.say(waiting_text(len(busy)))
                time.sleep(LOOK_AGAIN_S)
            left = busy


def unit_for(part: Part) -> Unit:
    """What is claimed: the problem to the token, since predictions are not shared in a bucket."""
    target, spec, problem = part
    unit = unit_of(Task(spec, problem, for_target(target).to_dict(), template_digest(spec)))
    return replace(unit, problem_key=spec.problem_key(problem, bucket=False))


def _try(
    part: Part,
    budget: Budget,
    run: Run,
    store: SharedStore,
    display: TuneDisplay,
    lease: Lease,
    guesses: list[Guess],
) -> bool:
    """Predict a part, or show what another process predicted; False if another one is at it."""
    from ..search.predict import stored_predictions

    target, spec, problem = part
    unit = unit_for(part)
    state = lease.take(unit)
    if state == "busy":
        return False
    if state == "done":
        ranked = stored_predictions(spec, problem, target=target, store=store)
        guesses.append(Guess(target, spec, problem, ranked))
        text = problem_text(problem.to_dict(), spec.family)
        display.note(f"{spec.family}  {text}: predicted for {target} by another process")
        return True
    if len(run.targets) > 1:
        display.note(f"for {target}:")
    try:
        with lease.working(unit):
            guesses.append(Guess(target, spec, problem, _predict(part, budget, run, store, display)))
    except ClaimLost as error:
        display.note(str(error))
        return False
    except KeyboardInterrupt:
        ranked = stored_predictions(spec, problem, target=target, store=store)
        if ranked:
            guesses.append(Guess(target, spec, problem, ranked))
        raise
    return True


def _predict(part: Part, budget: Budget, run: Run, store: SharedStore, display: TuneDisplay) -> list[Prediction]:
    from ..search.predict import predict_problem

    target, spec, problem = part
    return predict_problem(
        spec, problem, target=target, store=store, budget=budget, progress=display, processes=run.jobs
    )
