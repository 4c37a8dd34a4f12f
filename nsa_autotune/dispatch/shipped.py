"""Winners and kernels of a shipped package: its dispatch table and the files beside it; nothing is rendered."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput, NotShipped, NSAError, OtherGPU, StoreError
from ..spec import DEFAULT_LOCALITY, DEFAULT_POLICY, Config, KernelSpec, Problem
from .binaries import Binaries
from .fingerprint import Fingerprint
from .variant import KernelSource, Variant, WinnerSource

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

PACKAGE = Path(__file__).resolve().parents[1]
TABLE, KERNELS, BINARIES = "dispatch.json", "tuned", "binaries"  # the table, and folders, of a package
TABLE_SCHEMA = 1
ALLOW_VARIABLE = "NSA_TUNED_ALLOW_OTHER_GPU"

logger = logging.getLogger(__name__.partition(".")[0])


@dataclass(frozen=True)
class ShippedWinner:
    """A row of the dispatch table, with what the ladder reads of it."""

    family: str
    fingerprint: Mapping[str, str]
    problem: Mapping[str, Any]
    problem_key: str
    config: Config
    template_digest: str
    policy: str
    median_us: float


@dataclass(frozen=True)
class Table:
    """A package's dispatch table; `kernels` holds the files of the shipped variants by digest."""

    gpu: str
    templates: Mapping[str, str]  # family to the digest of its template
    kernels: Mapping[str, str]
    rows: tuple[ShippedWinner, ...]

    def winners(self, *, family: str) -> Sequence[ShippedWinner]:
        """All shipped winners of one family."""
        return [row for row in self.rows if row.family == family]


def read_table(folder: Path) -> Table:
    """The dispatch table of the package in `folder`; raises StoreError if it is missing or damaged."""
    path = folder / TABLE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != TABLE_SCHEMA:
            raise ValueError(f"schema {data['schema']} is not {TABLE_SCHEMA}")
        names = ShippedWinner.__dataclass_fields__
        rows = tuple(ShippedWinner(**{name: row[name] for name in names}) for row in data["winners"])
        return Table(data["gpu"], data["templates"], data["kernels"], rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        values = {"file": path.name, "reason": f"{type(error).__name__}: {error}"}
        raise StoreError("a shipped package needs its dispatch table", values, "Install the package anew.") from error


class ShippedKernels:
    """A KernelSource over the files of a package; refuses other GPUs unless it is told that they may be served."""

    def __init__(self, folder: Path, table: Table, *, allow_other_gpu: bool = False) -> None:
        self._folder, self._table, self._allow = folder, table, allow_other_gpu
        self._binaries = Binaries(folder / BINARIES)

    def check_gpu(self, here: Fingerprint) -> None:
        """Raise OtherGPU on a GPU of another name than the winners', unless it was allowed."""
        if here.gpu == self._table.gpu or self._allow or _allowed_by_variable():
            return
        remedy = (
            "Ship a package for this GPU, or accept kernels that nobody measured here: "
            f"open_dispatcher(allow_other_gpu=True) or {ALLOW_VARIABLE}=1."
        )
        values = {"tuned on": self._table.gpu, "this GPU": here.gpu}
        raise OtherGPU("this package serves the GPU that its kernels were tuned on", values, remedy)

    def template_digest(self, spec: KernelSpec) -> str:
        """The digest of the template that the shipped kernels come from; "" if the family has none."""
        return self._table.templates.get(spec.family, "")

    def refusal(self, spec: KernelSpec, problem: Problem, config: Config) -> NSAError | None:
        """NotShipped unless the variant is among the package's files."""
        if self._file(spec, problem, config) is not None:
            return None
        values = {"family": spec.family, "problem": spec.problem_key(problem)}
        remedy = "Tune it and ship again: `nsa-autotune tune`, then `nsa-autotune ship`; or call the reference."
        return NotShipped("no kernel of this package serves the problem", values, remedy)

    def load(self, spec: KernelSpec, problem: Problem, config: Config) -> Variant:
        """The shipped module, imported from its file, with its compiled binaries where they fit; raises NotShipped."""
        name = self._file(spec, problem, config)
        refused = self.refusal(spec, problem, config)
        if name is None or refused is not None:
            raise refused or NotShipped("no kernel of this package serves the problem")
        from . import probe  # which imports Triton

        module = _import(self._folder / KERNELS / name)
        self._binaries.attach(module)
        self._binaries.attach(probe)
        return Variant(spec.family, module.launch, lambda error: f"{type(error).__name__}: {error} (in {name})")

    def _file(self, spec: KernelSpec, problem: Problem, config: Config) -> str | None:
        return self._table.kernels.get(spec.variant_digest(problem, config, self.template_digest(spec)))


def _allowed_by_variable() -> bool:
    value = os.environ.get(ALLOW_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise InvalidInput(f"{ALLOW_VARIABLE} is 1 or 0", {ALLOW_VARIABLE: value}, "Set it to 1, or unset it.")
    return value == "1"


def _import(path: Path) -> ModuleType:
    """The module of a generated file; Triton reads the source from it."""
    name = f"{__name__.partition('.')[0]}.{KERNELS}.{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None or not path.is_file():
        raise StoreError("a shipped package needs its kernels", {"file": path.name}, "Install the package anew.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # Triton looks the kernel's module up by name
    found.loader.exec_module(module)
    return module


@cache
def _shipped_table() -> Table:
    """The table of the package that holds this file."""
    return read_table(PACKAGE)


def default_kernels() -> KernelSource:
    """The kernels of this package."""
    return ShippedKernels(PACKAGE, _shipped_table())


def default_winners() -> WinnerSource | None:
    """The dispatch table of this package."""
    return _shipped_table()


def open_dispatcher(
    *,
    allow_other_gpu: bool = False,
    strict: bool = False,
    locality: float = DEFAULT_LOCALITY,
    policy: str = DEFAULT_POLICY,
    fingerprint: Fingerprint | None = None,
) -> Dispatcher:
    """A dispatcher over this package's kernels, to pass to the module or the operators.

    On another GPU than the one tuned on it raises OtherGPU unless `allow_other_gpu`; for a problem that no shipped
    kernel serves, NotShipped. strict, locality, policy: as Dispatcher's. fingerprint: of a GPU to pretend.
    """
    from .dispatcher import Dispatcher  # which imports this package's sources, and so this module

    kernels = ShippedKernels(PACKAGE, _shipped_table(), allow_other_gpu=allow_other_gpu)
    how: dict[str, Any] = {"strict": strict, "locality": locality, "policy": policy, "fingerprint": fingerprint}
    return Dispatcher(_shipped_table(), kernels=kernels, **how)
