"""What of a rendered variant runs on the host: the grid and the arguments of its launches, which no binary tells."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from types import FunctionType

__all__ = ["launch_sha", "launch_sha_of"]

KERNELS = ("triton.jit", "gluon.jit")  # decorators of what is compiled for the GPU


def launch_sha(source: str) -> str:
    """Identity of a rendered source without its kernels, comments and docstrings; 20 hex digits.

    Two variants run alike if their machine code (`machine_code.variant_code_sha`) and this are equal.
    """
    tree = _WithoutKernels().visit(ast.parse(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:20]


def launch_sha_of(launch: FunctionType) -> str:
    """`launch_sha` of the file that a loaded variant's launch function comes from."""
    return launch_sha(Path(launch.__code__.co_filename).read_text(encoding="utf-8"))


class _WithoutKernels(ast.NodeTransformer):
    """Drops functions that a compiler for the GPU takes, also those that are defined under a condition."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        names = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
        return None if any(ast.unparse(name) in KERNELS for name in names) else node
