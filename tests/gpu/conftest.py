"""GPU tests run alone (`make test-gpu`), on one device, in about four minutes; the compilers run first, in parallel.

They are skipped without a CUDA device. Kernels are compiled by child processes before this process touches the GPU
(forking is safe until then); the tests find the binaries in Triton's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
import torch
from gpu.cases import FamilyCase, all_jobs
from gpu.decode_cases import step_jobs

from nsa_autotune.codegen.pool import CompileJob, CompileOutcome, compile_many
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.kernels import all_specs
from nsa_autotune.spec import canonical_json

COMPILERS = 16
COMPILE_TIMEOUT_S = 180.0
GIB = 1 << 30
ASK = "import torch; print('cuda:%d%d' % torch.cuda.get_device_capability())"

DECODE_FILES = {"test_cache.py", "test_decode.py", "test_decode_module.py"}

Outcomes = dict[str, CompileOutcome]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that need much memory."""
    config.addinivalue_line("markers", "slow: needs more than 60 GB of free device memory")


def job_key(family: str, problem: dict[str, object], config: dict[str, object]) -> str:
    """Names a job among the outcomes."""
    return canonical_json([family, problem, config])


def needed_jobs(items: Iterable[pytest.Item]) -> list[CompileJob]:
    """What the collected tests launch: some cases or files by themselves do not wait for everything else."""
    jobs: dict[str, CompileJob] = {}
    wanted: set[str] = set()
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        if isinstance(case, FamilyCase):
            job = CompileJob(case.family, case.problem.to_dict(), case.config)
            jobs[job_key(job.family, job.problem, job.config)] = job
        else:
            wanted.add("step" if item.path.name in DECODE_FILES else "all")
    for job in [*(all_jobs() if "all" in wanted else ()), *(step_jobs() if "step" in wanted else ())]:
        jobs.setdefault(job_key(job.family, job.problem, job.config), job)
    return list(jobs.values())


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """Outcomes of all compilations, by job; Triton's cache is a folder of this run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton"))))
    target = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.strip()
    processes = min(COMPILERS, os.cpu_count() or 1)
    outcomes = compile_many(all_specs(), needed_jobs(request.session.items), target, processes, COMPILE_TIMEOUT_S)
    yield {job_key(o.job.family, o.job.problem, o.job.config): o for o in outcomes}
    patch.undo()


@pytest.fixture(scope="session")
def dispatcher(compiled: Outcomes) -> Dispatcher:
    """Serves default configs; knows no database."""
    return Dispatcher(None)


@pytest.fixture
def much_memory() -> None:
    """Skips where less than 60 GiB are free."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * GIB:
        pytest.skip(f"needs 60 GiB of free device memory, found {free // GIB}")


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Give back what a test leaves in the allocator: some need almost all of it."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
