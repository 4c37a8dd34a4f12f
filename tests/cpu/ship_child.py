"""A package under its own name, in a process that has torch and Triton and nothing of ours: run by test_ship.

`python ship_child.py PACKAGE WHAT RESULT` writes what the function of this name returns to a file of torch.save. The
functions take the package's name, so that the test computes the same with nsa_autotune itself.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCKED = ("nsa_autotune", "jinja2", "optuna", "sqlalchemy", "alembic", "typer", "rich", "pynvml", "numpy")


class Blocker:
    """The usual finders of modules, to which some packages are not installed."""

    def __init__(self) -> None:
        self._finders = list(sys.meta_path)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """Nothing for a blocked name, else what the first finder says that knows it."""
        if name.partition(".")[0] in BLOCKED:
            return None
        return next((found for finder in self._finders if (found := finder.find_spec(name, path, target))), None)

    def find_distributions(self, *context: Any) -> Any:
        """What is installed: Triton finds its backends so."""
        finders = [finder for finder in self._finders if hasattr(finder, "find_distributions")]
        return itertools.chain.from_iterable(finder.find_distributions(*context) for finder in finders)


if __name__ == "__main__":
    BLOCKED = BLOCKED[:-1] if sys.argv[2] == "kernels" else BLOCKED  # Triton's interpreter is written in numpy
    sys.meta_path[:] = [Blocker()]

import torch  # noqa: E402  after the hook
from torch import Tensor  # noqa: E402

CONSTANTS = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected": 4}
GPU = {"gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "1", "cuda": "12", "torch": "2.11.0+cu130"}
FINGERPRINT = {**GPU, "triton": "3.6.0", "assembler": ""}
TOKENS = 34


def part(package: str, name: str) -> Any:
    """A module of the package."""
    return importlib.import_module(f"{package}.{name}")


def pretended(package: str, **changes: str) -> Any:
    """The fingerprint of a GPU that is not here."""
    return part(package, "dispatch.fingerprint").Fingerprint(**{**FINGERPRINT, **changes})


def dispatcher_of(package: str, **how: Any) -> Any:
    """The package's dispatcher as on its GPU."""
    return importlib.import_module(package).open_dispatcher(fingerprint=pretended(package), **how)


