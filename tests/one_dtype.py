"""Prepared launches rely on it: calls of one shape have tensors of the same dtypes. Noted over a process of tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

_dtypes_of: dict[Hashable, dict[str, Any]] = {}


def note(family: str, shape: Hashable, tensors: Mapping[str, Any]) -> None:
    """Fail if a test of this process had the family launched with this shape before, and with other dtypes."""
    dtypes = {name: getattr(value, "dtype", None) for name, value in tensors.items()}
    assert _dtypes_of.setdefault((family, shape), dtypes) == dtypes, family
