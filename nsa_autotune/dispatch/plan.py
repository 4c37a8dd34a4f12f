"""A prepared launch: what a generated `launch` did, done again with other tensors by calling Triton's C launcher.

Prepared once for a call's strides, dtypes and numbers, and for aligned tensors; a call that is unlike gets one of its
own. Whatever a recording does not understand is launched by Triton itself, and counted by its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import itemgetter, or_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import triton_launch
from .recording import AllocationStep, KernelStep, Mapped, OperatorStep, Place, Recording, record
from .triton_launch import CannotPrepareError

ALIGNMENT_MASK = 15  # Triton compiles loads for pointers that are multiples of 16 bytes
MOST_PLANS = 8  # layouts and numbers of one shape

_address = Tensor.data_ptr
_contiguous = Tensor.is_contiguous
_dtype: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]

Tensors = Any  # a list, or a tuple where nothing is made
Pool = list[Any]  # the plan's constants, then the address of each tensor by its number
Do = Callable[[Tensors, Pool, int], None]
Plan = Callable[[Mapping[str, Any]], bool]


def getter(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The values at `keys`, as a tuple whatever their number."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda values: tuple(values[key] for key in keys)


def make_plan(recording: Recording, arguments: Mapping[str, Any], device: int, stream_of: Callable[[int], int]) -> Plan:
    """What launches again with the caller's tensors and returns True, or False if they are unlike the recorded ones.

    The sizes and devices of the tensors are those of the recording: who calls sees to that. A function, not an object,
    since every attribute would be read in every call.
    """
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    given = [arguments[name] for name in names]
    count, pick = len(arguments), getter(names)
    numbers = getter([name for name in arguments if name not in names])
    expected, flat, dtypes = numbers(arguments), list(map(_contiguous, given)), list(map(_dtype, given))
    views = [(number, given[number].stride()) for number, is_flat in enumerate(flat) if not is_flat]
    all_flat = all(flat)
    constants, steps = compile_steps(recording, len(given))
    only = steps[0] if len(steps) == 1 else None  # a kernel by itself: nothing is added to the tensors

    def plan(arguments: Mapping[str, Any]) -> bool:
        try:
            if len(arguments) != count or numbers(arguments) != expected:
                return False
            tensors = pick(arguments)
            addresses = list(map(_address, tensors))
        except (KeyError, TypeError):  # other names, or None where the recording had a tensor
            return False
        if (
            reduce(or_, addresses, 0) & ALIGNMENT_MASK
            or not (all(map(_contiguous, tensors)) if all_flat else list(map(_contiguous, tensors)) == flat)
            or list(map(_dtype, tensors)) != dtypes
            or (views and any(tensors[number].stride() != strides for number, strides in views))
        ):
            return False
        pool, stream = constants + addresses, stream_of(device)
        if only is not None:
            only(tensors, pool, stream)
            return True
        held = list(tensors)  # and what is made on the way
        for step in steps:
            step(held, pool, stream)
        return True

    return plan


def compile_steps(recording: Recording, num_given: int) -> tuple[Pool, list[Do]]:
    """The constants of all kernels, and a function for each step."""
    constants: Pool = []
    for step in recording.steps:
        if isinstance(step, KernelStep):
            constants += [value for value in step.arguments if not isinstance(value, (Place, Mapped))]
    done: list[Do] = []
    made, used = 0, 0  # tensors so far besides the caller's; constants so far
    for step in recording.steps:
        if isinstance(step, KernelStep):
            size = len(constants) + num_given + made
            done.append(kernel_call(step, used, len(constants), size))
            used += sum(not isinstance(value, (Place, Mapped)) for value in step.arguments)
        elif isinstance(step, AllocationStep):
            done.append(allocation(step))
            made += 1
        else:
            done.append(operator_call(step))
            made += step.makes
    return constants, done


def kernel_call(step: KernelStep, first: int, num_constants: int, pool_size: int) -> Do:
    """Launch a kernel: its constants stand in the pool from `first` on, addresses behind all constants."""
    maps: list[tuple[int, Callable[[int], Any], Callable[[int], Any]]] = []  # address, known map, map
    where: list[int] = []
    for value in step.arguments:
        if isinstance(value, Place):
            where.append(num_constants + value.number)
        elif isinstance(value, Mapped):
            where.append(pool_size + len(maps))
            tensor_map = value.tensor_map
            maps.append((num_constants + value.place.number, tensor_map.known.get, tensor_map.at))
        else:
            where.append(first)
            first += 1
    pick, (width, height, depth), middle = getter(where), step.grid, step.launcher.middle
    raw, flat = step.launcher.raw, step.launcher.flat

    def launch(tensors: Tensors, pool: Pool, stream: int) -> None:
        raw(width, height, depth, stream, *middle, pick(pool))

    def launch_mapped(tensors: Tensors, pool: Pool, stream: int) -> None:
        mapped = [known(pool[place]) or at(pool[place]) for place, known, at in maps]  # saves a call of Python's
        raw(width, height, depth, stream, *middle, pick(pool + mapped))

    def launch_flat(tensors: Tensors, pool: Pool, stream: int) -> None:
        mapped = [known(pool[place]) or at(pool[place]) for place, known, at in maps]
        raw(width, height, depth, stream, *middle, *pick(pool + mapped))

    if flat:
        return launch_flat
    return launch_mapped if maps else launch


def allocation(step: AllocationStep) -> Do:
    """Make a scratch tensor, from PyTorch's allocator as the launch itself does: safe for streams and graphs."""
    shape, dtype, device = step.shape, step.dtype, step.device
    empty = torch.empty

    def allocate(tensors: Tensors, pool: Pool, stream: int) -> None:
        made = empty(shape, dtype=dtype, device=device)
        tensors.append(made)
        pool.append(made.data_ptr())

    return allocate


