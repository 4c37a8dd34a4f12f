"""The one place that knows how Triton launches a compiled kernel: its CUDA launcher in versions 3.6 to 3.9.

Up to 3.6 a launcher takes the kernel's arguments one by one and builds a C file for every signature; from 3.7 on one C
function takes them in a tuple, with a description of their types. Addresses may be given as ints in both.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

OLDEST, NEWEST, FLAT_UNTIL = (3, 6), (3, 9), (3, 6)
FIRST_LAUNCHES = threading.RLock()  # side by side, ast.parse of Python 3.11 fails, so compiling does
MAPS_KEPT = 64  # tensor maps a kernel argument remembers, one an address; each is 128 bytes


class CannotPrepareError(Exception):
    """Why Triton's ordinary launch has to serve; never reaches the user."""


@dataclass(frozen=True)
class Launcher:
    """What a compiled kernel is launched by: `raw(x, y, z, stream, *middle, ...)`, then its arguments."""

    raw: Callable[..., Any]
    middle: tuple[Any, ...]
    flat: bool  # arguments one by one; else in one tuple
    compiled: Any  # kept: the binary is unloaded with it


class TensorMap:
    """Hardware descriptors of one kernel argument, by address: encoded when an address is new."""

    def __init__(self, encode: Callable[[Any], Any], descriptor: Any) -> None:
        self._encode = encode
        self._descriptor = copy.copy(descriptor)
        self._descriptor.base = None  # a plan keeps no tensor alive
        self.known: dict[int, Any] = {}  # by address

    def at(self, address: int) -> Any:
        """The descriptor of a tensor that begins at `address`."""
        return self.known.get(address) or self.encode(address)[0]

    def encode(self, address: int) -> list[Any]:
        """The descriptor, then its sizes and strides: what stands in its place among the arguments."""
        descriptor = copy.copy(self._descriptor)
        descriptor.base = Address(address)
        arguments = list(self._encode(descriptor))
        if len(self.known) >= MAPS_KEPT:
            self.known.clear()
        self.known[address] = arguments[0]
        return arguments


@dataclass(frozen=True)
class Address:
    """Stands for a tensor where Triton asks for nothing but its address."""

    address: int

    def data_ptr(self) -> int:
        """The address in bytes."""
        return self.address


def triton_version() -> tuple[int, ...]:
    """Major and minor version."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def check_version() -> None:
    """Raise CannotPrepareError for a Triton that this module was not written for."""
    found = triton_version()
    if not OLDEST <= found <= NEWEST:
        raise CannotPrepareError(f"Triton {'.'.join(map(str, found))} is not known here")


def launcher_of(compiled: Any) -> Launcher:
    """The launcher of a compiled kernel that has run before; raises CannotPrepareError for what is unusual."""
    run = compiled.run
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if not all(hasattr(run, name) for name in names):
        raise CannotPrepareError(f"launcher {type(run).__name__} is not known here")
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        raise CannotPrepareError("the kernel needs scratch memory of Triton's")
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    nothing = (None, None, None)  # launch metadata, and hooks around the launch
    if triton_version() <= FLAT_UNTIL:
        return Launcher(_raw(run.launch), (*head, None, None, compiled.packed_metadata, *nothing), True, compiled)
    types = (run.arg_annotations, run.kernel_signature)
    return Launcher(_raw(run.launch), (*head, compiled.packed_metadata, *nothing, None, None, *types), False, compiled)


def _raw(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The C function behind a launch that encodes descriptors first."""
    if not isinstance(launch, FunctionType) or launch.__closure__ is None:
        return launch
    inner: Any = inspect.getclosurevars(launch).nonlocals.get("launcher")
    if not callable(inner):
        raise CannotPrepareError("the launch of tensor descriptors is not known here")
    return inner  # type: ignore[no-any-return]


def tensor_maps(compiled: Any, descriptors: list[Any]) -> list[TensorMap]:
    """Encoders for the descriptors among a kernel's arguments, in their order."""
    from triton.backends.nvidia import driver

    known = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    if len(known) != len(descriptors) or None in known:
        raise CannotPrepareError("descriptors without a tensor map are not known here")
    make = driver.make_tensordesc_arg
    extra = (None,) * (len(inspect.signature(make).parameters) - 2)  # from 3.8 on one more, unused for these

    def encoder(metadata: Any) -> Callable[[Any], Any]:
        return lambda descriptor: make(descriptor, metadata, *extra)

    return [TensorMap(encoder(metadata), one) for metadata, one in zip(known, descriptors, strict=True)]


def is_descriptor(value: object) -> bool:
    """True for a host-side tensor descriptor, Triton's or Gluon's."""
    return type(value).__name__ == "TensorDescriptor" and hasattr(value, "block_shape")


def kernels_among(names: Mapping[str, Any]) -> dict[str, Any]:
    """The compiled kind of Triton functions of a module; those of the interpreter are of another kind."""
    from triton.runtime.jit import JITFunction

    return {name: value for name, value in names.items() if isinstance(value, JITFunction)}


def bound_arguments(kernel: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
    """A launch's arguments in the order of the kernel's parameters, without compiler options."""
    parameters = kernel.signature.parameters
    bound = kernel.signature.bind(*given, **{name: value for name, value in named.items() if name in parameters})
    bound.apply_defaults()
    return list(bound.arguments.values())


def active_device() -> tuple[int, Callable[[int], int]]:
    """The current device's index, and what gives the current stream of a device."""
    from triton.runtime import driver

    active = driver.active
    return active.get_current_device(), active.get_current_stream


def hook_check() -> Callable[[], bool]:
    """What tells whether a profiler has hooks around launches: those are for Triton's ordinary launch to call."""
    from triton import knobs

    runtime, chain = knobs.runtime, knobs.HookChain

    def hooked() -> bool:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if type(enter) is chain and type(leave) is chain:
            return bool(enter.calls or leave.calls)
        return not (enter is None and leave is None)

    return hooked
