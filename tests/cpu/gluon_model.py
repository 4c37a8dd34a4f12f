"""Gluon's Hopper operations on the CPU, as late as the hardware may be: for kernels that the interpreter cannot run.

A tile asked for arrives when its barrier is waited for, and a product is done when it is waited for; reading either
before, writing over a tile that a product still reads, waiting for what was never asked for, or a missing fence, is an
error. Programs run one after the other, all their warps at once. `modelled` gives the launch function of a variant
whose kernel runs here.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import Rendered

STAND_IN = "INTERPRETED = triton.knobs.runtime.interpret"  # the line by which a variant asks for its stand-in
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Pointer:
    """A tensor's memory and offsets into it."""

    memory: Tensor  # flat
    offsets: Tensor

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """The first element."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), torch.tensor(tensor.storage_offset()))

    @property
    def dtype(self) -> Any:
        """As kernels ask for it."""
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)

    def checked(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Offsets, those that do not count set to 0, and which count; all that do lie inside."""
        counts = torch.ones_like(self.offsets, dtype=torch.bool) if mask is None else mask.expand(self.offsets.shape)
        offsets = torch.where(counts, self.offsets, 0)
        assert (offsets >= 0).all() and (offsets < self.memory.numel()).all(), "outside of the tensor"
        return offsets, counts


def load_from(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    """gl.load."""
    offsets, counts = pointer.checked(mask)
    found = pointer.memory[offsets]
    return torch.where(counts, found, torch.tensor(other, dtype=found.dtype))


def store_to(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    """gl.store."""
    offsets, counts = pointer.checked(mask)
    pointer.memory[offsets[counts]] = value.expand(offsets.shape)[counts]


@dataclass
class Barrier:
    """An mbarrier that one request at a time completes."""

    live: bool = False
    expected: int = 0  # bytes
    phases: int = 0  # completed
    arrivals: list[Callable[[], int]] = field(default_factory=list)  # each gives its bytes


@dataclass
class Buffer:
    """Shared memory: [stages, rows, columns], or rows and columns of an operand."""

    data: Tensor
    pending: set[int] = field(default_factory=set)  # asked for, not arrived
    readers: dict[int, int] = field(default_factory=dict)  # products in flight

    def index(self, stage: Any) -> View:
        """One stage."""
        return View(self, int(stage))


@dataclass(frozen=True)
class View:
    """A stage of a buffer, perhaps transposed."""

    buffer: Buffer
    stage: int
    transposed: bool = False

    def permute(self, order: tuple[int, int]) -> View:
        """The other way round."""
        assert order == (1, 0)
        return View(self.buffer, self.stage, not self.transposed)

    def read(self) -> Tensor:
        """The tile, which must have arrived."""
        assert self.stage not in self.buffer.pending, "a tile is read before it has arrived"
        tile = self.buffer.data[self.stage]
        return tile.t() if self.transposed else tile


class Barriers:
    """Shared memory for mbarriers."""

    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, stage: Any) -> Barrier:
        """One of them."""
        return self.each[int(stage)]


class Descriptor:
    """A host-side tensor descriptor."""

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any = None
    ) -> None:
        size = base.untyped_storage().nbytes() // base.element_size()
        inside = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + base.storage_offset() < size
        assert inside, "a descriptor reaches beyond its tensor"
        self.base, self.block_shape = base.as_strided(shape, strides), block_shape
        self.dtype, self.layout = base.dtype, layout


@dataclass
class Product:
    """An asynchronous product: its value is there once it was waited for."""

    compute: Callable[[], Tensor]
    value: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("a product is used before it was waited for")

    def __rmul__(self, other: Any) -> Any:
        raise AssertionError("a product is used before it was waited for")

    __mul__ = __rmul__


