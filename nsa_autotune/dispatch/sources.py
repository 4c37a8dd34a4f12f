"""Where winners and kernels come from by default: the tuning database, and templates.

A shipped package has another file in the place of this one, which is all that tells its dispatcher apart.
"""

from __future__ import annotations

import logging
from functools import partial

from ..codegen.load import explain, load
from ..codegen.render import render, template_digest
from ..errors import NSAError, StoreError
from ..spec import Config, KernelSpec, Problem
from .fingerprint import Fingerprint
from .variant import KernelSource, Variant, WinnerSource

logger = logging.getLogger(__name__.partition(".")[0])


class RenderedKernels:
    """A KernelSource that renders what it is asked for: every legal config, on every GPU."""

    def check_gpu(self, here: Fingerprint) -> None:
        """Rendered kernels serve everywhere."""

    def template_digest(self, spec: KernelSpec) -> str:
        """The digest of the template as it is now."""
        return template_digest(spec)

    def refusal(self, spec: KernelSpec, problem: Problem, config: Config) -> NSAError | None:
        """None: whatever is legal can be rendered."""
        return None

    def load(self, spec: KernelSpec, problem: Problem, config: Config) -> Variant:
        """Render, write and import; the compiler's errors name template lines."""
        rendered = render(spec, problem, config)
        return Variant(spec.family, load(rendered).launch, partial(explain, rendered=rendered))


def default_kernels() -> KernelSource:
    """Kernels rendered from the templates."""
    return RenderedKernels()


def default_winners() -> WinnerSource | None:
    """The default database, opened; None, logged, where it cannot be."""
    from ..db import open_for_lookup  # SQLAlchemy is needed on the first CUDA call only

    try:
        return open_for_lookup()
    except StoreError as error:
        logger.warning("no tuned kernels: %s", error)
        return None