def operator_call(step: OperatorStep) -> Do:
    """Call a PyTorch operator; what it makes is the next tensor."""
    function, arguments, named, makes = step.function, step.arguments, step.named, step.makes

    def value_of(value: Any, tensors: Tensors) -> Any:
        return tensors[value.number] if isinstance(value, Place) else value

    def call(tensors: Tensors, pool: Pool, stream: int) -> None:
        given = [value_of(value, tensors) for value in arguments]
        made = function(*given, **{name: value_of(value, tensors) for name, value in named.items()})
        if makes:
            tensors.append(made)
            pool.append(made.data_ptr())

    return call


class PreparedLaunch:
    """Serves the calls of one shape: by a plan that fits, else by recording one, else by the ordinary launch.

    trusted: raises CannotPrepareError where prepared launches are not known to be right. ordinary: counts the launches
    that went Triton's own way, by reason. explained: what is raised for an error of a launch.
    """

    def __init__(
        self,
        launch: FunctionType,
        trusted: Callable[[], None],
        ordinary: Counter[str],
        explained: Callable[[Exception], Exception],
    ) -> None:
        self._launch, self._trusted, self._ordinary, self._explained = launch, trusted, ordinary, explained
        self._plans: list[Plan] = []
        compiled = triton_launch.kernels_among(launch.__globals__)
        self._refusal = "" if compiled else "kernels are interpreted"
        self._hooked = triton_launch.hook_check()

    def __call__(self, arguments: Mapping[str, Any]) -> None:
        """Launch with tensors of this shape."""
        try:
            if not self._hooked():
                for plan in self._plans:
                    if plan(arguments):
                        return
            with triton_launch.FIRST_LAUNCHES:
                self._without_plan(arguments)
        except torch.OutOfMemoryError:
            raise  # the caller's to mend: no other config would need less
        except Exception as error:
            raise self._explained(error) from error

    def _without_plan(self, arguments: Mapping[str, Any]) -> None:
        if not self._hooked() and any(plan(arguments) for plan in self._plans):
            return  # another thread made it meanwhile
        try:
            self._check(arguments)
        except CannotPrepareError as error:
            self._ordinary[str(error)] += 1
            self._launch(**arguments)
            return
        recording = record(self._launch, arguments)
        if recording.refusal:
            self._refusal = recording.refusal
            self._ordinary[recording.refusal] += 1
            return
        self._plans.append(make_plan(recording, arguments, *triton_launch.active_device()))

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Raise CannotPrepareError if this call must not be recorded."""
        if self._refusal:
            raise CannotPrepareError(self._refusal)
        if self._hooked():
            raise CannotPrepareError("launch hooks are installed")
        if any(_address(value) & ALIGNMENT_MASK for value in arguments.values() if isinstance(value, Tensor)):
            raise CannotPrepareError("a tensor is not aligned to 16 bytes")
        if len(self._plans) >= MOST_PLANS:
            raise CannotPrepareError(f"a shape came in more than {MOST_PLANS} layouts")
        self._trusted()
