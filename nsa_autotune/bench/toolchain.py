"""What the measuring process needs of the kernels and of codegen; tests name another module with the same functions."""

from __future__ import annotations

from ..codegen.load import explain, load
from ..codegen.render import render
from ..kernels import get_spec
from .health import check_device

__all__ = ["check_device", "explain", "get_spec", "load", "render"]
