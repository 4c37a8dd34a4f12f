"""The child of MeasureWorker: `python -m nsa_autotune.bench.worker_main`; reads requests and answers in JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from ..codegen.lifetime import die_with_parent
from ..spec import Problem
from .policy import get_policy
from .session import MeasureSession, Timer


def serve(session: MeasureSession, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the parent closes the pipe or the CUDA context is lost."""

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    say(ready=True)
    for line in requests:
        request = json.loads(line)
        problem = Problem.from_dict(request["problem"])

        def tell(index: int, stage: str) -> None:
            say(at=index, stage=stage)

        timer = Timer(request["rounds"], get_policy(request["policy"]), request["target_ms"], request["sentinel"])
        if "provider" in request:
            results = [session.library(request["provider"], problem, timer, tell)]
        else:
            results = session.race(request["family"], problem, request["configs"], timer, tell)  # type: ignore[assignment]
        say(results=[None if result is None else result.to_dict() for result in results], lost=session.lost)
        if session.lost:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--device", "--toolchain"):
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
        serve(MeasureSession(options.device, options.toolchain), requests, answers)
    sys.stdout.flush()
    os._exit(0)  # tearing a lost CUDA context down may hang


if __name__ == "__main__":
    main()
