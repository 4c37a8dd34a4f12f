"""Where databases and shipped winners lie; the only reader of NSA_AUTOTUNE_DB."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
DATABASE_NAME = "tuning.sqlite"
DATABASE_VARIABLE = "NSA_AUTOTUNE_DB"


def checkout_folder(package: Path = PACKAGE) -> Path | None:
    """The source checkout that holds the package, or None when it is installed."""
    project = package.parent / "pyproject.toml"
    if not project.is_file() or not (package.parent / "tuning_db").is_dir():
        return None
    try:
        name = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name", "")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return None  # not readable as our project file, so this is not our checkout
    return package.parent if name.replace("_", "-") == "nsa-autotune" else None


def default_path(environ: Mapping[str, str] | None = None, package: Path = PACKAGE) -> Path:
    """`tuning_db/tuning.sqlite` of a writable checkout, else the same file in the user's data folder."""
    environ = os.environ if environ is None else environ
    checkout = checkout_folder(package)
    if checkout is not None and os.access(checkout / "tuning_db", os.W_OK):
        return checkout / "tuning_db" / DATABASE_NAME
    data_home = Path(environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG rules say that a relative path must be ignored
        data_home = Path.home() / ".local" / "share"
    return data_home / "nsa_autotune" / DATABASE_NAME


def chosen_url(url: str | None, environ: Mapping[str, str] | None = None, package: Path = PACKAGE) -> str:
    """The URL given, else NSA_AUTOTUNE_DB, else the default file."""
    environ = os.environ if environ is None else environ
    return url or environ.get(DATABASE_VARIABLE) or f"sqlite:///{default_path(environ, package)}"


def shipped_files(package: Path = PACKAGE) -> dict[str, bytes]:
    """The shipped files of winners by name: package data, or `tuning_db/` of a checkout that is not installed."""
    try:
        folder = resources.files("nsa_autotune.tuning_db")
    except ModuleNotFoundError:
        checkout = checkout_folder(package)
        if checkout is None:
            return {}
        folder = checkout / "tuning_db"
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".jsonl") and entry.is_file()]
    return {entry.name: entry.read_bytes() for entry in sorted(entries, key=lambda entry: entry.name)}
