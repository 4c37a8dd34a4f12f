"""The text of a prepared launch: what it passes on, what it refuses, and where scratch comes from."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_autotune.dispatch import plan_source
from nsa_autotune.dispatch.plan_source import MOST_RAW, PlanSource, contiguous_strides, raw_memory, short_allocator
from nsa_autotune.dispatch.recording import AllocationStep, KernelStep, Mapped, OperatorStep, Place
from nsa_autotune.dispatch.triton_launch import Launcher

CPU = torch.device("cpu")


class Raw:
    """Stands for Triton's C function; keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> None:
        self.calls.append(given)


def plan_of(steps: Sequence[Any], arguments: dict[str, Any], strided: Sequence[str] = ("x", "turned")) -> Any:
    source = PlanSource()
    source.check(arguments, [name for name in strided if name in arguments])
    source.launch(SimpleNamespace(steps=steps), 3, lambda device: 70 + device)  # type: ignore[arg-type]
    return source.compiled()


def kernel(raw: Raw, *arguments: Any, flat: bool = False) -> KernelStep:
    return KernelStep(Launcher(raw, ("m0", None), flat, None), (4, 5, 6), arguments)


def test_a_kernel_gets_addresses_constants_and_the_stream() -> None:
    raw, x, y = Raw(), torch.zeros(4), torch.zeros(8)
    given = {"x": x, "scale": 0.5, "y": y}
    for flat in (False, True):
        plan = plan_of([kernel(raw, Place(1), 7, Place(0), flat=flat)], given)
        assert plan(given)
        values = (y.data_ptr(), 7, x.data_ptr())
        assert raw.calls.pop() == (4, 5, 6, 73, "m0", None, *(values if flat else (values,)))
        other = {"x": torch.ones(4), "scale": 0.5, "y": y}
        assert plan(other) and other["x"].data_ptr() in (raw.calls[-1] if flat else raw.calls[-1][-1])  # type: ignore[attr-defined]
        raw.calls.clear()


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": 0.25},
        {"x": torch.zeros(5)[1:]},  # not aligned
        {"x": torch.zeros(8)[::2]},
        {"x": None},
        {"turned": torch.zeros(3, 2).t().contiguous()},
        {"turned": torch.zeros(3, 4)[:, :2].t()},
        {"more": 1},
    ],
    ids=str,
)
def test_a_call_that_is_unlike_is_refused_and_launches_nothing(changed: dict[str, Any]) -> None:
    raw = Raw()
    given = {"x": torch.zeros(4), "turned": torch.zeros(3, 2).t(), "scale": 0.5}
    plan = plan_of([kernel(raw, Place(0))], given)
    assert not plan({**given, **changed}) and raw.calls == []
    assert not plan({"x": given["x"], "z": 1, "scale": 0.5}) and raw.calls == []
    assert plan(dict(given)) and len(raw.calls) == 1


def test_strides_without_a_part_in_the_launch_may_be_any() -> None:
    raw = Raw()
    plan = plan_of([kernel(raw, Place(0))], {"x": torch.zeros(3, 2)}, strided=())
    turned = torch.zeros(2, 3).t()
    assert plan({"x": turned}) and raw.calls[-1][-1] == (turned.data_ptr(),)


def test_a_misaligned_tensor_is_served_misaligned_only() -> None:
    raw, odd = Raw(), torch.zeros(5)[1:]
    plan = plan_of([kernel(raw, Place(0))], {"x": odd, "turned": torch.zeros(4)})
    assert not plan({"x": torch.zeros(4), "turned": torch.zeros(4)}) and raw.calls == []
    assert not plan({"x": odd, "turned": torch.zeros(5)[1:]}) and raw.calls == []
    assert plan({"x": torch.zeros(7)[3:], "turned": torch.zeros(4)}) and len(raw.calls) == 1


def test_only_small_scratch_is_raw_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C while it is taken loses it."""
    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", "take", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", "give back", raising=False)
    small, large = (AllocationStep((n,), torch.float16, torch.device("cuda")) for n in (1 << 19, (1 << 19) + 1))
    assert raw_memory(small) == ("take", "give back") and raw_memory(large) is None
    assert raw_memory(AllocationStep((4,), torch.float16, CPU)) is None
    assert raw_memory(AllocationStep((0,), torch.float16, torch.device("cuda"))) is None


def test_many_scratch_tensors_make_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python nests 20 blocks."""
    held: list[int] = []

    def take(num_bytes: int, stream: int) -> int:
        held.append(1000 + len(held))
        return held[-1]

    monkeypatch.setattr(plan_source, "raw_memory", lambda step: (take, held.remove))
    raw, x = Raw(), torch.zeros(4)
    steps = [*(AllocationStep((16,), torch.float32, CPU) for _ in range(30)), kernel(raw, *map(Place, range(31)))]
    assert plan_of(steps, {"x": x})({"x": x}) and held == []
    first, *others = raw.calls[0][-1]
    assert first == x.data_ptr() and others[:MOST_RAW] == [1000 + n for n in range(MOST_RAW)]
    assert len(set(others)) == 30 and min(others[MOST_RAW:]) > 1 << 20, "the rest are tensors"


