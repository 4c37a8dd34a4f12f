"""Compiled kernels that a package ships: handed to Triton in the place of a compilation that would give the same.

A binary fits a compilation of the same kernel, argument types, constants, alignments and options, for the same
architecture, by the same Triton. Anything else is compiled as always, which is logged once a kernel.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import StoreError
from ..spec import digest
from .triton_launch import kernels_among

INDEX = "index.json"  # {"triton": version, "binaries": {identity: file stem}}
NOT_OF_THE_CODE = ("extern_libs",)  # options that hold paths of the machine

logger = logging.getLogger(__name__.partition(".")[0])


def identity(kernel: Any, target: Any, signature: Any, constants: Any, options: Any, attributes: Any) -> str:
    """Name of what Triton is about to compile: equal for compilations that give the same binary; 20 hex digits."""
    chosen = {name: repr(value) for name, value in vars(options).items() if name not in NOT_OF_THE_CODE}
    parts = [
        Path(kernel.fn.__code__.co_filename).stem,  # names the variant, and so the functions that the kernel calls
        kernel.fn.__name__,
        kernel.src,
        f"{target.backend}:{target.arch}",
        [[name, str(kind)] for name, kind in signature.items()],
        sorted([str(place), repr(value)] for place, value in constants.items()),
        sorted([str(place), repr(value)] for place, value in attributes.items()),
        chosen,
    ]
    return digest(parts)


class Binaries:
    """The compiled kernels in a folder; none if there is no such folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: Mapping[str, Any] | None = None
        self._attached: set[str] = set()
        self._said: set[str] = set()

    def attach(self, module: ModuleType) -> None:
        """Have the kernels of a module take their binaries from here, where they fit."""
        if module.__name__ in self._attached or not (self._folder / INDEX).is_file():
            return
        self._attached.add(module.__name__)
        for name, kernel in kernels_among(vars(module)).items():
            kernel._do_compile = self._compiler(name, kernel, kernel._do_compile)

    def _compiler(self, name: str, kernel: Any, compile_anew: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the place of a kernel's compilation."""

        def compile_or_load(
            key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
        ) -> Any:
            cache, _, target, *_ = kernel.device_caches[device]
            stem, reason = self._find(identity(kernel, target, signature, constants, options, attributes))
            if reason:
                if name not in self._said:
                    self._said.add(name)
                    logger.warning("%s is compiled here, which takes seconds: %s", name, reason)
                return compile_anew(key, signature, device, constants, options, attributes, warmup)
            compiled = self._load(stem, kernel, signature, constants, attributes)
            cache[key] = compiled
            return compiled

        return compile_or_load

    def _find(self, wanted: str) -> tuple[str, str]:
        """The binary's file stem, or why there is none."""
        import triton

        if self._index is None:
            self._index = self._read_index()
        if self._index["triton"] != triton.__version__:
            return "", f"the binaries are of Triton {self._index['triton']}, this is {triton.__version__}"
        stem = self._index["binaries"].get(wanted)
        return (stem, "") if stem else ("", "no shipped binary fits this GPU, these sizes, strides and options")

    def _read_index(self) -> Mapping[str, Any]:
        try:
            data = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
            return {"triton": str(data["triton"]), "binaries": dict(data["binaries"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            values = {"file": INDEX, "reason": f"{type(error).__name__}: {error}"}
            raise StoreError("shipped binaries need their index", values, "Install the package anew.") from error

    def _load(self, stem: str, kernel: Any, signature: Any, constants: Any, attributes: Any) -> Any:
        from triton.compiler import ASTSource, CompiledKernel

        files = sorted(self._folder.glob(f"{stem}.*"))
        if len(files) != 2:  # the binary, and what Triton keeps beside it
            values = {"binary": stem, "files": [path.name for path in files]}
            raise StoreError("a shipped binary has two files", values, "Install the package anew.")
        source = ASTSource(kernel, signature, constants, attributes)
        return CompiledKernel(source, {path.name: str(path) for path in files}, stem)
