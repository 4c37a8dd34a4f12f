"""Native Sparse Attention in Triton, tuned on the GPU at hand. Importing this touches no GPU and reads no file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import NSAConfig
    from .db import TuningDatabase
    from .nn import KVCache, NativeSparseAttention
    from .ops import nsa_attention
    from .ops.serve import export_misses

__version__ = "0.1.0"
__all__ = [
    "KVCache",
    "NSAConfig",
    "NativeSparseAttention",
    "TuningDatabase",
    "__version__",
    "export_misses",
    "nsa_attention",
]

_OWNERS = {
    "KVCache": ".nn",
    "NSAConfig": ".config",
    "NativeSparseAttention": ".nn",
    "TuningDatabase": ".db",
    "export_misses": ".ops.serve",
    "nsa_attention": ".ops",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import nsa_autotune` stays quick."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OWNERS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
