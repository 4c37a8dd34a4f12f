"""`nsa-autotune tune --ray`: a measuring actor for each GPU of a Ray cluster, all on one PostgreSQL database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from ..db.paths import chosen_url
from ..errors import InvalidInput
from .console import errors
from .member import order_of, run_of
from .tune_devices import MEMBER, report
from .tune_run import EXIT_INTERRUPTED, EXIT_NO_WINNER, Run

LOOK_S = 1.0  # between two looks at an actor
ENDING_S = 30.0  # for actors to store what they are at, after Ctrl-C


class MeasuringActor:
    """Runs a member process, so that what kills a process leaves the actor alive to tell; it ends with the actor."""

    def begin(self, order: str, command: Sequence[str]) -> None:
        """Start the member; its lines go where the actor's go. The GPU is the one that Ray lets this actor see."""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        run, _ = run_of(order)
        assert self._process.stdin is not None
        self._process.stdin.write(order_of(run, os.getpid()) + "\n")
        self._process.stdin.close()

    def ended(self) -> tuple[int, str] | None:
        """Exit code and first line of stdout, None while it runs."""
        if self._process.poll() is None:
            return None
        assert self._process.stdout is not None
        return self._process.returncode, self._process.stdout.readline()

    def end(self) -> None:
        """Ask the member to end as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)


@dataclass
class Seat:
    """A GPU of the cluster with its actor."""

    number: int
    actor: Any
    begun: Any  # a reference that is ready once the member was started
    code: int | None = None
    said: str = ""

    def fingerprint(self) -> dict[str, str] | None:
        """Of the actor's GPU, once the member has ended."""
        return dict(json.loads(self.said)) if self.said.startswith("{") else None


def execute_on_ray(run: Run, address: str, jobs: int | None) -> int:
    """Tune on every GPU of a cluster and print what was found, also after Ctrl-C; the exit code.

    An actor compiles with `jobs` processes; with None, and at most, its share of its host's cores.
    """
    from ..db.shared import SharedStore

    ray = load_ray()
    check_database(run.db)
    with SharedStore(run.db) as store:
        connect(ray, address)
        try:
            run = replace(run, db=chosen_url(run.db), since_s=store.now_s(), device="cuda:0")
            seats = take_seats(ray, run, jobs)
            interrupted = not _wait(ray, seats)
            machines = [found for seat in seats if (found := seat.fingerprint()) is not None]
            return report(run, store, machines, [seat.code for seat in seats], interrupted)
        finally:
            ray.shutdown()


def load_ray() -> ModuleType:
    """The optional library; InvalidInput if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InvalidInput("--ray needs Ray", {"missing": error.name}, "pip install nsa-autotune[ray]") from error
    module: ModuleType = ray
    return module


def check_database(url: str | None) -> None:
    """Raise InvalidInput for a database that other hosts cannot reach."""
    if not chosen_url(url).startswith("postgresql"):
        remedy = "Write --db postgresql+psycopg://USER@HOST/NAME, or set NSA_AUTOTUNE_DB to it."
        raise InvalidInput("--ray needs a PostgreSQL database that all hosts reach", {"--db": url}, remedy)


def connect(ray: ModuleType, address: str) -> None:
    """Join a cluster that runs; InvalidInput if there is none."""
    try:
        ray.init(address=address, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        values = {"--ray": address, "message": (str(error).splitlines() or [""])[0]}
        raise InvalidInput("no Ray cluster answers", values, "Start one with `ray start --head`.") from error


def take_seats(ray: ModuleType, run: Run, jobs: int | None) -> list[Seat]:
    """An actor for each GPU, with cores for compiling on the same host; InvalidInput without a GPU."""
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    if not hosts:
        raise InvalidInput("no host of the Ray cluster has a GPU", {"hosts": len(ray.nodes())}, "Add one that has.")
    gpus = sum(int(host["GPU"]) for host in hosts)
    cores = min(int(host.get("CPU", 0) // host["GPU"]) for host in hosts)
    order = order_of(replace(run, members=gpus, jobs=max(1, min(jobs or cores, cores))), 0)
    remote = ray.remote(num_gpus=1, num_cpus=cores)(MeasuringActor)
    actors = [remote.remote() for _ in range(gpus)]
    return [Seat(number, actor, actor.begin.remote(order, list(MEMBER))) for number, actor in enumerate(actors)]


def _wait(ray: ModuleType, seats: Sequence[Seat]) -> bool:
    """Wait until every member that could start has ended; tell of those that died. False after Ctrl-C."""
    running, complete, deadline = list(seats), True, float("inf")
    while running and time.monotonic() < deadline:
        try:
            for seat in list(running):
                if _look(ray, seat):
                    running.remove(seat)
            waiting_for_a_gpu = [seat for seat in running if not ray.wait([seat.begun], timeout=0)[0]]
            if len(waiting_for_a_gpu) == len(running) < len(seats):
                break  # the others came to the end of the work without them
            time.sleep(LOOK_S)
        except KeyboardInterrupt:
            if complete:
                complete, deadline = False, time.monotonic() + ENDING_S
                for seat in running:
                    seat.actor.end.remote()
    return complete


def _look(ray: ModuleType, seat: Seat) -> bool:
    """True if a member has ended, by itself or with its host."""
    try:
        if not ray.wait([seat.begun], timeout=0)[0]:
            return False
        ray.get(seat.begun)
        ended = ray.get(seat.actor.ended.remote(), timeout=LOOK_S)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError as error:
        why = (str(error).splitlines() or [""])[0]
        text = f"GPU {seat.number}| lost with its actor or host; the others take its work over: {why}"
        errors().print(text, style="yellow", markup=False, soft_wrap=True)
        return True
    if ended is None:
        return False
    seat.code, seat.said = ended
    if seat.code not in (0, EXIT_NO_WINNER, EXIT_INTERRUPTED):
        text = f"GPU {seat.number}| the process ended with code {seat.code}; the others take its work over"
        errors().print(text, style="yellow", markup=False, soft_wrap=True)
    return True
