"""`python -m nsa_autotune.cli.member`: one process of a `tune` that several share; its order is a line on stdin."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict, replace

from ..codegen.lifetime import die_with_parent
from ..errors import NSAError
from ..kernels import get_spec
from ..search.budget import Budget
from ..spec import Problem
from .console import errors
from .tune_run import EXIT_INTERRUPTED, EXIT_NO_WINNER, Run

EXIT_MISTAKE = 2


def order_of(run: Run, parent: int) -> str:
    """A run as one line of JSON, for a member that ends when `parent`, a process id, does."""
    work = [[spec.family, problem.to_dict()] for spec, problem in run.work]
    plain = asdict(replace(run, work=()))
    return json.dumps({**plain, "work": work, "parent": parent})


def run_of(order: str) -> tuple[Run, int]:
    """The run and the parent's process id of an order."""
    values = json.loads(order)
    parent = values.pop("parent")
    work = tuple((get_spec(family), Problem.from_dict(problem)) for family, problem in values.pop("work"))
    tries = tuple((family, config) for family, config in values["tries"])
    values |= {"work": work, "budget": Budget(**values["budget"]), "targets": tuple(values["targets"]), "tries": tries}
    return Run(**values), parent


def tune_as_member(run: Run) -> int:
    """Tune what no other process has; the exit code. Lines on stderr; the first one on stdout is the fingerprint."""
    from ..db.shared import SharedStore
    from ..dispatch.fingerprint import current
    from .progress import TuneDisplay
    from .tune_measure import measure

    try:
        print(json.dumps(current(run.device).to_dict()), flush=True)
        with SharedStore(run.db) as store, TuneDisplay(errors(), len(run.work)) as display:
            measure(run, store, display)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except NSAError as error:
        errors().print(f"error: {error}", markup=False, soft_wrap=True)
        return EXIT_MISTAKE
    return EXIT_NO_WINNER if any(outcome.kind == "failed" for outcome in display.outcomes) else 0


def main() -> int:
    """Read the order and do it; SIGTERM ends it as Ctrl-C does, with everything stored."""
    run, parent = run_of(sys.stdin.readline())
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # an actor's child begins without them
    return tune_as_member(run)


if __name__ == "__main__":
    sys.exit(main())