def module(package: str, dispatcher: Any = None) -> dict[str, Tensor]:
    """Output and gradients of the module, forward and backward, for numbers that a seed fixes."""
    torch.manual_seed(0)
    own = importlib.import_module(package)
    how = {"config": own.NSAConfig(**CONSTANTS, window_size=32), "dispatcher": dispatcher, "phi_hidden": 16}
    built = own.NativeSparseAttention(32, 2, 1, 16, **how)
    x = torch.randn(1, TOKENS, 32, requires_grad=True)
    y = built(x)
    y.backward(torch.randn_like(y))
    grads = {f"d{name}": p.grad for name, p in built.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def kernels(package: str, dispatcher: Any = None) -> dict[str, Tensor]:
    """The same by generated kernels in Triton's interpreter, through the package's dispatcher."""
    serve = part(package, "ops.serve")
    chosen = dispatcher or dispatcher_of(package)

    def launch(given: Any, spec: Any, shape: Any, problem: Any, tensors: Any, device: Any) -> None:
        given.launch(spec, (spec.family, *shape), problem, device, tensors)

    kept = serve.on_kernels, serve.launch
    serve.on_kernels, serve.launch = (lambda x: True), launch
    try:
        found = module(package, chosen)
    finally:
        serve.on_kernels, serve.launch = kept
    return {**found, "steps": {str(step): count for step, count in chosen.stats.items()}}


def served(package: str) -> dict[str, Any]:
    """What a package says to other GPUs, other problems and a variable."""
    errors, Problem = part(package, "errors"), part(package, "spec").Problem
    spec = part(package, "kernels").get_spec("win_attn_fwd")
    config = importlib.import_module(package).NSAConfig(**CONSTANTS, window_size=32)
    asked = Problem(seq_q=64, seq_k=64, num_q_heads=2, num_kv_heads=1, d_qk=16, d_v=16, dtype="float32", nsa=config)

    def attempt(problem: Any = asked, variable: str = "", allow: bool = False, **gpu: str) -> str:
        os.environ["NSA_TUNED_ALLOW_OTHER_GPU"] = variable
        own = importlib.import_module(package)
        dispatcher = own.open_dispatcher(allow_other_gpu=allow, fingerprint=pretended(package, **gpu))
        try:
            return str(dispatcher.choose(spec, problem).step)
        except errors.NSAError as error:
            return f"{type(error).__name__}: {error}"

    other = {"gpu": "NVIDIA H200"}
    return {
        "same": attempt(),
        "other": attempt(**other),
        "other, allowed": attempt(allow=True, **other),
        "other, by variable": attempt(variable="1", **other),
        "other, variable 0": attempt(variable="0", **other),
        "other, variable yes": attempt(variable="yes", **other),
        "other architecture, allowed": attempt(allow=True, gpu="NVIDIA A100", capability="8.0"),
        "longer": attempt(asked.replace(seq_q=5000, seq_k=5000)),
        "other heads": attempt(asked.replace(num_q_heads=8)),
        "other head dim": attempt(asked.replace(d_qk=64)),
        "no kernel could": attempt(asked.replace(d_qk=72)),
    }


def imported(package: str) -> list[str]:
    """Modules that are there after the module served on the CPU."""
    module(package)
    return sorted({name.partition(".")[0] for name in sys.modules})


def binaries(package: str) -> dict[str, Any]:
    """Launches on a stub driver, without a compiler: two with a binary, one with none, one of another Triton."""
    import triton.compiler
    from cpu.stub_driver import stub_driver

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(package).addHandler(handler)

    def no_compiler(*given: Any, **named: Any) -> Any:
        raise AssertionError("the compiler ran")

    found: dict[str, Any] = {"steps": []}
    triton.compiler.compile = no_compiler  # where a kernel looks it up when it is first launched
    with stub_driver() as driver:
        for case, tokens, row in (
            ("tuned", 128, 32),
            ("longer", 500, 32),
            ("odd strides", 128, 40),
            ("newer", 128, 32),
        ):
            if case == "newer":
                index = Path(importlib.import_module(package).__path__[0], "binaries", "index.json")
                index.write_text(index.read_text().replace(f'"{triton.__version__}"', '"0.0"'))
            dispatcher = dispatcher_of(package)
            try:
                window(package, dispatcher, tokens, row)
                found[case] = len(driver.take())
                found["steps"] += [str(step) for step in dispatcher.stats]
            except part(package, "errors").KernelError as error:
                found[case] = str(error)
            if case == "tuned":
                x = torch.zeros(1024)
                part(package, "dispatch.probe").launch(x, torch.zeros(1024), 3.0, True)
                found["probe"] = len(driver.take())
    return {**found, "said": [text for text in said if "compiled here" in text]}


def window(package: str, dispatcher: Any, tokens: int, row: int) -> None:
    """Launch window attention of two sequences with `tokens` tokens; heads of q lie `row` elements apart."""
    Problem, config = part(package, "spec").Problem, importlib.import_module(package).NSAConfig(window_size=32)
    dims = {"num_q_heads": 2, "num_kv_heads": 1, "d_qk": 32, "d_v": 32, "dtype": "float16"}
    asked = Problem(batch=2, seq_q=tokens, seq_k=tokens, nsa=config, **dims)
    k, v, o = (torch.zeros(2, tokens, heads, 32, dtype=torch.float16) for heads in (1, 1, 2))
    q = torch.zeros(2, tokens, 2, row, dtype=torch.float16)[..., :32]
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": torch.zeros(2, tokens, 2), "scale": 0.125}
    spec = part(package, "kernels").get_spec("win_attn_fwd")
    dispatcher.launch(spec, ("window", tokens), lambda: asked, "cpu", {**tensors, "q_pos": None, "k_start": None})


def main(package: str, what: str, result: str) -> None:
    """Run one function and write what it returns."""
    torch.save(globals()[what](package), result)
    sys.stdout.flush()
    os._exit(0)  # binaries that a stub loaded are not unloaded


if __name__ == "__main__":
    main(*sys.argv[1:])