class Machine:
    """What a program runs on: where it is in the grid, and the products that are in flight."""

    def __init__(self) -> None:
        self.place: Grid = (0, 0, 0)
        self.grid: Grid = (1, 1, 1)
        self.num_warps = 4
        self.flying: list[Product] = []
        self.unfenced = False  # threads wrote to shared memory, and the asynchronous units may not see it yet

    def fence(self) -> None:
        """hopper.fence_async_shared."""
        self.unfenced = False

    def begin(self, barrier: Barrier, count: int) -> None:
        """mbarrier.init: one arrival, that of the thread which asks."""
        assert count == 1, "this barrier would wait for ever"
        barrier.live, self.unfenced = True, True

    def ask(self, descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, view: View) -> None:
        """tma.async_load; rows beyond the tensor are zeros."""
        assert not self.unfenced, "the copy engine does not see the barrier yet: a fence is missing"
        ask(descriptor, place, barrier, view)

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> Any:
        """gl.allocate_shared_memory."""
        if dtype == torch.int64:
            return Barriers(shape[0])
        self.unfenced = self.unfenced or value is not None
        return Buffer(torch.full(tuple(shape), float("nan"), dtype=dtype) if value is None else value)

    def multiply(self, a: Any, b: View, onto: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        """hopper.warpgroup_mma."""
        assert is_async and not isinstance(a, Product)
        assert not (isinstance(a, Buffer) and self.unfenced), "the matrix unit does not see its operand: no fence"
        b.read()
        readers = b.buffer.readers
        readers[b.stage] = readers.get(b.stage, 0) + 1

        def compute() -> Tensor:
            readers[b.stage] -= 1
            base = 0 if not use_acc else onto.value if isinstance(onto, Product) else onto
            left = a.data if isinstance(a, Buffer) else a
            return base + left.float() @ b.read().float()

        self.flying.append(Product(compute))
        return self.flying[-1]

    def wait(self, left: int, deps: Sequence[Any]) -> Any:
        """hopper.warpgroup_mma_wait: all but the `left` newest products end."""
        while len(self.flying) > left:
            product = self.flying.pop(0)
            product.value = product.compute()
        found = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        assert all(value is not None for value in found), "a product is used before it was waited for"
        return found[0] if len(found) == 1 else tuple(found)


def expect(barrier: Barrier, size: int) -> None:
    """mbarrier.expect."""
    assert barrier.live and not barrier.expected and not barrier.arrivals, "a tile is asked for twice"
    barrier.expected = size


def wait_for(barrier: Barrier, phase: Any) -> None:
    """mbarrier.wait."""
    if barrier.expected and sum(arrive() for arrive in barrier.arrivals) == barrier.expected:
        barrier.phases, barrier.expected = barrier.phases + 1, 0
    barrier.arrivals = []
    assert barrier.phases and (barrier.phases - 1) & 1 == int(phase), "this wait would last for ever"


def end(barrier: Barrier) -> None:
    """mbarrier.invalidate."""
    assert barrier.live and not barrier.arrivals, "a request is never waited for"
    barrier.live = False


def ask(descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, view: View) -> None:
    """A tile on its way."""
    buffer, (row, column), (height, width) = view.buffer, map(int, place), descriptor.block_shape
    assert not buffer.readers.get(view.stage), "a tile is written over while a product reads it"
    assert view.stage not in buffer.pending
    buffer.pending.add(view.stage)
    buffer.data[view.stage] = float("nan")

    def arrive() -> int:
        found = descriptor.base[row : row + height, column : column + width]
        tile = torch.zeros(height, width, dtype=descriptor.dtype)
        tile[: found.shape[0], : found.shape[1]] = found
        buffer.data[view.stage] = tile
        buffer.pending.discard(view.stage)
        return tile.numel() * tile.element_size()

    barrier.arrivals.append(arrive)


class Kernel:
    """A function under gluon.jit: `run` executes it for every program of the grid."""

    def __init__(self, function: Callable[..., None], machine: Machine) -> None:
        self.function, self.machine = function, machine

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool = False, **named: Any) -> None:
        """As Triton launches; options of the compiler are left out."""
        known = inspect.signature(self.function)
        self.machine.num_warps = named["num_warps"]
        bound = known.bind(*arguments, **{name: value for name, value in named.items() if name in known.parameters})
        values = [Pointer.to(value) if isinstance(value, Tensor) else value for value in bound.arguments.values()]
        x, y, z = (*grid, 1, 1)[:3]
        self.machine.grid = (x, y, z)
        for place in itertools.product(range(x), range(y), range(z)):
            self.machine.place, self.machine.unfenced = place, False
            self.function(*values)
            assert not self.machine.flying, "a product was not waited for"


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def language(machine: Machine) -> dict[str, Any]:
    """What kernels use of gluon.language; layouts mean nothing here."""
    nothing = lambda *_, **__: None  # noqa: E731
    layouts = ("NVMMADistributedLayout", "SliceLayout", "BlockedLayout", "DotOperandLayout")
    return {
        **dict.fromkeys(layouts, nothing),
        "NVMMASharedLayout": SimpleNamespace(get_default_for=nothing),
        "constexpr": object,
        **{name: getattr(torch, name) for name in ("int64", "int32", "float32", "bfloat16", "float16", "exp2", "log2")},
        "num_warps": lambda: machine.num_warps,
        "program_id": lambda axis: torch.tensor(machine.place[axis]),
        "num_programs": lambda axis: machine.grid[axis],
        "arange": lambda first, stop, layout=None: torch.arange(first, stop),
        "static_range": range,
        "minimum": lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
        "maximum": lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
        "where": torch.where,
        "sum": lambda x, axis: x.sum(axis),
        "min": lambda x, axis: x.min(axis).values,
        "max": lambda x, axis: x.max(axis).values,
        "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": machine.allocate,
        "load": load_from,
        "store": store_to,
    }