def test_a_tensor_that_came_twice_must_come_twice_again() -> None:
    """Pools that branches share are looked at once."""
    raw, x, y = Raw(), torch.zeros(4), torch.zeros(4)
    plan = plan_of([kernel(raw, Place(0), Place(1))], {"x": x, "turned": x})
    assert not plan({"x": x, "turned": y}) and raw.calls == []
    assert plan({"x": y, "turned": y}) and raw.calls[-1][-1] == (y.data_ptr(),) * 2
    assert not plan({"x": torch.zeros(8)[::2], "turned": torch.zeros(4)})
    view = torch.zeros(8)[::2]
    assert not plan({"x": view, "turned": view}) and len(raw.calls) == 1


def test_an_odd_stride_of_a_dimension_of_size_one_keeps_its_plan_to_itself() -> None:
    """Triton specializes a kernel for strides; PyTorch calls such a tensor contiguous."""
    odd, usual = torch.zeros(64).as_strided((1, 4, 4), (7, 4, 1)), torch.zeros(1, 4, 4)
    assert odd.is_contiguous()
    raw = Raw()
    plan = plan_of([kernel(raw, Place(0))], {"x": odd})
    assert not plan({"x": usual}) and plan({"x": odd}) and len(raw.calls) == 1


@pytest.mark.parametrize("short", [True, False])
def test_scratch_is_made_for_each_launch_and_operators_run_between(
    short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not short:
        monkeypatch.setattr(plan_source, "short_allocator", lambda device: None)
    made: list[torch.Tensor] = []

    def note(tensor: torch.Tensor, value: float, *, twice: torch.Tensor) -> None:
        made.append(tensor)
        tensor.fill_(value).add_(twice.sum())

    raw, x = Raw(), torch.ones(4)
    steps = [
        AllocationStep((2, 3), torch.float64, CPU),
        OperatorStep(note, (Place(1), 2.0), {"twice": Place(0)}, makes=False),
        OperatorStep(torch.mul, (Place(0), 3.0), {}, makes=True),
        kernel(raw, Place(0), Place(1), Place(2)),
    ]
    plan = plan_of(steps, {"x": x})
    assert plan({"x": x}) and plan({"x": x})
    first, second = made
    assert first is not second and first.shape == (2, 3) and first.dtype == torch.float64 and first.is_contiguous()
    assert second.tolist() == [[6.0] * 3] * 2
    assert raw.calls[1][-1][:2] == (x.data_ptr(), second.data_ptr()) and len(set(raw.calls[1][-1])) == 3


def test_scratch_of_kernels_alone_is_raw_memory_and_given_back_whatever_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[int] = []

    def take(num_bytes: int, stream: int) -> int:
        held.append(num_bytes)
        return 4096 * num_bytes + stream

    def give_back(address: int) -> None:
        assert address == 4096 * held.pop() + 73

    monkeypatch.setattr(plan_source, "raw_memory", lambda step: (take, give_back) if step.num_bytes else None)
    seen: list[Any] = []

    def raw(*given: Any) -> None:
        seen.append((given[-1], list(held)))
        if len(seen) == 2:
            raise RuntimeError("no room")

    x = torch.ones(4)
    steps = [
        AllocationStep((2, 3), torch.float64, CPU),
        AllocationStep((0,), torch.float32, CPU),
        AllocationStep((5,), torch.float32, CPU),
        AllocationStep((7,), torch.float16, CPU),
        OperatorStep(torch.Tensor.fill_, (Place(3), 2.0), {}, makes=False),
        kernel(raw, Place(0), Place(1), Place(2), Place(3), Place(4)),  # type: ignore[arg-type]
    ]
    plan = plan_of(steps, {"x": x})
    assert plan({"x": x}) and held == []
    ((address, wide, empty, filled, half), while_launched), *_ = seen
    assert (address, wide, half) == (x.data_ptr(), 4096 * 48 + 73, 4096 * 14 + 73) and while_launched == [48, 14]
    assert empty == 0 and filled > 1 << 20, "an operator takes a tensor"
    with pytest.raises(RuntimeError, match="no room"):
        plan({"x": x})
    assert held == [] and len(seen) == 2


def test_a_tensor_map_is_looked_up_by_address_and_made_when_new() -> None:
    x, raw = torch.zeros(4), Raw()
    known: dict[int, str] = {}
    tensor_map: Any = SimpleNamespace(known=known, at=lambda address: known.setdefault(address, f"map {address}"))
    plan = plan_of([kernel(raw, Mapped(Place(0), tensor_map), 1)], {"x": x})
    assert plan({"x": x}) and raw.calls[0][-1] == (f"map {x.data_ptr()}", 1)
    known[x.data_ptr()] = "kept"
    assert plan({"x": x}) and raw.calls[1][-1] == ("kept", 1)


def test_this_pytorch_has_the_short_way_to_scratch() -> None:
    assert short_allocator(CPU) is not None  # else launches with scratch cost a microsecond more
    assert short_allocator(torch.device("meta")) is None
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1) and contiguous_strides(()) == ()
