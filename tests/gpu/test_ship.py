"""A package of this GPU's winners serves the bits and times of nsa_autotune, and starts without the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa_autotune
from nsa_autotune.db import TuningStore

TESTS = Path(__file__).parents[1]
OURS = Path(nsa_autotune.__file__).parents[1]
NAME = "nsa_tuned_here"
MOST_DIFFERENT = 0.07  # of medians in two processes on one GPU


@pytest.fixture(scope="module")
def here() -> str:
    """This GPU's name; skips where no winner of it is known."""
    name = torch.cuda.get_device_name()
    with TuningStore() as store:
        if not store.winners(gpu=name):
            pytest.skip(f"no winner of {name} is shipped")
    return name


def run(package: str, folder: Path, *path: Path) -> Any:
    """What the child finds with an empty cache of Triton's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / f"triton-{package}")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, TESTS)))  # a package finds nothing of ours by it
    result = folder / f"{package}.pt"
    child = [sys.executable, str(TESTS / "gpu" / "ship_gpu_child.py"), package, str(result)]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(result, weights_only=False)


def test_a_package_gives_our_bits_and_times(here: str, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    project, installed = tmp_path / "project", tmp_path / "installed"
    options = ["--gpu", here, "--name", NAME, "--seq", "8k", "--problem", "d_qk=128", "--aot", f"cuda:{major}{minor}"]
    subprocess.run([sys.executable, "-m", "nsa_autotune", "ship", *options, "--out", str(project)], check=True)
    how = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(installed)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(project)], check=True)
    inherited = [Path(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    ours, theirs = run("nsa_autotune", tmp_path, OURS, *inherited), run(NAME, tmp_path, installed)
    for name, tensor in ours["tensors"].items():
        assert torch.equal(theirs["tensors"][name], tensor), name
    assert ours["compiled"] and theirs["compiled"] == []
    told = {
        which: (found["first_s"], found["forward_us"], found["training_us"])
        for which, found in (("ours", ours), ("package", theirs))
    }
    print(f"\nfirst step s, forward us, forward and backward us: {told}")
    for time_us in ("forward_us", "training_us"):
        assert abs(theirs[time_us] / ours[time_us] - 1) < MOST_DIFFERENT, time_us
