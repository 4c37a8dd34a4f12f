"""Several `tune` processes on one database, each with a pretended GPU; run as a script, it forks them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.cli.progress import TuneDisplay
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.search.progress import TrialEvent
from nsa_autotune.spec import Config, Problem

ROOT = Path(__file__).parents[2]
FINGERPRINT = Fingerprint("Fleet GPU", "9.0", "1", "13.0", "2.11", "3.6")
LOOK_AGAIN_S = 0.05


class FakeWorker:
    """Times a config by a formula, which says nothing of the process; BLOCK=512 with 2 warps is best, 8 warps crash."""

    delay_s = 0.0

    def __init__(self, device: str, policy: str = "eager-cold", **options: object) -> None:
        self.policy = policy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def renew(self) -> None:
        """A new process."""

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """A time in us."""
        time.sleep(self.delay_s)
        if config["num_warps"] == 8:
            return TrialResult("crash", "it died")
        time_us = 10.0 + abs(int(config["BLOCK"]) - 512) / 512 + abs(int(config["num_warps"]) - 2)
        return TrialResult("ok", "", (time_us,), time_us, time_us, time_us)

    def race(
        self, family: str, problem: Problem, configs: Sequence[Config], rounds: int = 1, *, sentinel: int | None = None
    ) -> list[TrialResult]:
        """All of them."""
        return [self.measure(family, problem, config) for config in configs]

    def measure_library(self, provider: str, problem: Problem) -> TrialResult:
        """Always the same."""
        return TrialResult("ok", "", (20.0,), 20.0, 20.0, 20.0)


class TellingDisplay(TuneDisplay):
    """Prints the digest of each trial that is stored."""

    def trial(self, event: TrialEvent) -> None:
        """Tell."""
        super().trial(event)
        os.write(1, f"{event.record.digest}\n".encode())


def pretend(delay_s: float, lease_s: float) -> None:
    """A GPU in this process, and leases of so many seconds."""
    import torch

    import nsa_autotune.bench.worker
    import nsa_autotune.cli.progress
    import nsa_autotune.cli.tune_measure
    import nsa_autotune.dispatch.fingerprint

    torch.cuda.is_available = lambda: True
    FakeWorker.delay_s = delay_s
    nsa_autotune.bench.worker.MeasureWorker = FakeWorker  # type: ignore[misc, assignment]
    nsa_autotune.cli.progress.TuneDisplay = TellingDisplay  # type: ignore[misc]
    nsa_autotune.dispatch.fingerprint.current = lambda device="cuda:0": FINGERPRINT  # type: ignore[assignment]
    nsa_autotune.cli.tune_measure.LEASE_S = lease_s
    nsa_autotune.cli.tune_measure.LOOK_AGAIN_S = LOOK_AGAIN_S


def member_command(delay_s: float, lease_s: float) -> list[str]:
    """In the place of the command of a member: one with a pretended GPU."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return ["env", f"PYTHONPATH={path}", sys.executable, __file__, "member", str(delay_s), str(lease_s)]


class Forker:
    """A process that has everything imported, and forks the members of fleets; a context that ends it."""

    def __enter__(self) -> Self:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self._script = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=env, stdin=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._script.kill()
        self._script.communicate()

    def start(
        self, folder: Path, command: Sequence[str], number: int, *, delay_s: float = 0.005, lease_s: float = 1.0
    ) -> Fleet:
        """So many processes of the command."""
        folder.mkdir()
        assert self._script.stdin is not None
        self._script.stdin.write(json.dumps([str(folder), number, delay_s, lease_s, list(command)]) + "\n")
        self._script.stdin.flush()
        return Fleet(folder, number)


class Fleet:
    """Processes of one command; their output lies in files of `folder`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    def pid(self, index: int, timeout_s: float = 60.0) -> int:
        """Process id of a member, once it runs."""
        path = self.folder / f"{index}.pid"
        until(path.exists, timeout_s)
        return int(path.read_text())

    def told(self, index: int) -> list[str]:
        """Digests of the trials that a member said it stored; what it wrote by half is left out."""
        path = self.folder / f"{index}.out"
        return re.findall(r"^([0-9a-f]{20})\n", path.read_text() if path.exists() else "", re.MULTILINE)

    def said(self, index: int) -> str:
        """What a member printed for people."""
        return " ".join((self.folder / f"{index}.err").read_text().split())

    def kill(self, index: int, after: int = 1) -> None:
        """SIGKILL, once the member told of so many trials."""
        until(lambda: len(self.told(index)) >= after, 60.0)
        os.kill(self.pid(index), signal.SIGKILL)

    def wait(self, timeout_s: float = 90.0) -> list[int]:
        """Exit codes of the members."""
        files = [self.folder / f"{index}.code" for index in range(self.number)]
        until(lambda: all(file.exists() for file in files), timeout_s)
        return [int(file.read_text()) for file in files]

    def ends(self, *codes: int) -> None:
        """Assert how the members end; where one ends otherwise, the failure shows what each said."""
        assert self.wait() == list(codes), [self.said(index) for index in range(self.number)]


def until(what: object, timeout_s: float) -> None:
    """Wait for it."""
    deadline = time.monotonic() + timeout_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def fork_members(folder: Path, number: int, command: Sequence[str]) -> None:
    """Run the command in so many processes, on devices cuda:0 and up, and write how each ended."""
    pids = {}
    for index in range(number):
        pid = os.fork()
        if pid == 0:
            _become(folder, index, [*command, "--device", f"cuda:{index}"])
        pids[pid] = index
    for _ in range(number):
        pid, status = os.wait()
        _write(folder / f"{pids[pid]}.code", os.waitstatus_to_exitcode(status))


def fork_fleets() -> None:
    """A fleet for each line of stdin."""
    import nsa_autotune.cli.tune_measure  # noqa: F401  imports torch and triton, once

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fleet's parent
    for line in sys.stdin:
        folder, number, delay_s, lease_s, command = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pretend(delay_s, lease_s)
            fork_members(Path(folder), number, command)
            os._exit(0)


def _become(folder: Path, index: int, command: Sequence[str]) -> None:
    from nsa_autotune.cli.app import main

    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{index}.{suffix}", os.O_WRONLY | os.O_CREAT), descriptor)
    _write(folder / f"{index}.pid", os.getpid())
    code = main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write(path: Path, number: int) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(str(number))
    partial.rename(path)


if __name__ == "__main__":
    from cpu import fleet_fakes  # not __main__'s copy

    if sys.argv[1:2] == ["member"]:
        fleet_fakes.pretend(float(sys.argv[2]), float(sys.argv[3]))
        from nsa_autotune.cli import member

        sys.exit(member.main())
    fleet_fakes.fork_fleets()
