"""From tensors to a dispatched kernel, forward and backward; CPU tensors go to the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher, by_number
from ..dispatch.sources import default_winners
from ..errors import InvalidInput, KernelError
from ..kernels import FUSED, get_spec
from ..layout import PackedLayout
from ..spec import DEFAULT_LOCALITY, KernelSpec, Problem


@dataclass(frozen=True)
class Call:
    """What the kernels of one call share besides their tensors."""

    config: NSAConfig
    seq_k: int  # raw keys, those of all sequences if packed
    scale: float
    layout: PackedLayout | None
    dispatcher: Dispatcher | None


@cache
def default_dispatcher() -> Dispatcher:
    """The dispatcher that serves calls without one of their own: winners of the default database."""
    return Dispatcher(default_winners())


def export_misses(path: str | Path) -> int:
    """Write what calls without a dispatcher of their own asked for and was not tuned, for `tune --from-misses`.

    One JSON object a line: family, problem, launches, and the step that served; returns how many.
    """
    return default_dispatcher().export_misses(path)


def handle_of(dispatcher: Dispatcher | None, strict: bool = False) -> int:
    """A number for an operator's argument: twice the dispatcher's own (0 for the default one), plus `strict`."""
    if dispatcher is not None and not isinstance(dispatcher, Dispatcher):
        values = {"dispatcher": type(dispatcher).__name__}
        raise InvalidInput("dispatcher must be a Dispatcher, or None for the default one", values)
    return 2 * (0 if dispatcher is None else dispatcher.number) + strict


def from_handle(handle: int, x: Tensor) -> Dispatcher | None:
    """The dispatcher behind a handle; None for the default one, which stays closed if the equations serve x."""
    number, strict = divmod(handle, 2)
    dispatcher = by_number(number) if number else None
    if strict and on_kernels(x):
        return (dispatcher or default_dispatcher()).stricter()
    return dispatcher


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the scores: `scale`, or 1 / sqrt(D_QK); kernels may scale a row's maximum, so it is positive."""
    factor = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    if not 0.0 < factor < math.inf:
        raise InvalidInput("scale must be positive and finite", {"scale": factor}, "Negate q instead of the scale.")
    return factor


def packing_of(layout: PackedLayout | None) -> int | None:
    """What the sizes of index tensors depend on besides the numbers of queries and keys; None when batched."""
    return None if layout is None else layout.num_cmp_rows


def index_of(layout: PackedLayout | None) -> list[Tensor]:
    """What operators take of a layout."""
    return [] if layout is None else layout.tensors()


def on_kernels(x: Tensor) -> bool:
    """True if kernels serve x, False if the equations do."""
    return x.is_cuda


def describe(
    q: Tensor | None,
    x: Tensor,
    config: NSAConfig,
    layout: PackedLayout | None,
    *,
    seq_k: int,
    d_v: int,
    locality: float = DEFAULT_LOCALITY,
    phi_hidden: int = 128,
) -> Problem:
    """The problem behind a call; x is a key tensor [.., T, H, D_QK]."""
    return Problem(
        batch=x.shape[0] if layout is None else layout.cu_seqlens_k.numel() - 1,
        seq_q=seq_k if q is None else q.shape[-3],
        seq_k=seq_k,
        num_q_heads=x.shape[-2] if q is None else q.shape[-2],
        num_kv_heads=x.shape[-2],
        d_qk=x.shape[-1],
        d_v=d_v,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="batched" if layout is None else "packed",
        locality=locality,
        phi_hidden=phi_hidden,
        nsa=config,
    )


def fuses(
    dispatcher: Dispatcher | None,
    family: str,
    shape: tuple[Any, ...],
    problem: Callable[[], Problem],
    device: torch.device,
) -> bool:
    """True if this fused family was measured to be faster than its parts one after the other."""

    def asked() -> list[tuple[KernelSpec, Problem]]:
        whole, specs = problem(), map(get_spec, (family, *FUSED[family]))
        flat = whole.replace(batch=1, layout="batched") if whole.layout == "packed" else whole
        return [(spec, whole if "layout" in spec.problem_fields else flat) for spec in specs]

    return (dispatcher or default_dispatcher()).fuses((device.index, *shape), asked, device)


def split(dispatcher: Dispatcher | None, shape: tuple[Any, ...], device: torch.device, error: KernelError) -> None:
    """Let the parts of a fused kernel that does not run serve this shape."""
    (dispatcher or default_dispatcher()).split((device.index, *shape), error)


def launch(
    dispatcher: Dispatcher | None,
    spec: KernelSpec,
    shape: tuple[Any, ...],
    problem: Callable[[], Problem],
    tensors: dict[str, Any],
    device: torch.device,
) -> None:
    """Serve one kernel on `device`; calls of one `shape` have tensors of equal sizes and dtypes, and one problem."""
    chosen = dispatcher or default_dispatcher()
    key = (spec.family, device.index, *shape)
    if device.index == torch.cuda.current_device():  # to change the device and back takes longer than a launch
        chosen.launch(spec, key, problem, device, tensors)
        return
    with torch.cuda.device(device):
        chosen.launch(spec, key, problem, device, tensors)
