"""What a generated `launch` does, seen once: its kernels, its scratch tensors, and its PyTorch operators between them.

The real launch runs while it is watched. Nothing of Triton or PyTorch is patched: the generated module's functions are
copied over a namespace in which each kernel is wrapped, and PyTorch tells a dispatch mode of this thread what it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import triton_launch
from .triton_launch import CannotPrepareError, Launcher, TensorMap

ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty")
STRIDELESS = frozenset(  # what may be asked of a tensor without its strides having a part; whatever is not here has
    ("data_ptr", "device", "dim", "dtype", "element_size", "is_cuda", "ndim", "new_empty", "numel", "shape", "size")
)


@dataclass(frozen=True)
class Place:
    """A tensor by its number: the caller's come first, then those made on the way, in order."""

    number: int


@dataclass(frozen=True)
class Mapped:
    """The tensor map of the tensor `place`."""

    place: Place
    tensor_map: TensorMap


@dataclass(frozen=True)
class KernelStep:
    """One launch; an argument is a Place, a Mapped or a constant."""

    launcher: Launcher
    grid: tuple[int, ...]  # x, y, z
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class AllocationStep:
    """A scratch tensor, contiguous, its content undefined."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OperatorStep:
    """A PyTorch operator; an argument is a Place or a constant. `makes` a new tensor, or changes one in place."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    makes: bool


Step = KernelStep | AllocationStep | OperatorStep


class StridesAsked(TorchFunctionMode):
    """Notes the tensors whose strides may have a part in what a launch does: any but STRIDELESS was asked of them."""

    def __init__(self) -> None:
        super().__init__()
        self._ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _asked_name(func) not in STRIDELESS:
            self._ids.update(id(value) for value in _flat((*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))

    def of(self, tensor: Tensor) -> bool:
        """True if the tensor is one of them."""
        return id(tensor) in self._ids


def _asked_name(func: Any) -> str:
    """The method, or the property behind a getter."""
    name = getattr(func, "__name__", "")
    return str(func.__self__.__name__ if name == "__get__" else name)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and those in lists and tuples among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


class Recording(TorchDispatchMode):
    """The steps of one launch; `refusal` says why they cannot stand for it, "" if they can.

    strided: names of the launch's tensors whose strides have a part in it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.refusal = ""
        self.strided: frozenset[str] = frozenset()
        self._kept = list(tensors)  # while they live, their ids are theirs
        self._count = len(tensors)
        self._places = {id(tensor): Place(number) for number, tensor in enumerate(tensors)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default and id(args[0]) in self._places:
            self._alias(args[0], made)  # PyTorch wraps what was just allocated
        else:
            self._note(lambda: self._operator(func, args, kwargs or {}, made))
        return made

    def launched(self, kernel: Any, compiled: Any, grid: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Note a kernel that was just launched."""
        self._note(lambda: self._kernel(kernel, compiled, grid, given, named))

    def _alias(self, tensor: Tensor, made: Tensor) -> None:
        self._places[id(made)] = self._places[id(tensor)]
        self._kept.append(made)

    def _note(self, step: Callable[[], Step]) -> None:
        if self.refusal:
            return
        try:
            self.steps.append(step())
        except CannotPrepareError as error:
            self.refusal = str(error)
        except Exception as error:  # internals of Triton that are not as expected; the launch itself was right
            self.refusal = f"{type(error).__name__}: {error}"

    def _operator(self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], made: Any) -> Step:
        if not isinstance(made, Tensor):
            raise CannotPrepareError(f"{func} gives no tensor")
        makes = id(made) not in self._places
        constants = self._constants(args), dict(zip(named, self._constants(named.values()), strict=True))
        if makes:
            self._places[id(made)] = Place(self._count)
            self._kept.append(made)
            self._count += 1
        if func._schema.name in ALLOCATIONS and made.is_contiguous():
            return AllocationStep(tuple(made.shape), made.dtype, made.device)
        return OperatorStep(func, *constants, makes)

    def _constants(self, values: Any) -> tuple[Any, ...]:
        """The values, with tensors as their places."""
        return tuple(self._place(value) if isinstance(value, Tensor) else _constant(value) for value in values)

    def _place(self, tensor: Tensor) -> Place:
        try:
            return self._places[id(tensor)]
        except KeyError:
            raise CannotPrepareError("a tensor comes from outside of the launch") from None

    def _kernel(
        self, kernel: Any, compiled: Any, grid: Any, given: tuple[Any, ...], named: Mapping[str, Any]
    ) -> KernelStep:
        if kernel.pre_run_hooks or compiled is None:
            raise CannotPrepareError("the kernel has hooks of its own")
        if callable(grid):
            raise CannotPrepareError("the grid is a function")
        values = triton_launch.bound_arguments(kernel, given, named)
        described = [value for value in values if triton_launch.is_descriptor(value)]
        maps = iter(triton_launch.tensor_maps(compiled, described) if described else ())
        arguments: list[Any] = []
        for value in values:
            if triton_launch.is_descriptor(value):
                place, tensor_map = self._place(value.base), next(maps)
                _, *sizes = tensor_map.encode(value.base.data_ptr())
                arguments += [Mapped(place, tensor_map), *sizes]
            else:
                arguments += self._constants([value])
        return KernelStep(triton_launch.launcher_of(compiled), (*grid, 1, 1)[:3], tuple(arguments))


def _constant(value: Any) -> Any:
    """The value if it holds no tensor."""
    if isinstance(value, (list, tuple)):
        return type(value)(_constant(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout)):
        return value
    if isinstance(value, torch.memory_format):
        return value
    raise CannotPrepareError(f"an argument is a {type(value).__name__}")


class Watched:
    """A kernel of a generated module whose launches are noted."""

    def __init__(self, kernel: Any, recording: Recording) -> None:
        self._kernel, self._recording = kernel, recording

    def run(self, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        """Launch as Triton does, then note it."""
        compiled = self._kernel.run(*given, grid=grid, warmup=warmup, **named)
        self._recording.launched(self._kernel, compiled, grid, given, named)
        return compiled

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self.run, grid=grid, warmup=False)


def record(launch: Any, arguments: Mapping[str, Any]) -> Recording:
    """Run `launch(**arguments)` and note its steps; its errors pass through.

    The tensors are given as aliases of the caller's, so that each is one object even if two arguments are the same.
    """
    aliases = {name: value.detach() for name, value in arguments.items() if isinstance(value, Tensor)}
    recording = Recording(list(aliases.values()))
    watched, asked = _over_watched_kernels(launch, recording), StridesAsked()
    with recording, asked:
        watched(**{**arguments, **aliases})
    recording.strided = frozenset(name for name, alias in aliases.items() if asked.of(alias))
    return recording


def _over_watched_kernels(launch: FunctionType, recording: Recording) -> Callable[..., Any]:
    """A copy of the function, and of its module's other functions, over a namespace with watched kernels."""
    names = dict(launch.__globals__)
    kernels = triton_launch.kernels_among(names)
    for name, value in launch.__globals__.items():
        if isinstance(value, FunctionType) and value.__globals__ is launch.__globals__:
            names[name] = FunctionType(value.__code__, names, name, value.__defaults__, value.__closure__)
            names[name].__kwdefaults__ = value.__kwdefaults__
    names.update({name: Watched(kernel, recording) for name, kernel in kernels.items()})
    watched: Callable[..., Any] = names[launch.__name__]
    return watched
