"""Rendered source to a loaded module: written once under its digest, atomically, and imported from that file."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

from ..errors import InvalidInput, KernelError
from ..files import write_atomic
from .linemap import Origin, explain_line
from .paths import generated_dir
from .render import Rendered


def source_path(rendered: Rendered, folder: Path | None = None) -> Path:
    """File of a variant: `<family>__<digest>.py`."""
    return (folder or generated_dir()) / f"{rendered.family}__{rendered.digest}.py"


def write_source(rendered: Rendered, folder: Path | None = None) -> Path:
    """Write the source and its line map beside it, unless an equal file is there; Triton reads kernels from files."""
    path = source_path(rendered, folder)
    try:
        if path.read_text(encoding="utf-8") == rendered.source:
            return path
    except OSError:
        pass  # not written yet
    try:
        write_atomic(path.with_suffix(".map.json"), json.dumps(rendered.line_map))
        write_atomic(path, rendered.source)
    except OSError as error:
        values = {"folder": str(path.parent), "message": str(error)}
        remedy = "Set NSA_AUTOTUNE_CACHE_DIR to a folder you may write, or free some space."
        raise KernelError("generated kernels need a writable folder", values, remedy) from error
    return path


def require_caches() -> None:
    """Raise InvalidInput unless compiled kernels can be kept: else no config would seem to work."""
    from triton import knobs  # takes a while to import

    for folder, variable in ((generated_dir(), "NSA_AUTOTUNE_CACHE_DIR"), (Path(knobs.cache.dir), "TRITON_CACHE_DIR")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            values = {"folder": str(folder), "message": error.strerror}
            remedy = f"Set {variable} to a folder you may write, or free some space."
            raise InvalidInput("compiled kernels need a writable folder", values, remedy) from error


def load(rendered: Rendered) -> ModuleType:
    """Import the variant; the module has `launch`, CONSTANTS, OPTIONS and CONFIG."""
    path = write_source(rendered)
    name = f"nsa_autotune_generated.{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise KernelError("a generated file must be importable", {"file": str(path)})
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # Triton looks the kernel's module up by name
    module_spec.loader.exec_module(module)
    return module


def explain(error: BaseException, rendered: Rendered) -> str:
    """The error's text, then the template line of every generated line that it comes from."""
    text = f"{type(error).__name__}: {error}".strip()
    notes = [explain_line(rendered.line_map, number) for number in sorted(_generated_lines(error, rendered))]
    return text + "".join(f"\n  {note}" for note in notes)


def _generated_lines(error: BaseException, rendered: Rendered) -> set[int]:
    """Lines of the generated file that the error or its causes name: in a traceback, or in the compiler's own way."""
    found: set[int] = set()
    seen: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in seen:
        seen.append(step)
        frames = traceback.extract_tb(step.__traceback__)
        found |= {frame.lineno or 0 for frame in frames if Path(frame.filename).name == source_path(rendered).name}
        source, line = getattr(step, "src", None), getattr(getattr(step, "node", None), "lineno", None)
        if isinstance(source, str) and isinstance(line, int):  # the compiler counts from the function's first line
            start = rendered.source.find(source.split("\n", 1)[0])
            found.add(rendered.source.count("\n", 0, start) + line if start >= 0 else 0)
        step = step.__cause__ or step.__context__
    return {number for number in found if 0 < number <= len(rendered.line_map)}


def line_map_of(path: Path) -> list[Origin | None]:
    """The line map stored beside a generated file."""
    data = json.loads(path.with_suffix(".map.json").read_text(encoding="utf-8"))
    return [None if origin is None else (str(origin[0]), int(origin[1])) for origin in data]
