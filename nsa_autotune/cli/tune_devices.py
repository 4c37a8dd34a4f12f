"""`nsa-autotune tune --devices`: a process for each GPU of this host; claims in the database divide the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING

from ..errors import InvalidInput
from ..spec import digest
from . import options
from .console import errors
from .member import EXIT_MISTAKE, order_of
from .tune_report import print_winners
from .tune_run import EXIT_INTERRUPTED, EXIT_NO_WINNER, Run, open_store

if TYPE_CHECKING:
    from ..db.shared import SharedStore
    from ..search.progress import Outcome

MEMBER = (sys.executable, "-P", "-m", "nsa_autotune.cli.member")
ENDING_S = 30.0  # for a member to store what it is at, after Ctrl-C
LOOK_S = 0.1


def choose_devices(text: str) -> tuple[str, ...]:
    """The devices that `cuda:0,cuda:1` or `all` names; InvalidInput if one of them is not here."""
    import torch

    everything = text.strip() == "all"
    named = () if everything else tuple(options.check_device(name) for name in options.split([text], "--devices"))
    count = torch.cuda.device_count()
    if not count:
        raise InvalidInput(f"--devices {text} needs a GPU", {"found": 0}, "Look for it with nsa-autotune doctor.")
    if absent := [name for name in named if int(name.partition(":")[2] or 0) >= count]:
        raise InvalidInput(
            "there is no such GPU here", {"--devices": absent, "found": count}, f"The last is cuda:{count - 1}."
        )
    return tuple(f"cuda:{index}" for index in range(count)) if everything else named


@dataclass
class Member:
    """A process that tunes on one device."""

    device: str
    process: subprocess.Popen[str]
    reader: threading.Thread

    @staticmethod
    def start(run: Run, command: Sequence[str]) -> Member:
        """Begin; its lines come out on stderr with the device in front."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(run.device, process.stderr), daemon=True)
        reader.start()
        try:
            process.stdin.write(order_of(run, os.getpid()) + "\n")
            process.stdin.close()
        except BrokenPipeError:  # it ended at once, and its lines say why
            process.stdin = None
        return Member(run.device, process, reader)

    def ending(self) -> str:
        """How it ended, if not by itself; "" otherwise."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return "it ended with an error" if code not in (None, 0, EXIT_NO_WINNER, EXIT_INTERRUPTED) else ""


def _pass_on(device: str, lines: IO[str]) -> None:
    for line in lines:
        if line.strip():
            errors().print(f"{device}| {line.rstrip()}", markup=False, soft_wrap=True)


def execute_on(run: Run, devices: Sequence[str]) -> int:
    """Tune on several devices and print what was found, also after Ctrl-C; the exit code."""
    from ..dispatch.fingerprint import current

    with open_store(run.db) as store:
        check_shared(store)
        run = replace(run, since_s=store.now_s(), members=len(devices), jobs=max(1, run.jobs // len(devices)))
        members = [Member.start(replace(run, device=device), MEMBER) for device in devices]
        interrupted = not _wait_for_all(members)
        machines = [current(device).to_dict() for device in devices]
        return report(run, store, machines, [member.process.returncode for member in members], interrupted)


def check_shared(store: SharedStore) -> None:
    """Raise InvalidInput for a database that other processes cannot write."""
    if store.read_only or store.location.is_memory:
        remedy = "Name a file or a server with --db."
        raise InvalidInput("several processes need a database all can write", {"database": str(store.location)}, remedy)


def _wait_for_all(members: Sequence[Member]) -> bool:
    """Wait until all have ended, and tell of those that died; False after Ctrl-C, which ends them all."""
    running, complete = list(members), True
    while running:
        try:
            for member in [one for one in running if one.process.poll() is not None]:
                running.remove(member)
                member.reader.join(1.0)
                if member.ending():
                    others = "; the others take its work over" if running else ""
                    errors().print(
                        f"{member.device}| {member.ending()}{others}", style="yellow", markup=False, soft_wrap=True
                    )
            time.sleep(LOOK_S)
        except KeyboardInterrupt:
            complete = False
            _end(running)
    return complete


def _end(running: Sequence[Member]) -> None:
    """Ask them to end as Ctrl-C does, and kill those that do not."""
    for member in running:
        member.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + ENDING_S
    for member in running:
        try:
            member.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            member.process.kill()


def report(
    run: Run,
    store: SharedStore,
    machines: Sequence[dict[str, str]],
    codes: Sequence[int | None],
    interrupted: bool,
) -> int:
    """Print the winners of all members, whose fingerprints are `machines`; the exit code."""
    found = outcomes(run, store, machines)
    right = print_winners(found)
    if interrupted:
        text = f"stopped; everything measured is kept in {store.location}; the same command resumes"
        errors().print(text, style="yellow", markup=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    if not found or any(outcome.winner is None for outcome in found):
        return EXIT_MISTAKE if all(code == EXIT_MISTAKE for code in codes) else EXIT_NO_WINNER
    return 0 if right else EXIT_NO_WINNER


def outcomes(run: Run, store: SharedStore, machines: Sequence[dict[str, str]]) -> list[Outcome]:
    """How each problem ended, on each different fingerprint."""
    from ..codegen.render import template_digest
    from ..search.lease import unit_of
    from ..search.progress import Outcome, count_reasons, count_statuses
    from ..search.task import Task, known_trials, known_winner

    started = datetime.fromtimestamp(run.since_s or 0.0, UTC).isoformat(timespec="microseconds")
    done = {claim.unit for claim in store.claims() if claim.done_s is not None}
    found: list[Outcome] = []
    for machine in {digest(machine): machine for machine in machines}.values():
        for spec, problem in run.work:
            task = Task(spec, problem, machine, template_digest(spec), run.policy)
            winner, trials = known_winner(store, task), known_trials(store, task)
            new = winner is not None and winner.created >= started
            without = "failed" if unit_of(task) in done else "interrupted"
            kind = ("tuned" if new else "known") if winner is not None else without
            statuses, reasons = count_statuses(trials), count_reasons(trials)
            found.append(Outcome(kind, spec, problem, winner, statuses, reasons))  # type: ignore[arg-type]
    return found
