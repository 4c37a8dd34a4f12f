"""Queries, keys and values that designs are judged on: read from a file, or made with the traits of a trained layer."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput

NAMES = ("q", "k", "v")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HOW = "Save a dict with q [T, HQ, D], k [T, H, D] and v [T, H, D_V], or all with a batch dimension in front."


@dataclass(frozen=True, eq=False)
class Activations:
    """q `[B, T, HQ, D_QK]`, k `[B, T, H, D_QK]`, v `[B, T, H, D_V]` of one layer, after rotary; `origin` says whose."""

    q: Tensor
    k: Tensor
    v: Tensor
    origin: Mapping[str, Any]  # JSON: what made them, with their digest; no path, so that a file may move

    @property
    def tokens(self) -> int:
        """T."""
        return self.q.shape[1]

    def first(self, tokens: int) -> Activations:
        """The first `tokens` tokens, or all if there are fewer."""
        return replace(self, q=self.q[:, :tokens], k=self.k[:, :tokens], v=self.v[:, :tokens])

    def to(self, device: str) -> Activations:
        """The same on another device."""
        return replace(self, q=self.q.to(device), k=self.k.to(device), v=self.v.to(device))


def load_activations(path: Path) -> Activations:
    """The tensors q, k, v of a `.pt` (torch.save of a dict) or `.safetensors` file; InvalidInput says what is wrong."""
    readers = {".pt": _read_torch, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InvalidInput("activations come in a .pt or .safetensors file", {"path": str(path)}, HOW)
    if not path.is_file():
        raise InvalidInput("there is no such file of activations", {"path": str(path)}, "Check the path.")
    return from_tensors(readers[path.suffix](path), str(path))


def from_tensors(found: object, name: str) -> Activations:
    """Activations of a dict of tensors called `name` in errors; other entries are not read."""
    if not isinstance(found, Mapping):
        raise InvalidInput("a file of activations holds a dict", {"file": name, "found": type(found).__name__}, HOW)
    missing = [key for key in NAMES if not isinstance(found.get(key), Tensor)]
    if missing:
        raise InvalidInput("q, k and v must be tensors in the file", {"file": name, "missing": missing}, HOW)
    q, k, v = (found[key].detach() for key in NAMES)
    shapes = {key: tuple(x.shape) for key, x in zip(NAMES, (q, k, v), strict=True)}
    if {q.ndim, k.ndim, v.ndim} == {3}:
        q, k, v = q[None], k[None], v[None]
    if {q.ndim, k.ndim, v.ndim} != {4}:
        raise InvalidInput("q, k and v must have 3 dimensions, or 4 with a batch", {"file": name, **shapes}, HOW)
    _check_shapes(q, k, v, {"file": name, **shapes})
    _check_values(q, k, v, name)
    return Activations(q, k, v, {"source": "file", "sha256": sha256_of(q, k, v)})


def sha256_of(*tensors: Tensor) -> str:
    """Digest of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, values: Mapping[str, object]) -> None:
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or 0 in (*q.shape, *k.shape, *v.shape):
        raise InvalidInput("q, k and v must be of the same tokens, at least one", values, HOW)
    if k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise InvalidInput("k and v must have equally many heads, and q a multiple of them", values, HOW)
    if q.shape[3] != k.shape[3]:
        raise InvalidInput("q and k must have the same head dim", values, HOW)


def _check_values(q: Tensor, k: Tensor, v: Tensor, name: str) -> None:
    dtypes = {key: str(x.dtype).removeprefix("torch.") for key, x in zip(NAMES, (q, k, v), strict=True)}
    if len(set(dtypes.values())) > 1 or q.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InvalidInput(f"q, k and v must have the same dtype, one of {known}", {"file": name, **dtypes}, "Cast.")
    broken = [key for key, x in zip(NAMES, (q, k, v), strict=True) if not bool(torch.isfinite(x).all())]
    if broken:
        raise InvalidInput("activations must be finite", {"file": name, "with inf or nan": broken}, "Dump them again.")


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # torch's own advice, to load what may run code, is not repeated
        values = {"path": str(path), "error": type(error).__name__}
        raise InvalidInput("a .pt file must hold tensors and nothing that runs code", values, HOW) from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        remedy = "pip install 'nsa-autotune[codesign]', or save a .pt file."
        raise InvalidInput("a .safetensors file needs the package safetensors", {"path": str(path)}, remedy) from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        values = {"path": str(path), "message": (str(error).splitlines() or [""])[0]}
        raise InvalidInput("the file cannot be read as safetensors", values, HOW) from error
