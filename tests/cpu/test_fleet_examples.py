"""The job scripts of examples/fleet: their syntax, and that the command they run is one that exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_autotune.cli import tune as tune_command
from nsa_autotune.cli.app import main
from nsa_autotune.cli.tune_run import Run

FOLDER = Path(__file__).parents[2] / "examples" / "fleet"
DATABASE = "postgresql+psycopg://tuner@db.example.org/nsa"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What commands would have run."""
    found: list[Run] = []
    monkeypatch.setattr(tune_command, "execute", lambda run: found.append(run) or 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return found


def test_slurm_runs_tune_with_the_database(tmp_path: Path, runs: list[Run]) -> None:
    script = FOLDER / "slurm.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    stub = tmp_path / "nsa-autotune"  # prints its arguments
    stub.write_text(f"#!{sys.executable}\nimport sys\nprint('\\n'.join(sys.argv[1:]))\n")
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NSA_AUTOTUNE_DB": DATABASE, "SLURM_CPUS_PER_TASK": "4"}
    command = ["bash", str(script), "--families", "gate_sum_fwd", "--seq", "1k"]
    arguments = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    assert main(arguments) == 0
    assert (runs[0].db, runs[0].jobs, len(runs[0].work)) == (DATABASE, 4, 1)
    refused = subprocess.run(command, env={"PATH": env["PATH"]}, capture_output=True, text=True)
    assert refused.returncode != 0 and "postgresql+psycopg" in refused.stderr


def test_kubernetes_runs_one_gpu_a_pod(runs: list[Run]) -> None:
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["parallelism"] > 1 and "completions" not in job["spec"]
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    (variable,) = container["env"]
    assert variable["name"] == "NSA_AUTOTUNE_DB" and "secretKeyRef" in variable["valueFrom"], "no password in the file"
    assert container["command"] == ["nsa-autotune", "tune"]
    assert main(["tune", *container["args"]]) == 0
    assert runs[0].db is None and runs[0].jobs == 8 and len(runs[0].work) > 1
