"""What `nsa-autotune codesign` is asked for, checked before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidInput
from ..kernels import FUSED
from ..spec import DTYPES, KernelSpec, Problem
from . import options
from .bench import check_folder
from .db import Format

if TYPE_CHECKING:
    from ..bench.activations import Activations
    from ..search.codesign import Objective

PLOT_FORMATS = (".png", ".pdf", ".svg")
COMPRESSIONS = {"mean": "cmp_mlp", "mlp": "cmp_pool"}  # phi -> the families that it does without
VALUES: Mapping[str, tuple[int, ...]] = {  # tried where the user names none
    "select_block_size": (32, 64, 128),
    "num_selected": (8, 16, 32),
    "window_size": (256, 512),
    "compress_stride": (16, 32),
    "compress_block_size": (32, 64),
}


@dataclass(frozen=True)
class Plan:
    """One command; `values` are those to try of each constant, `trials` are for each kernel."""

    base: Problem
    values: Mapping[str, tuple[int, ...]]
    specs: tuple[KernelSpec, ...]
    activations: Activations | None  # None makes some up
    quality_tokens: int
    quality_queries: int
    objective: Objective
    designs: int
    trials: int
    minutes: float | None
    seed: int
    target: str | None  # None measures
    db: str | None
    device: str
    policy: str  # of measuring
    jobs: int
    plot: Path | None
    style: Format


def read_activations(path: Path | None) -> Activations | None:
    """The user's activations, if there are any."""
    if path is None:
        return None
    from ..bench.activations import load_activations

    return load_activations(path)


def shape(given: Activations | None, **asked: int | None) -> dict[str, int | None]:
    """Heads and head dims as `ProblemChoice` takes them: the file's, with which options must agree."""
    if given is None:
        return asked
    q, k, v = given.q.shape, given.k.shape, given.v.shape
    found = {"heads": q[2], "kv_heads": k[2], "d_qk": q[3], "d_v": v[3]}
    wrong = {name: value for name, value in asked.items() if value not in (None, found[name])}
    if wrong:
        values: dict[str, object] = {**wrong, "file": found}
        raise InvalidInput("the options contradict the activations", values, "Leave these options out.")
    return dict(found)


def dtypes_of(given: Activations | None) -> tuple[str, ...]:
    """The dtype of the activations, if kernels have it."""
    name = "" if given is None else str(given.q.dtype).removeprefix("torch.")
    return (name,) if name in DTYPES else ()


def one_problem(problems: Sequence[Problem]) -> Problem:
    """The only problem; InvalidInput for several."""
    if len(problems) != 1:
        raise InvalidInput(
            "co-design is for one sequence length, dtype and locality", {"problems": len(problems)}, "Name one of each."
        )
    return problems[0]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers above 0 of a list such as `32,64`; nothing if the option was not given."""
    parts = options.split([text], option) if text else []
    if wrong := [part for part in parts if not part.isdecimal() or not 0 < int(part) < 10**9]:
        raise InvalidInput(f"{option} takes whole numbers above 0", {option: wrong[0]}, f"Write {option} 32,64, say.")
    return tuple(int(part) for part in parts)


def one_length(option: str, text: str) -> int:
    """One number of tokens, such as 8k."""
    from ..search.presets import parse_seq_lens

    lengths = parse_seq_lens(text)
    if len(lengths) != 1:
        raise InvalidInput(f"{option} is one number of tokens", {option: text}, f"Write for example {option} 8k.")
    return lengths[0]


def objective(name: str) -> Objective:
    """The quality that is searched."""
    from ..search.presets import unknown_name

    if name == "mass":
        return "mass"
    if name == "output":
        return "output"
    raise unknown_name("quality", name, ("mass", "output"))


def merge_values(asked: Mapping[str, tuple[int, ...]], fixed: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Values to try of each constant: those asked for, none besides its own of one that --nsa fixes, else VALUES."""
    if twice := [name for name in fixed if asked.get(name)]:
        raise InvalidInput("a constant is either fixed or searched", {"--nsa": twice}, "Drop one of the options.")
    return {name: found or (() if name in fixed else VALUES.get(name, ())) for name, found in asked.items()}


def pass_specs(names: Iterable[str], compression: str, *, backward: bool) -> tuple[KernelSpec, ...]:
    """The kernels of a pass with this phi, or those that are named."""
    from ..search.presets import unknown_name

    if compression not in COMPRESSIONS:
        raise unknown_name("compression", compression, COMPRESSIONS)
    wanted = list(names)
    return tuple(
        spec
        for spec in options.choose_specs(wanted)
        if wanted or ("batched" in spec.layouts and _in_pass(spec.family, compression, backward=backward))
    )


def _in_pass(family: str, compression: str, *, backward: bool) -> bool:
    return family not in FUSED and not family.startswith(COMPRESSIONS[compression]) and (backward or "_fwd" in family)


def check_group_sizes(base: Problem, sizes: Iterable[int]) -> None:
    """kv heads can be averaged to fewer, not made more."""
    if wrong := [size for size in sizes if size % base.group_size or base.num_q_heads % size]:
        raise InvalidInput(
            "--group-sizes are multiples of the activations' own that divide the query heads",
            {"--group-sizes": wrong, "own": base.group_size, "heads": base.num_q_heads},
            "Larger groups average kv heads; smaller ones need activations with more kv heads.",
        )


def check_plot(path: Path | None) -> None:
    """An hour of tuning must not end at a missing package or folder, or an ending that is no image format."""
    check_folder(path)
    if path is not None and path.suffix not in PLOT_FORMATS:
        raise InvalidInput(
            f"a plot is a file that ends in {', '.join(PLOT_FORMATS)}", {"--plot": str(path)}, "Write --plot front.png."
        )
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput(
            "--plot needs the package matplotlib", {"--plot": str(path)}, "pip install 'nsa-autotune[codesign]'."
        )