def hopper(machine: Machine) -> SimpleNamespace:
    """What kernels use of gluon.language.nvidia.hopper."""
    return SimpleNamespace(
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: None, init=machine.begin, invalidate=end, expect=expect, wait=wait_for
        ),
        tma=SimpleNamespace(async_load=machine.ask),
        warpgroup_mma=machine.multiply,
        warpgroup_mma_wait=machine.wait,
        warpgroup_mma_init=lambda accumulator: accumulator,
        fence_async_shared=machine.fence,
    )


def modules() -> dict[str, ModuleType]:
    """Stand-ins for Gluon's, by name."""
    machine, name = Machine(), "triton.experimental"
    found = {name + part: ModuleType(name + part) for part in ("", ".gluon", ".gluon.language", ".gluon.nvidia")}
    found[f"{name}.gluon.language.nvidia"] = ModuleType("nvidia")
    jit = lambda *functions, **_: Kernel(functions[0], machine) if functions else partial(Kernel, machine=machine)  # noqa: E731
    vars(found[f"{name}.gluon.language"]).update(language(machine))
    vars(found[f"{name}.gluon.language.nvidia"])["hopper"] = hopper(machine)
    vars(found[f"{name}.gluon.nvidia"])["hopper"] = SimpleNamespace(TensorDescriptor=Descriptor)
    vars(found[f"{name}.gluon"]).update(jit=jit, language=found[f"{name}.gluon.language"])
    vars(found[name])["gluon"] = found[f"{name}.gluon"]
    return found


def modelled(rendered: Rendered, patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The variant's launch function, with its Gluon kernel on the model and its other kernels in the interpreter."""
    assert STAND_IN in rendered.source, "not a Gluon variant"
    source = rendered.source.replace(STAND_IN, "INTERPRETED = False")
    with patch.context() as while_loading:  # the interpreter asks for Gluon's own modules later
        for name, module in modules().items():
            while_loading.setitem(sys.modules, name, module)
        launch: Callable[..., Any] = load(replace(rendered, source=source, digest=f"{rendered.digest}model")).launch
    return launch
