"""The files of a shipped package by path: a pure function of records and templates, so that two builds are equal."""

from __future__ import annotations

import hashlib
import json
import keyword
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..bench.compare import FACTOR
from ..codegen.load import source_path
from ..db import TrialRecord, WinnerRecord
from ..db.paths import checkout_folder
from ..dispatch.shipped import BINARIES, KERNELS, TABLE, TABLE_SCHEMA, ShippedWinner
from ..errors import InvalidInput
from . import texts
from .choice import Chosen, Kernel

PACKAGE = Path(__file__).resolve().parents[1]
PROVENANCE = "PROVENANCE.json"
PAGED = ("paged", "paged_append")
MODULES = ("errors", "files", "config", "layout", "dense", "reference", *PAGED, "gradients", "spec")  # of the runtime
NOT_COPIED = ("dispatch/sources.py",)  # the package has its own
CODEGEN = ("codegen/__init__.py", "codegen/shapes.py")  # what the runtime needs of codegen

NEEDED = ("torch", "triton", "nsa_autotune")
OWN_NAME = "Choose a name of its own, such as nsa_tuned_h100."

Files = dict[str, bytes]  # by path relative to the package's project


def default_name(gpu: str) -> str:
    """`nsa_tuned_h100_80gb_hbm3` for NVIDIA H100 80GB HBM3."""
    slug = re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_").removeprefix("nvidia_")
    return f"nsa_tuned_{slug}"


def check_name(name: str) -> None:
    """Raise InvalidInput unless a package may be called so."""
    if re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name) is None or keyword.iskeyword(name):
        remedy = "Write small letters, digits and underscores, such as nsa_tuned_h100."
        raise InvalidInput("a package needs a name that Python can import", {"--name": name}, remedy)
    if name in NEEDED or name in sys.stdlib_module_names:
        raise InvalidInput("a package must not hide what it needs, or a module of Python", {"--name": name}, OWN_NAME)


def check_replaces_nothing(name: str) -> None:
    """Raise InvalidInput for a name under which something else is installed here: pip would overwrite it."""
    found = set(metadata.packages_distributions().get(name, ()))
    with suppress(metadata.PackageNotFoundError):
        found.add(metadata.distribution(name.replace("_", "-")).name)
    others = sorted(project for project in found if not _is_shipped(project))
    if others:
        values = {"--name": name, "installed": others}
        raise InvalidInput(
            "another project of this name is installed, which the package would replace", values, OWN_NAME
        )


def _is_shipped(project: str) -> bool:
    summary = str(metadata.metadata(project)["Summary"])
    return summary.startswith(texts.SUMMARY)  # an earlier one of ours may be replaced


def build(
    name: str,
    chosen: Chosen,
    kernels: Sequence[Kernel],
    trials: Mapping[str, Sequence[TrialRecord]],
    binaries: Mapping[str, bytes],
    targets: Sequence[str],
) -> Files:
    """All files; `trials` holds those of each winner's variant by the winner's digest, `binaries` compiled kernels."""
    check_name(name)
    files = {f"{name}/{path}": content for path, content in runtime_files().items()}
    files |= {f"{name}/{KERNELS}/{source_path(k.rendered).name}": k.rendered.source.encode() for k in kernels}
    files |= {f"{name}/{BINARIES}/{path}": content for path, content in binaries.items()}
    files[f"{name}/dispatch/sources.py"] = texts.SOURCES.encode()
    files[f"{name}/{TABLE}"] = _json(dispatch_table(chosen, kernels))
    version = f"{__version__}+{_sha(b''.join(_sha(files[p]).encode() for p in sorted(files)))[:8]}"
    bounds = lower_bounds(chosen.winners)
    files[f"{name}/__init__.py"] = texts.init_module(version, chosen.gpu).encode()
    origins = provenance(chosen, trials, files, targets)
    gated = sum(row["gate"] is not None for row in origins["winners"])
    files[f"{name}/{PROVENANCE}"] = _json(origins)
    files["pyproject.toml"] = texts.pyproject(name, version, chosen.gpu, bounds).encode()
    files["README.md"] = texts.readme(
        name, chosen.gpu, __version__, bounds, chosen.winners, list(targets), gated
    ).encode()
    files["LICENSE"] = license_text().encode()
    return dict(sorted(files.items()))


