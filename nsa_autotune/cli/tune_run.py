"""The run behind `nsa-autotune tune`: one problem after the other, then a table of what was found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import StoreError, WorkerError
from ..spec import DEFAULT_POLICY, KernelSpec, Problem
from .console import count_text, errors
from .tries import Tries
from .tune_report import Guess, print_predictions, print_winners

if TYPE_CHECKING:
    from ..db.shared import SharedStore
    from ..search.budget import Budget
    from .progress import TuneDisplay

CONFIRM_SHARE = 0.1  # of the minutes, for racing the winners again
LEAST_MINUTES = 0.05  # for a problem whose turn comes when the minutes are spent: time for its default config
EXIT_NO_WINNER = 1
EXIT_INTERRUPTED = 130

Work = tuple[KernelSpec, Problem]


@dataclass(frozen=True)
class Run:
    """What one command is to do; minutes of `budget` are for all of `work`, its trials for each."""

    work: tuple[Work, ...]
    budget: Budget
    db: str | None
    device: str
    targets: tuple[str, ...]  # none measures
    retune: bool
    jobs: int
    check: bool  # in the interpreter, before predicting
    policy: str = DEFAULT_POLICY
    retry_quarantined: bool = False
    since_s: float | None = None  # seconds of UTC; what other processes finished later is not done again; None is now
    members: int = 1  # processes that share the work of one command
    tries: Tries = ()  # configs to measure first


def execute(run: Run) -> int:
    """Do it with a live display and print what came out, also after Ctrl-C; the exit code."""
    from ..codegen.load import require_caches
    from .progress import TuneDisplay
    from .tune_measure import measure
    from .tune_predict import predict

    interrupted, right = False, True
    lost: WorkerError | None = None
    guesses: list[Guess] = []
    require_caches()
    with open_store(run.db) as store:
        if store.read_only:
            values = {"database": str(store.location)}
            raise StoreError("tuning needs a database that can be written", values, "Name another one with --db.")
        display = TuneDisplay(errors(), len(run.work) * max(1, len(run.targets)))
        try:
            with display:
                if not run.targets:
                    measure(run, store, display)
                else:
                    right = not run.check or check_in_interpreter(run, display)
                    predict(run, store, display, guesses)
        except KeyboardInterrupt:
            interrupted = True
        except WorkerError as error:  # the device is lost: what was found until then is shown first
            lost = error
        worked = print_predictions(guesses) if run.targets else print_winners(display.outcomes)
        if interrupted:
            done = "found" if run.targets else "measured"
            text = f"stopped; everything {done} is kept in {store.location}; the same command resumes"
            errors().print(text, style="yellow", markup=False, soft_wrap=True)
            return EXIT_INTERRUPTED
    if lost is not None:
        raise lost
    return 0 if worked and right else EXIT_NO_WINNER


def open_store(db: str | None) -> SharedStore:
    """The store to tune into; a file that was not there is told, for its name may be a slip."""
    from ..db.engine import parse_location
    from ..db.paths import chosen_url
    from ..db.shared import SharedStore

    path = parse_location(chosen_url(db)).path
    is_new = path is not None and not path.exists()
    store = SharedStore(db)
    if is_new:
        errors().print(f"made a new database: {path}", markup=False, soft_wrap=True)
    return store


def search_budget(total: Budget) -> Budget:
    """What is left of a budget for searching if winners are confirmed afterwards."""
    if total.max_minutes is None or not total.confirm:
        return total
    return replace(total, max_minutes=(1 - CONFIRM_SHARE) * total.max_minutes)


def check_in_interpreter(run: Run, display: TuneDisplay) -> bool:
    """Run each family's default and structural variants on its smallest case, without a GPU; False if one is wrong."""
    from ..search import interpret

    specs = {spec.family: spec for spec, _ in run.work}
    right = True
    families = count_text(len(specs), "family", "families")
    display.note(f"checking {families} in Triton's interpreter: minutes, once; --no-check leaves it out")
    with interpret.interpreter_worker() as worker:
        runner = interpret.Remembering(worker, recall=not run.retune)
        for family, spec in specs.items():
            display.say(f"checking {family} in the interpreter")
            before = runner.recalled
            checks = interpret.check_in_interpreter(spec, runner=runner, max_cases=1)
            wrong = [check for check in checks if not check.ok]
            text = f"{family}: {len(checks) - len(wrong)} of {len(checks)} variants right in the interpreter"
            recalled = runner.recalled - before
            display.note(text + (f", {recalled} of them in an earlier run" if recalled else ""))
            for check in wrong:
                display.note(f"    {check.reason}  {check.config}")
            right = right and not wrong
    return right


def share(total: Budget, spent_minutes: float, to_do: int, members: int = 1) -> Budget:
    """The budget of the next of `to_do` problems, of which so many processes each do some at the same time."""
    if total.max_minutes is None:
        return total
    left = total.max_minutes - spent_minutes
    return replace(total, max_minutes=max(LEAST_MINUTES, left / max(1.0, to_do / members)))
