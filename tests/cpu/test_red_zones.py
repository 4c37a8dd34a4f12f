"""Mutants of right kernels: every stray write and every read of what is not there is caught, whatever the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu.bench_fakes import PACKED, POOL, SELECT, SMALL, WINDOW, Kernel, make_spec
from torch import Tensor

from nsa_autotune import gradients
from nsa_autotune.bench.accuracy import check_rows, check_variant
from nsa_autotune.bench.inputs import POISONS, make_inputs, make_layout
from nsa_autotune.bench.scratch import guarded_scratch
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.layout import PackedLayout
from nsa_autotune.spec import Argument, KernelSpec, Problem

CPU = torch.device("cpu")
OUTSIDE = "the kernel wrote outside of the tensor."


def kernel(spec: KernelSpec, problem: Problem, fault: str) -> Kernel:
    """A fake launch for a problem."""
    layout = make_layout(problem, CPU, 0) if problem.layout == "packed" else None
    return Kernel(spec, problem, fault, layout)


@pytest.mark.parametrize("problem", [SMALL, PACKED], ids=["batched", "packed"])
@pytest.mark.parametrize(
    ("spec", "fault", "words"),
    [
        (WINDOW, "stray", f"o: {OUTSIDE}"),
        (WINDOW, "before", f"o: {OUTSIDE}"),
        (POOL, "stray", f"out: {OUTSIDE}"),
        (POOL, "before", f"out: {OUTSIDE}"),
        (SELECT, "stray", f"blocks: {OUTSIDE}"),
        (SELECT, "before", f"blocks: {OUTSIDE}"),
        (WINDOW, "accumulate", "is NaN or was never written"),
        (POOL, "accumulate", "is NaN or was never written"),
        (WINDOW, "unwritten", "is NaN or was never written"),
        (POOL, "unwritten", "is NaN or was never written"),
        (SELECT, "unwritten", "blocks: "),
        (WINDOW, "input", "k: the kernel overwrote an input."),
    ],
    ids=lambda value: getattr(value, "family", str(value))[:24].replace(" ", "_"),
)
def test_a_mutant_is_caught(spec: KernelSpec, problem: Problem, fault: str, words: str) -> None:
    report = check_variant(spec, problem, kernel(spec, problem, fault), CPU)
    assert not report.ok and words in report.reason


def test_a_write_into_rows_between_packed_sequences_is_caught() -> None:
    report = check_variant(POOL, PACKED, kernel(POOL, PACKED, "unused_row"), CPU)
    assert not report.ok and "out: max error 1" in report.reason


def _pool_backward(problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None, _: Any) -> dict[str, Any]:
    return {"dx": gradients.pool_gradient(inputs["dout"], problem.seq_k, problem.nsa, layout)}


POOL_BACKWARD = make_spec(
    "fake_pool_bwd",
    _pool_backward,
    Argument("dout", ("C", "H", "D_QK")),
    Argument("dx", ("K", "H", "D_QK"), fill="out"),
    Argument("cmp_source", (), "int32", fill="cmp_source"),
)
LONG_PACKED = PACKED.replace(seq_q=500, seq_k=500)


def pool_backward(problem: Problem, *, reads_unused: bool) -> Callable[..., None]:
    """The reference as a kernel, which may also add what unused rows hold, times zero."""
    layout = make_layout(problem, CPU, 0)

    def launch(dout: Tensor, dx: Tensor, cmp_source: Tensor) -> None:
        dx.copy_(gradients.pool_gradient(dout.float(), problem.seq_k, problem.nsa, layout))
        if reads_unused:
            dx += 0 * dout[cmp_source < 0].sum()

    return launch


@pytest.mark.parametrize("check", [check_variant, check_rows])
def test_gradients_of_unused_rows_may_not_be_read(check: Callable[..., Any]) -> None:
    problem = PACKED if check is check_variant else LONG_PACKED
    assert check(POOL_BACKWARD, problem, pool_backward(problem, reads_unused=False), CPU).ok
    report = check(POOL_BACKWARD, problem, pool_backward(problem, reads_unused=True), CPU)
    assert not report.ok and "NaN" in report.reason


def test_unused_rows_are_poison_for_a_backward_and_zero_for_a_forward() -> None:
    unused = make_layout(PACKED, CPU, 0).cmp_source < 0
    dout = make_inputs(POOL_BACKWARD, PACKED, CPU).tensors["dout"]
    k_cmp = make_inputs(SELECT, PACKED, CPU).tensors["k"]
    assert dout is not None and dout[unused].isnan().all() and dout[~unused].isfinite().all()
    assert k_cmp is not None and (k_cmp[unused] == 0).all()


TINY = NSAConfig(8, 4, select_block_size=16, num_selected=3, window_size=16)
TINY_PACKED = Problem(
    batch=3,
    seq_q=70,
    seq_k=70,
    num_q_heads=2,
    num_kv_heads=1,
    d_qk=16,
    d_v=16,
    dtype="float32",
    layout="packed",
    nsa=TINY,
)


@pytest.mark.parametrize("family", [f for f, s in all_specs().items() if any(a.name == "dout" for a in s.arguments)])
def test_our_backward_of_compression_reads_no_unused_row(family: str) -> None:
    spec = get_spec(family)
    problem = TINY_PACKED.replace(phi_hidden=16)
    module = load(render(spec, problem, spec.default_config(problem)))
    report = check_variant(spec, problem, module.launch, CPU)
    assert report.ok, report.reason


def launch_with_scratch(x: Tensor, out: Tensor, offset: int | None, value: float = 0.0) -> None:
    """Pools by way of scratch, and writes one value beside it if an offset is given."""
    scratch = torch.empty([4, 2], dtype=torch.float32, device=x.device)
    like = torch.empty_like(scratch)
    if offset is not None:
        like.as_strided((1,), (1,), like.storage_offset() + offset).fill_(value)
    scratch.fill_(1.0)
    out.copy_(kernel_out(x) + 0 * scratch.sum())


def kernel_out(x: Tensor) -> Tensor:
    """What pooling gives."""
    out: Tensor = POOL.reference(SMALL, {"x": x.float()}, None, None)["out"]
    return out


@pytest.mark.parametrize("offset", [8, -1, 8 + 100, -100])
def test_a_write_beside_scratch_is_caught(offset: int) -> None:
    assert torch is globals()["torch"]

    def launch(x: Tensor, out: Tensor) -> None:
        launch_with_scratch(x, out, offset)

    report = check_variant(POOL, SMALL, launch, CPU)
    assert report.reason == f"scratch 1 (4, 2): {OUTSIDE}"
    assert globals()["torch"] is torch and isinstance(torch.empty(1), Tensor), "the module has its own torch again"


def test_scratch_within_its_bounds_passes() -> None:
    def launch(x: Tensor, out: Tensor) -> None:
        launch_with_scratch(x, out, 7, 2.0)

    assert check_variant(POOL, SMALL, launch, CPU).ok


def test_scratch_that_is_read_before_it_is_written_is_caught() -> None:
    def launch(x: Tensor, out: Tensor) -> None:
        out.copy_(kernel_out(x))
        out.add_(torch.empty(8, dtype=torch.float32, device=x.device).sum() * 0)

    assert "NaN" in check_variant(POOL, SMALL, launch, CPU).reason


@pytest.mark.parametrize("which", [0, 1])
def test_scratch_has_the_poison_of_its_launch(which: int) -> None:
    def launch() -> Tensor:
        return torch.empty(3, dtype=torch.int32, device=CPU)

    with guarded_scratch(launch, which) as made:
        assert launch().tolist() == [POISONS[which][1]] * 3
    assert len(made) == 1 and made[0].is_whole


def test_a_launch_that_fails_gives_torch_back() -> None:
    def launch(x: Tensor, out: Tensor) -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError):
        check_variant(POOL, SMALL, launch, CPU)
    assert isinstance(torch, type(pytest))
