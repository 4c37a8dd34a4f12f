"""The child of MeasureWorker: `python -m nsa_autotune.bench.worker_main`; reads requests and answers in JSON lines."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ..codegen.lifetime import die_with_parent
from ..spec import Problem
from .journal import StageLines
from .patience import LAUNCH_STAGES, guess_us
from .policy import get_policy
from .session import MeasureSession, Timer


class Service:
    """Answers requests on one device; all that costs time but touches no device is done before the first one."""

    def __init__(self, device: str, toolchain: str, journal: str, answers: TextIO) -> None:
        self._device, self._toolchain, self._answers = device, toolchain, answers
        self._tools: Any = importlib.import_module(toolchain)
        self._lines = StageLines(journal) if journal else None

    def run(self, requests: TextIO) -> None:
        """Serve until the parent closes the pipe or the device's context is lost."""
        self._say(ready=True)  # a standby waits here
        session: MeasureSession | None = None
        for line in requests:
            request = json.loads(line)
            if session is None:
                session = self._open()
                if session is None:
                    return
            if "family" in request or "provider" in request:
                self._answer(session, request)
                if session.lost:
                    return

    def _open(self) -> MeasureSession | None:
        """A session on a device that computes what is known; None, told with the reason, if it does not."""
        try:
            session = MeasureSession(self._device, self._toolchain)
            self._tools.check_device(session.device)
        except Exception as error:  # whatever the driver raises
            self._say(healthy=False, reason=f"{type(error).__name__}: {error}")
            return None
        self._say(healthy=True)
        return session

    def _answer(self, session: MeasureSession, request: Mapping[str, Any]) -> None:
        problem, expected = Problem.from_dict(request["problem"]), dict[int, float]()
        if self._lines is not None:
            self._lines.begin()

        def tell(index: int, stage: str) -> None:
            if stage in LAUNCH_STAGES and index not in expected and "family" in request:
                spec = self._tools.get_spec(request["family"])
                expected[index] = guess_us(spec, problem, request["configs"][index])
            self._write(index, stage)
            self._say(at=index, stage=stage, expected_us=expected.get(index, 0.0))

        timer = Timer(request["rounds"], get_policy(request["policy"]), request["target_ms"], request["sentinel"])
        if "provider" in request:
            results = [session.library(request["provider"], problem, timer, tell)]
        else:
            results = session.race(request["family"], problem, request["configs"], timer, tell)  # type: ignore[assignment]
        self._say(results=[None if result is None else result.to_dict() for result in results], lost=session.lost)

    def _write(self, index: int, stage: str) -> None:
        if self._lines is None:
            return
        try:
            self._lines.tell(index, stage)
        except OSError as error:  # a full disk is no fault of the variant
            self._lines = None
            self._say(journal=str(error))

    def _say(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--device", "--toolchain", "--journal"):
        parser.add_argument(name, required=True)
    for name in ("--requests", "--answers", "--parent"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    for descriptor in (options.requests, options.answers):
        os.set_inheritable(descriptor, False)  # compilers that this process starts must not hold the pipes open
    with (
        os.fdopen(options.requests, encoding="utf-8") as requests,
        os.fdopen(options.answers, "w", encoding="utf-8") as answers,
    ):
        Service(options.device, options.toolchain, options.journal, answers).run(requests)
    sys.stdout.flush()
    os._exit(0)  # tearing a lost CUDA context down may hang


if __name__ == "__main__":
    main()
