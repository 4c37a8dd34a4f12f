"""One class a mistake; every message names the rule, the values that broke it and the remedy."""

from __future__ import annotations

from collections.abc import Mapping


class NSAError(Exception):
    """Base of all errors of nsa_autotune: a rule, the offending values, and what to do about it."""

    def __init__(self, rule: str, values: Mapping[str, object] | None = None, remedy: str = "") -> None:
        self.rule = rule
        self.values = dict(values or {})
        self.remedy = remedy
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        got = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        parts = [self.rule.rstrip(".")]
        if got:
            parts.append(f"got {got}")
        sentence = "; ".join(parts) + "."
        return f"{sentence} {self.remedy}".rstrip()

    def __reduce__(self) -> tuple[type[NSAError], tuple[str, dict[str, object], str]]:
        return type(self), (self.rule, self.values, self.remedy)


class InvalidConfig(NSAError, ValueError):
    """NSA constants, or a kernel's config, that cannot work."""


class InvalidInput(NSAError, ValueError):
    """Tensors of the wrong shape, dtype, device or layout."""


class CacheFull(NSAError, RuntimeError):
    """A key-value cache without a free page, or a sequence in it that has all the tokens it may have."""


class InvalidProblem(NSAError, ValueError):
    """A problem that no kernel of a family can serve."""


class UnknownName(NSAError, KeyError):
    """A preset, family, column or target nobody has heard of."""

    def __str__(self) -> str:  # KeyError would print the repr
        return self._sentence()


class RenderError(NSAError, RuntimeError):
    """A template that does not render to valid Python."""


class KernelError(NSAError, RuntimeError):
    """A generated kernel that does not compile, fit or launch; names template lines."""


class NoConfigWorks(NSAError, LookupError):
    """Every config of a kernel that was tried for a problem failed; the trials hold the reasons."""


class NotTuned(NSAError, LookupError):
    """strict=True and no exact winner is known."""


class NotShipped(NSAError, LookupError):
    """A problem that no kernel of a shipped package serves."""


class OtherGPU(NSAError, RuntimeError):
    """Kernels of a shipped package that were tuned on another GPU, where nobody allowed that."""


class StoreError(NSAError, RuntimeError):
    """A database that is damaged, newer than this program, read-only or busy."""


class DatabaseAway(StoreError):
    """A database server that does not answer, is restarting, or ended a deadlock: the same again may work."""


class ClaimLost(NSAError, RuntimeError):
    """Work that this process had, and another one has now."""


class WorkerError(NSAError, RuntimeError):
    """A measuring process that cannot be started or answers nonsense."""
