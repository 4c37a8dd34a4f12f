"""The tuner on the device: clocks agree, races are recorded with the GPU's state, winners carry their evidence."""

from __future__ import annotations

import pytest
import torch

from nsa_autotune.bench.nvml import make_watch
from nsa_autotune.bench.timing import CudaClock, GraphClock, summarize
from nsa_autotune.bench.worker import MeasureWorker
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db.store import TuningStore
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.dispatch.ladder import Step
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.ahead import compile_ahead
from nsa_autotune.search.budget import Budget
from nsa_autotune.search.confirm import confirm_winner
from nsa_autotune.search.task import Task
from nsa_autotune.search.tuner import tune_problem
from nsa_autotune.spec import Problem

DEVICE = "cuda:0"
PROBLEM = Problem(seq_q=4096, seq_k=4096, num_q_heads=16, num_kv_heads=4)


@pytest.mark.parametrize("cold_l2", [True, False])
def test_a_graph_takes_as_long_as_its_launches(cold_l2: bool) -> None:
    """A product of 4096 x 4096 matrices, far longer than a launch: both clocks see the same kernel."""
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def product() -> object:
        return torch.mm(a, a, out=out)

    medians = []
    for clock in (CudaClock(DEVICE), GraphClock(DEVICE)):
        samples = [clock.elapsed_us(product, 4, cold_l2) for _ in range(20)]
        medians.append(summarize(samples[5:]).median_us)
    assert medians[1] == pytest.approx(medians[0], rel=0.15)


def test_the_gpu_tells_its_clocks() -> None:
    state = make_watch(torch.device(DEVICE)).read()
    assert state is not None, "NVML does not answer: is nvidia-ml-py installed?"
    assert 100 < state.sm_clock_mhz < 4000 and 0 < state.temperature_c < 110


def test_a_problem_is_tuned_confirmed_and_served() -> None:
    spec, here = get_spec("gate_sum_fwd"), current(DEVICE)
    with (
        TuningStore("sqlite://", import_shipped=False) as store,
        compile_ahead(here.capability, 4) as preparer,
        MeasureWorker(DEVICE) as worker,
    ):
        how = {"measurer": worker, "store": store, "fingerprint": here.to_dict(), "preparer": preparer}
        winner = tune_problem(spec, PROBLEM, budget=Budget(max_trials=10), **how)
        assert winner is not None and winner.verdict == "provisional"
        task = Task(spec, PROBLEM, here.to_dict(), template_digest(spec))
        worker.renew()
        winner = confirm_winner(task, measurer=worker, store=store)
        assert winner is not None and winner.verdict in ("confirmed", "provisional")
        assert winner.resources is not None and winner.resources["binary_sha"]
        assert all(rival["blocks"] >= 3 for rival in winner.rivals)
        final = store.trials(stage="final", status="ok")
        assert final and all((trial.environment or {}).get("sm_clock_mhz_max", 0) > 100 for trial in final)
        searched = [t for t in store.trials(stage="search") if t.status in ("ok", "same_code")]
        assert searched and all((t.resources or {}).get("num_programs", 0) > 0 for t in searched)
        choice = Dispatcher(store).choose(spec, PROBLEM, DEVICE)
        assert (choice.step, choice.config) == (Step.EXACT, winner.config)
