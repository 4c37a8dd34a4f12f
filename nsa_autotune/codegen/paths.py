"""Where templates are read and generated files are written; nothing is created before it is needed."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def template_dir() -> Path:
    """The folder of the templates: package data when installed, the top-level folder in a plain checkout."""
    try:
        return Path(str(resources.files("nsa_autotune.templates")))
    except ModuleNotFoundError:
        return CHECKOUT / "templates"


def cache_dir() -> Path:
    """Where generated kernels are kept: NSA_AUTOTUNE_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("NSA_AUTOTUNE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nsa_autotune"


def generated_dir() -> Path:
    """The folder of rendered variants inside the cache."""
    return cache_dir() / "generated"


def state_dir() -> Path:
    """Where the journals of running tuners are kept: NSA_AUTOTUNE_STATE_DIR, or the user's state folder."""
    chosen = os.environ.get("NSA_AUTOTUNE_STATE_DIR")
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():  # the XDG rules say that a relative path must be ignored
        base = Path.home() / ".local" / "state"
    return base / "nsa_autotune"
