"""A dispatcher that answers each launch with its spec's own equations: the operators' formulas in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_autotune.codegen.shapes import INDEX_FILLS
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.layout import PackedLayout
from nsa_autotune.spec import KernelSpec, Problem


class Equations(Dispatcher):
    """Runs the spec's reference instead of its kernel, and keeps the families' names."""

    def __init__(self) -> None:
        super().__init__(None, fingerprint=for_target("cuda:90"))
        self.families: list[str] = []
        self.layout: PackedLayout | None = None

    def launch(
        self, spec: KernelSpec, shape: Any, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        self.families.append(spec.family)
        outputs = {a.name for a in spec.arguments if a.is_output}
        names = {a.name for a in spec.arguments if a.fill not in INDEX_FILLS} - outputs
        asked = problem()
        given = {name: tensors[name] for name in names}
        if "layout" not in spec.problem_fields and given[min(names)].ndim == 3:
            found = spec.reference(asked, given)
        else:
            found = spec.reference(asked, given, self.layout, None)
        for name in outputs:
            old = tensors[name].clone() if tensors.get("accumulate") else 0.0
            tensors[name].copy_(found[name] + old)
