"""What tests/gpu checks of decoding, on small steps in the interpreter: the checks themselves must be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu.test_ops_append import Interpreted
from equations import take_the_kernels_way
from gpu import decode_cases, launch_all, test_decode, test_decode_module
from gpu.cases import all_jobs, family_cases
from gpu.conftest import needed_jobs
from gpu.decode_cases import AppendCase, ModuleCase, StepCase, make_step
from torch import Tensor

from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import all_specs
from nsa_autotune.nn.cache import KVCache
from nsa_autotune.ops import append, decode
from nsa_autotune.spec import PAGE_SIZES, Problem

SMALL = NSAConfig(8, 4, 16, 4, window_size=20)
FEW = NSAConfig(8, 4, 16, num_selected=2, num_initial=0, num_local=1, window_size=12)  # of 3 blocks in MODULE
LENGTHS = (100, 1, 0, 77)
MODULE = ModuleCase(
    group=2,
    dims=(32, 16),
    dtype="float16",
    page_size=16,
    new_tokens=8,
    hidden=16,
    phi_hidden=16,
    prompt=24,
    tokens=42,
    capacity=48,
    config=FEW,
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    """CPU tensors go to interpreted kernels."""
    take_the_kernels_way(monkeypatch)
    for module in (test_decode, test_decode_module):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    return Interpreted()


def test_every_value_of_the_grid_is_met() -> None:
    found = [(case.problem, case.finish, max(case.lengths)) for case in decode_cases.STEP_CASES]
    assert {p.group_size for p, _, _ in found} == {1, 4, 8, 16}
    assert {(p.d_qk, p.d_v) for p, _, _ in found} == {(64, 64), (128, 128), (192, 128), (256, 256)}
    assert {p.seq_q for p, _, _ in found} == {1, 2, 3, 8} and {p.page_size for p, _, _ in found} == set(PAGE_SIZES)
    assert {(p.dtype, p.cache_dtype) for p, _, _ in found} == set(decode_cases.KINDS)
    assert {finish for _, finish, _ in found} == {"ticket", "kernel"}
    assert {length for _, _, length in found} == {3000, 131_072}


def test_every_job_is_a_legal_variant() -> None:
    jobs = [*all_jobs(), *decode_cases.step_jobs()]
    for job in jobs:
        spec, problem = all_specs()[job.family], Problem.from_dict(job.problem)
        spec.check_problem(problem)
        spec.check_config(problem, job.config)
    paged = {family for family, spec in all_specs().items() if spec.layouts == ("paged",)}
    assert len(paged) == 5 and paged <= {job.family for job in decode_cases.step_jobs()}
    assert paged <= {case.family for case in family_cases()}
    assert paged <= {spec.family for spec, _, _ in launch_all.structures()}


def test_a_file_of_decoding_waits_for_its_own_variants_only() -> None:
    sizes = [
        len(needed_jobs([SimpleNamespace(path=Path(name)) for name in names]))  # type: ignore[misc]
        for names in (["test_decode.py"], ["test_module.py"], ["test_decode_module.py", "test_families.py"])
    ]
    assert sizes[0] == len(decode_cases.step_jobs()) and sizes[2] == sizes[0] + sizes[1]


def step_case(**changes: Any) -> StepCase:
    return StepCase(make_step((32, 16), 2, 2, LENGTHS, **{"dtype": "float16", "nsa": SMALL, **changes}), LENGTHS, "")


@pytest.mark.parametrize("changes", [{"page_size": 16}, {"cache_dtype": "float8_e4m3fn", "page_size": 64}], ids=str)
def test_a_right_step_passes(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    test_decode.check_step(step_case(**changes), kernels, monkeypatch)
    assert kernels.families == ["cmp_decode_fwd", "slc_win_decode_fwd"]


Wrong = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda o, blocks: (o * 1.02, blocks),
        lambda o, blocks: (o, blocks.roll(1, 2)),
        lambda o, blocks: (o, (blocks - 1).clamp(min=0)),
    ],
    ids=["o_cmp", "another head's blocks", "neighbours"],
)
def test_a_wrong_step_does_not(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch, wrong: Wrong) -> None:
    real = decode._compressed
    monkeypatch.setattr(decode, "_compressed", lambda step: wrong(*real(step)))
    with pytest.raises(AssertionError):
        test_decode.check_step(step_case(), kernels, monkeypatch)


@pytest.mark.parametrize(
    ("compression", "cache_dtype"), [("mlp", "problem"), ("mean", "float8_e4m3fn"), ("mlp", "float8_e4m3fn")]
)
def test_right_pages_pass(kernels: Interpreted, compression: str, cache_dtype: str) -> None:
    problem = make_step((32, 16), 1, 3, (96, 96), dtype="float16", nsa=SMALL, page_size=16, phi_hidden=16)
    case = AppendCase(problem.replace(cache_dtype=cache_dtype), compression, tokens=21)
    test_decode.check_append(case, kernels)
    assert set(kernels.families) == (
        {"cmp_pool_append_fwd"} if compression == "mean" else {"kv_append_fwd", "cmp_mlp_append_fwd"}
    )


def test_wrong_pages_do_not(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    real = append._readable
    monkeypatch.setattr(append, "_readable", lambda x: real(x).roll(1, -1))
    case = AppendCase(make_step((32, 16), 1, 1, (96, 96), dtype="float16", nsa=SMALL, page_size=16), "mean", tokens=9)
    with pytest.raises(AssertionError):
        test_decode.check_append(case, kernels)


def test_a_right_module_passes(kernels: Interpreted) -> None:
    test_decode_module.check_decode(MODULE, kernels)
    decoded = {"cmp_decode_fwd", "slc_win_decode_fwd", "kv_append_fwd", "cmp_mlp_append_fwd"}
    assert decoded < set(kernels.families) and "slc_select_fwd" in kernels.families


def test_a_module_that_forgets_its_window_does_not(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    real = decode._selected_and_window
    monkeypatch.setattr(
        decode,
        "_selected_and_window",
        lambda step, gates, *rest: real(step, gates * torch.tensor([1.0, 1.0, 0.0]).to(gates), *rest),
    )
    with pytest.raises(AssertionError):
        test_decode_module.check_decode(MODULE, kernels)


def test_a_graph_is_compared_step_by_step(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is pretended: a replay calls the step."""
    steps: list[int] = []

    def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = torch.zeros(2, 1, 16, dtype=torch.float16)

        def replay() -> None:
            steps.append(1)
            out.copy_(step())

        return replay, out

    monkeypatch.setattr(test_decode_module, "captured", captured)
    monkeypatch.setattr(test_decode_module, "SKEW", (0, 3))
    monkeypatch.setattr(KVCache, "advance", lambda self, num_new: None)  # the step counts its tokens itself here
    small = {"tokens": 3, "prompt": 5, "new_tokens": 1, "compression": "mean", "share_kv": True}
    case = ModuleCase(**{**vars(MODULE), **small})
    test_decode_module.check_graph(case, kernels)
    assert len(steps) == 3
    monkeypatch.setattr(KVCache, "advance", lambda self, num_new: self.lengths.sub_(1))
    with pytest.raises(AssertionError):
        test_decode_module.check_graph(case, kernels)
