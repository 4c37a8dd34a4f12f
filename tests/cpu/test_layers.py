"""Imports go one way: a part of the package may import parts of lower rows only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nsa_autotune"
ROWS = (
    (
        "errors",
        "config",
        "layout",
        "dense",
        "reference",
        "paged",
        "paged_append",
        "gradients",
        "files",
        "plain",
        "spec",
        "cores",
    ),
    ("codegen", "db"),
    ("kernels",),
    ("bench", "dispatch"),
    ("search", "ops", "ship"),
    ("report",),
    ("nn", "cli"),
    ("__init__", "__main__"),
)
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
FROM_ANYWHERE = {"__version__"}  # names of the package itself that every part may read


def part_of(path: Path, package: Path) -> str:
    """The part a file belongs to: a folder of the package, or a module beside them."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import of the package in a file, relative or absolute, lazy ones included."""
    folders = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folders[: len(folders) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for names in modules:
            if names[0] == package.name and len(names) > 1 and names[1] not in FROM_ANYWHERE:
                yield node.lineno, names[1]


def sees(here: str, there: str) -> bool:
    """True if one part may import another: from a lower row, or within row 0, whose modules form one vocabulary."""
    row, other = ROW_OF[here], ROW_OF.get(there, len(ROWS))
    return other < row or row == other == 0


def violations(package: Path) -> list[str]:
    """A sentence for each import that goes against the rows, and for each part that stands in none."""
    found = []
    for path in sorted(package.rglob("*.py")):
        here = part_of(path, package)
        if here not in ROW_OF:
            found.append(f"{path.relative_to(package)}: {here} stands in no row")
            continue
        for line, there in imported_parts(path, package):
            if there != here and not sees(here, there):
                found.append(f"{path.relative_to(package)}:{line}: {here} imports {there}")
    return found


def test_imports_go_to_lower_rows() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "statement", "caught"),
    [
        ("spec.py", "from .kernels import get_spec", True),
        ("codegen/render.py", "from ..db.store import TuningStore", True),
        ("db/store.py", "import nsa_autotune.codegen.render", True),
        ("dispatch/dispatcher.py", "def f():\n    from ..search import tuner", True),
        ("db/migrations/env.py", "from ...ops import nsa_attention", True),
        ("bench/worker.py", "from .. import cli", True),
        ("cli/tune.py", "from ..nn import NativeSparseAttention", True),
        ("report/page.py", "from ..cli.console import output", True),
        ("new_part/x.py", "import os", True),
        ("kernels/slc.py", "from ..spec import KernelSpec", False),
        ("spec.py", "from .errors import NSAError", False),
        ("cli/tune.py", "from ..search.tuner import tune_problem", False),
        ("db/migrations/env.py", "from ..models import Base", False),
        ("codegen/load.py", "from nsa_autotune import __version__\nimport triton.language as tl", False),
    ],
    ids=lambda value: str(value).split("\n")[0].replace(" ", "_"),
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, statement: str, caught: bool) -> None:
    path = tmp_path / "nsa_autotune" / file
    path.parent.mkdir(parents=True)
    path.write_text(statement + "\n")
    assert bool(violations(tmp_path / "nsa_autotune")) is caught