def runtime_files() -> Files:
    """The modules that serve a model, as they are: nothing of templates, database, search or command line."""
    paths = [PACKAGE / f"{module}.py" for module in MODULES] + [PACKAGE / path for path in CODEGEN]
    for part in texts.PACKAGES:
        paths += [] if part == "codegen" else sorted((PACKAGE / part).glob("*.py"))
    paths.append(PACKAGE / "py.typed")
    names = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if name not in NOT_COPIED}


def dispatch_table(chosen: Chosen, kernels: Sequence[Kernel]) -> dict[str, Any]:
    """What `dispatch.shipped.read_table` reads, with the times beside it."""
    rows = []
    digests = {(k.spec.family, _key(k.config), p): k.rendered.digest for k in kernels for p in map(_key_of, k.problems)}
    for winner in chosen.winners:
        row = {field: getattr(winner, field) for field in ShippedWinner.__dataclass_fields__}
        times = {field: getattr(winner, field) for field in ("p20_us", "p80_us", "default_median_us")}
        variant = digests[winner.family, _key(winner.config), _key(winner.problem)]
        rows.append({**row, **times, "verdict": winner.verdict, "variant": variant})
    return {
        "schema": TABLE_SCHEMA,
        "gpu": chosen.gpu,
        "templates": {k.spec.family: k.rendered.template_digest for k in kernels},
        "kernels": {k.rendered.digest: source_path(k.rendered).name for k in kernels},
        "winners": rows,
    }


def provenance(
    chosen: Chosen, trials: Mapping[str, Sequence[TrialRecord]], files: Files, targets: Sequence[str]
) -> dict[str, Any]:
    """Where everything comes from: the database's rows, the errors of their gate, and the files' digests."""
    rows = []
    for winner in chosen.winners:
        worst = worst_gated(trials.get(winner.digest, ()))
        errors = None if worst is None else {"max_error": worst.max_error, "baseline_error": worst.baseline_error}
        rows.append({"digest": winner.digest, "gate": errors, "record": winner.to_dict()})
    return {
        "made_by": f"nsa-autotune ship {__version__}",
        "gpu": chosen.gpu,
        "tolerance": f"error against the reference below {FACTOR:g} times PyTorch's in the kernel's dtype",
        "binaries_for": list(targets),
        "winners": rows,
        "sha256": {path: _sha(content) for path, content in sorted(files.items())},
    }


def worst_gated(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The trial with the largest error that passed the accuracy gate; None if no error was recorded."""
    gated = [trial for trial in trials if trial.max_error is not None]
    return max(gated, key=lambda trial: (trial.max_error or 0.0, trial.digest), default=None)


def lower_bounds(winners: Iterable[WinnerRecord]) -> dict[str, str]:
    """The newest torch and triton that a winner was measured with, without local parts; older ones are unproven."""
    found = {}
    for name in ("torch", "triton"):
        plain = {w.fingerprint[name].split("+")[0] for w in winners} - {""}
        found[name] = max(plain, key=_version_order, default={"torch": "2.9", "triton": "3.6"}[name])
    return found


def _version_order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def license_text() -> str:
    """The licence of this program, which the copied files are under."""
    checkout = checkout_folder()
    if checkout is not None:
        return (checkout / "LICENSE").read_text(encoding="utf-8")
    try:
        text = metadata.distribution("nsa-autotune").read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        text = None
    if text is None:
        raise InvalidInput("a package needs its licence", {"file": "LICENSE"}, "Reinstall nsa-autotune.")
    return text


def _key_of(problem: Any) -> str:
    return _key(problem.to_dict())


def _key(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
