"""What is compiled ahead for a problem is what its accuracy gate runs, at another length: no trial compiles twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nsa_autotune.kernels import all_specs

TESTS = Path(__file__).parents[1]


def test_the_gate_runs_what_was_compiled_for_the_problem() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    environment.pop("TRITON_INTERPRET", None)
    child = [sys.executable, str(TESTS / "cpu" / "specialization_child.py")]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["odd"] == []
    assert told["count"] > 2 * len(all_specs())
