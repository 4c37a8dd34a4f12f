"""The text of a prepared launch: one Python function for one recording, without a loop or a lookup left in it.

A call of Python's costs as much as a launch, so what is known when a plan is made stands in its text:

    def plan(arguments):
        try:
            t0 = arguments['x']
            a0 = t0.data_ptr()
            if len(arguments) != 2 or a0 & 15 or not t0.is_contiguous() or ...:
                return False
        except (AttributeError, KeyError, TypeError):
            return False
        stream = v1(v2)
        given = v3()
        given[0] = a0
        call = v4()
        call[3] = stream
        call[17] = tuple(given)
        v5(*call)
        return True
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .recording import AllocationStep, KernelStep, Mapped, OperatorStep, Place, Recording, Step

ALIGNMENT_MASK = 15  # Triton compiles other loads for pointers that are multiples of 16 bytes
MOST_RAW_BYTES = 1 << 20  # of raw scratch: a Ctrl-C while it is taken loses it
MOST_RAW = 8  # of them in a plan, each in a `try` within the last: Python takes 20
UNLIKE = "(AttributeError, KeyError, TypeError)"  # other names, or None where the recording had a tensor


class Text(str):
    """An expression of a plan."""


class PlanSource:
    """Lines of a plan, and what the names in them stand for: v0, v1, ... are values, t and a tensors and addresses."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}
        self.num_tensors = 0
        self._indent = "  "
        self._raw: list[tuple[str, str]] = []  # raw scratch that is held: the indent before it, and what ends it

    def name(self, value: Any) -> str:
        """A new name for a value."""
        name = f"v{len(self.values)}"
        self.values[name] = value
        return name

    def compiled(self) -> Callable[[Mapping[str, Any]], bool]:
        """The function."""
        text = "\n".join([f"def make({', '.join(self.values)}):", " def plan(arguments):", *self.lines, " return plan"])
        names: dict[str, Any] = {}
        exec(compile(text, "<prepared launch>", "exec"), names)
        plan: Callable[[Mapping[str, Any]], bool] = names["make"](**self.values)
        return plan

    def check(self, arguments: Mapping[str, Any], strided: Collection[str]) -> None:
        """Take the tensors out of the arguments and return False if any argument is unlike the recorded one.

        strided: the tensors whose strides have a part in the launch; those of the others may be any.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        lines, checks = ["try:"], [f"len(arguments) != {len(arguments)}"]
        first: dict[int, int] = {}  # number by id
        aligned: list[str] = []  # addresses
        looked_at = {id(tensors[name]) for name in strided}
        for number, (name, tensor) in enumerate(tensors.items()):
            lines.append(f" t{number} = arguments[{name!r}]")
            same = first.setdefault(id(tensor), number)
            if same != number:  # keys and values of two branches: looked at once
                lines.append(f" a{number} = a{same}")
                checks.append(f"t{number} is not t{same}")
                continue
            lines.append(f" a{number} = t{number}.data_ptr()")
            if tensor.data_ptr() & ALIGNMENT_MASK:  # such as a column of the gates
                checks.append(f"not a{number} & {ALIGNMENT_MASK}")
            else:
                aligned.append(f"a{number}")
            if id(tensor) not in looked_at:
                continue
            if tensor.stride() == contiguous_strides(tensor.shape):  # is_contiguous() forgives dimensions of size 1
                checks.append(f"not t{number}.is_contiguous()")
            else:
                checks.append(f"t{number}.stride() != {self.name(tensor.stride())}")
        self.num_tensors = len(tensors)
        if aligned:
            checks.append(f"({' | '.join(aligned)}) & {ALIGNMENT_MASK}")
        numbers = [(name, value) for name, value in arguments.items() if name not in tensors]
        checks += [f"arguments[{name!r}] != {self.name(value)}" for name, value in numbers]
        lines += [f" if {' or '.join(checks)}:", "  return False", f"except {UNLIKE}:", " return False"]
        self._add(*lines)

    def launch(self, recording: Recording, device: int, stream_of: Callable[[int], int]) -> None:
        """Do what was recorded, on the current stream."""
        self._add(f"stream = {self.name(stream_of)}({self.name(device)})")
        as_tensors = places_in_operators(recording.steps)
        for step in recording.steps:
            if isinstance(step, KernelStep):
                self._kernel(step)
            elif isinstance(step, OperatorStep):
                self._operator(step)
            else:
                by_tensor = Place(self.num_tensors) in as_tensors or len(self._raw) == MOST_RAW
                raw = None if by_tensor else raw_memory(step)
                self._allocation(step) if raw is None else self._raw_allocation(step, *raw)
        while self._raw:
            self._indent, ending = self._raw.pop()
            self._add("finally:", f" {ending}")
        self._add("return True")

    def _add(self, *lines: str) -> None:
        self.lines += [f"{self._indent}{line}" for line in lines]

    def _kernel(self, step: KernelStep) -> None:
        launcher = step.launcher
        given = [self._argument(value) for value in step.arguments]
        if not launcher.flat:
            self._filled("given", given)
            given = [Text("tuple(given)")]
        self._filled("call", [*step.grid, Text("stream"), *launcher.middle, *given])
        self._add(f"{self.name(launcher.raw)}(*call)")

    def _filled(self, name: str, values: Sequence[Any]) -> None:
        """A list of the values: to copy the constants and set the rest takes half the time of naming each."""
        constants = [None if isinstance(value, Text) else value for value in values]
        self._add(f"{name} = {self.name(constants.copy)}()")
        self._add(*(f"{name}[{place}] = {value}" for place, value in enumerate(values) if isinstance(value, Text)))

    def _argument(self, value: Any) -> Any:
        """Text for what differs from call to call, else the value."""
        if isinstance(value, Place):
            return Text(f"a{value.number}")
        if isinstance(value, Mapped):
            address, tensor_map = f"a{value.place.number}", value.tensor_map
            return Text(f"{self.name(tensor_map.known.get)}({address}) or {self.name(tensor_map.at)}({address})")
        return value

    def _allocation(self, step: AllocationStep) -> None:
        """A scratch tensor from PyTorch's allocator, as the launch itself makes it: safe for streams and graphs."""
        shape, strides = self.name(step.shape), self.name(contiguous_strides(step.shape))
        short = short_allocator(step.device)
        if short is not None:
            self._made(f"{self.name(short)}({shape}, {strides}, {self.name(step.dtype)})")
            return
        how = f"dtype={self.name(step.dtype)}, device={self.name(step.device)}"
        self._made(f"{self.name(torch.empty_strided)}({shape}, {strides}, {how})")

    def _raw_allocation(self, step: AllocationStep, take: Callable[..., int], give_back: Callable[..., None]) -> None:
        """Scratch from the same allocator that only kernels see, so that no tensor need be made of it."""
        number = self.num_tensors
        self._add(f"a{number} = {self.name(take)}({self.name(step.num_bytes)}, stream)", "try:")
        self._raw.append((self._indent, f"{self.name(give_back)}(a{number})"))
        self._indent += " "
        self.num_tensors += 1

    def _operator(self, step: OperatorStep) -> None:
        given = [self._tensor(value) for value in step.arguments]
        given += [f"{name}={self._tensor(value)}" for name, value in step.named.items()]
        call = f"{self.name(step.function)}({', '.join(given)})"
        if step.makes:
            self._made(call)
        else:
            self._add(call)

    def _tensor(self, value: Any) -> str:
        return f"t{value.number}" if isinstance(value, Place) else self.name(value)

    def _made(self, call: str) -> None:
        """The next tensor, as the recording numbers them."""
        number = self.num_tensors
        self._add(f"t{number} = {call}", f"a{number} = t{number}.data_ptr()")
        self.num_tensors += 1


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements, the last dimension dense."""
    return torch.empty(shape, device="meta").stride()


def places_in_operators(steps: Sequence[Step]) -> set[Place]:
    """The tensors that PyTorch's operators take: those need be tensors."""
    found: set[Place] = set()
    for step in steps:
        if isinstance(step, OperatorStep):
            found |= {v for v in (*step.arguments, *step.named.values()) if isinstance(v, Place)}
    return found


def raw_memory(step: AllocationStep) -> tuple[Callable[..., int], Callable[..., None]] | None:
    """What takes memory for a stream from PyTorch's allocator, (bytes, stream), and gives it back, (address): what
    torch.cuda.caching_allocator_alloc does, in half the time of a tensor. None where there is no such way."""
    names = ("_cuda_cudaCachingAllocator_raw_alloc", "_cuda_cudaCachingAllocator_raw_delete")
    take, give_back = (getattr(torch._C, name, None) for name in names)
    fits = step.device.type == "cuda" and 0 < step.num_bytes <= MOST_RAW_BYTES
    return (take, give_back) if fits and take is not None and give_back is not None else None


def short_allocator(device: torch.device) -> Callable[..., Tensor] | None:
    """What compiled PyTorch programs allocate by, a third of the usual way's time: (shape, strides, dtype), on the
    current device, where a kernel is launched anyway. None where this PyTorch has none."""
    name = f"_empty_strided_{device.type}"
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    found: Callable[..., Tensor] | None = getattr(guards, name, None)
    return found
