"""What a dispatcher is given: winners and kernels by their sources, and one loaded variant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

from ..errors import KernelError, NSAError
from ..spec import Config, KernelSpec, Problem
from .fingerprint import Fingerprint
from .ladder import Winner
from .plan import PreparedLaunch

Serve = Callable[[Mapping[str, Any]], None]  # launches with the tensors and numbers of one call, by name


class WinnerSource(Protocol):
    """Where winners come from: the tuning database, a shipped table, or a list in a test."""

    def winners(self, *, family: str) -> Sequence[Winner]:
        """All winners of one family."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A loaded kernel: its module's launch function, and an error's text with the lines that it comes from."""

    family: str
    launch: FunctionType
    told: Callable[[Exception], str]

    def serve(self, trusted: Callable[[], None], ordinary: Counter[str]) -> Serve:
        """What launches it for one shape."""
        prepared = PreparedLaunch(self.launch, trusted, ordinary, self._explained)
        return prepared.__call__  # Python calls a method faster than an object

    def _explained(self, error: Exception) -> KernelError:
        """The compiler's own errors name generated lines; `told` may know more."""
        return KernelError(f"{self.family} failed: {self.told(error)}")


class KernelSource(Protocol):
    """Where kernels come from: rendered from templates, or the files of a shipped package."""

    def check_gpu(self, here: Fingerprint) -> None:
        """Raise OtherGPU where these kernels must not serve unasked."""

    def template_digest(self, spec: KernelSpec) -> str:
        """Digest of the template that a family's kernels are rendered from; winners of another one are stale."""

    def refusal(self, spec: KernelSpec, problem: Problem, config: Config) -> NSAError | None:
        """Why there is no kernel for a legal config; None if there is one."""

    def load(self, spec: KernelSpec, problem: Problem, config: Config) -> Variant:
        """The variant, imported."""
