"""Modules of equations, imported when a reference runs: specs are data, and who reads them need not wait for torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .. import gradients as gradients
    from .. import paged as paged
    from .. import paged_append as paged_append
    from .. import reference as reference
else:

    class Later:
        """A module of this package that is imported when one of its names is asked for."""

        def __init__(self, name: str) -> None:
            self._name = f"{__package__.rpartition('.')[0]}.{name}"

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    gradients, paged, paged_append, reference = map(Later, ("gradients", "paged", "paged_append", "reference"))
