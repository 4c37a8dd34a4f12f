"""Run by test_kill in a process of its own: tunes on a pretended GPU, once for each line of its stdin.

A line is a folder. A forked child tunes there with a database, a journal and a file that tells, after each commit,
the digest of what is stored. Prints the child's process id, `over` when it has ended, and after one more line its code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpu.test_cli_tune import FINGERPRINT, FakeWorker

from nsa_autotune.bench import worker as worker_module
from nsa_autotune.bench.journal import RACE, Journal, StageLines
from nsa_autotune.bench.result import TrialResult
from nsa_autotune.cli import tune_measure
from nsa_autotune.cli.app import main as command
from nsa_autotune.db import store as store_module
from nsa_autotune.db.shared import SharedStore
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch import fingerprint as fingerprint_module
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.spec import Config, Problem, canonical_json

ARGUMENTS = ("tune", "--families", "gate_sum_fwd", "--seq", "1k", "--trials", "60", "--jobs", "1")
MEASURING_S = 0.003  # so that some kills hit a kernel
LEASE_S, LOOK_AGAIN_S = 1.0, 0.05  # the claim of a killed run is waited out


class JournalledWorker(FakeWorker):
    """Writes what it is at, as the real one does: the tuner what it asks, the measuring process the stage."""

    def __init__(self, device: str, policy: str = "eager-cold", *, journal: Journal) -> None:
        super().__init__(device, policy)
        self._journal, self._lines = journal, StageLines(str(journal.path))

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        """Two samples of each config."""
        self._journal.ask(family, problem.to_dict(), configs)
        self._lines.begin()
        for stage in (RACE, "timing"):
            for index in range(len(configs)):
                self._lines.tell(index, stage)
        die_if_told(self._journal.path.parent / "die_at", configs)
        time.sleep(MEASURING_S)
        results = [FakeWorker.measure(self, family, problem, config) for config in configs]
        self._journal.answered()
        return results

    def renew(self) -> None:
        """Between the search and the race that confirms."""
        die_if_told(self._journal.path.parent / "die_at", ())
        super().renew()

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """One sample."""
        return self.race(family, problem, [config])[0]


def die_if_told(order: Path, configs: Sequence[Config]) -> None:
    """SIGKILL for this process, once, at what a file names: a config as JSON, `race`, or `renew` (nothing measured)."""
    here = "race" if len(configs) > 1 else canonical_json(configs[0]) if configs else "renew"
    if order.exists() and order.read_text() == here:
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def telling(write: Callable[..., Any], digests: Callable[[Any], list[str]], told: int) -> Callable[..., Any]:
    """`write`, and afterwards the digests of what it wrote."""

    def tell(store: TuningStore, records: Any) -> Any:
        result = write(store, records)
        os.write(told, "".join(f"{digest}\n" for digest in digests(records)).encode())
        return result

    return tell


def tune(folder: Path) -> int:
    """A whole run; the exit code."""
    os.environ["NSA_AUTOTUNE_STATE_DIR"] = str(folder)
    told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    SharedStore.add_trials = telling(SharedStore.add_trials, lambda records: [r.digest for r in records], told)  # type: ignore[method-assign]
    store_module.shipped_files = dict
    worker_module.MeasureWorker = JournalledWorker  # type: ignore[assignment,misc]
    fingerprint_module.current = lambda device: Fingerprint(**FINGERPRINT)
    tune_measure.LEASE_S, tune_measure.LOOK_AGAIN_S = LEASE_S, LOOK_AGAIN_S
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return command([*ARGUMENTS, "--db", f"sqlite:///{folder / 'tuning.sqlite'}"])


def main() -> None:
    """See the module's docstring."""
    import torch

    import nsa_autotune.cli.tune_run
    import nsa_autotune.search.confirm
    import nsa_autotune.search.tuner  # noqa: F401  imported once, here, and not by every child
    from nsa_autotune.kernels import all_specs

    all_specs()

    torch.cuda.is_available = lambda: True
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = tune(Path(line.strip()))
            finally:
                os._exit(code)
        print(child, flush=True)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # stays a zombie, so that its id is nobody else's
        print("over", flush=True)
        sys.stdin.readline()  # nobody will kill it any more
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
