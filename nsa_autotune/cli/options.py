"""Options that several commands share, and the problems, families and configs they describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import NSAConfig
from ..errors import InvalidConfig, InvalidInput
from ..spec import DTYPES, LAYOUTS, Config, KernelSpec, Param, Problem, Value

if TYPE_CHECKING:
    from ..search.presets import Preset

DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

PresetOption = Annotated[str | None, typer.Option("--preset", help="A named problem; the options below change it.")]
SeqOption = Annotated[str, typer.Option("--seq", help="Sequence lengths, such as 8k,32k,64k.")]
DtypeOption = Annotated[list[str] | None, typer.Option("--dtype", help=f"One or more of {', '.join(DTYPES)}.")]
LocalityOption = Annotated[
    list[str] | None,
    typer.Option("--locality", help="Chance in [0, 1) that a block was also chosen by the token before; one or more."),
]
BatchOption = Annotated[int | None, typer.Option("--batch", help="Batch size, or number of packed sequences.")]
HeadsOption = Annotated[int | None, typer.Option("--heads", help="Query heads.")]
KvHeadsOption = Annotated[int | None, typer.Option("--kv-heads", help="Heads of keys and values.")]
DqkOption = Annotated[int | None, typer.Option("--d-qk", help="Head dimension of queries and keys.")]
DvOption = Annotated[
    int | None, typer.Option("--d-v", help="Head dimension of values; as --d-qk if only that is given.")
]
LayoutOption = Annotated[str | None, typer.Option("--layout", help=f"One of {', '.join(LAYOUTS)}.")]
NsaOption = Annotated[
    list[str] | None, typer.Option("--nsa", help="A constant of NSA, such as --nsa select_block_size=32; repeatable.")
]
DbOption = Annotated[
    str | None, typer.Option("--db", help="Database: a URL, such as sqlite:///tuned.sqlite or postgresql+psycopg://...")
]


def split(values: Iterable[str] | None) -> list[str]:
    """Parts of options that may be repeated, separated by commas, or both; doubles are dropped."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def assignments(values: Iterable[str] | None, option: str) -> dict[str, str]:
    """`name=value` texts as a dict."""
    pairs = {}
    for part in split(values):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise InvalidInput(f"{option} takes name=value", {option: part}, f"Write for example {option} NAME=64.")
        pairs[name.strip()] = value.strip()
    return pairs


@dataclass(frozen=True)
class ProblemChoice:
    """What the user said about problems; None and empty mean `as in the preset`."""

    preset: str | None = None
    seq: str = ""
    dtypes: tuple[str, ...] = ()
    localities: tuple[str, ...] = ()
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    d_qk: int | None = None
    d_v: int | None = None
    layout: str | None = None
    nsa: Mapping[str, str] | None = None

    def problems(self, default_preset: str) -> list[Problem]:
        """One problem for each sequence length, dtype and locality, in this order."""
        from ..search.presets import at_seq_len, get_preset, parse_seq_lens

        preset = get_preset(self.preset or default_preset)
        base = self._shaped(preset)
        seq_lens = parse_seq_lens(self.seq) if self.seq else preset.seq_lens
        dtypes = [_dtype(name) for name in self.dtypes] or [base.dtype]
        localities = [_locality(text) for text in self.localities] or [base.locality]
        return [
            at_seq_len(base, tokens).replace(dtype=dtype, locality=locality)
            for tokens in seq_lens
            for dtype in dtypes
            for locality in localities
        ]

    def _shaped(self, preset: Preset) -> Problem:
        given = {
            "batch": self.batch,
            "num_q_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "d_qk": self.d_qk,
            "d_v": self.d_v if self.d_v is not None else self.d_qk,
            "layout": self.layout,
            "nsa": _nsa(preset.problem.nsa, self.nsa) if self.nsa else None,
        }
        return preset.problem.replace(**{name: value for name, value in given.items() if value is not None})


def _dtype(name: str) -> str:
    from ..search.presets import unknown_name

    full = DTYPE_ALIASES.get(name.lower(), name.lower())
    if full not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return full


def _locality(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput("--locality takes numbers in [0, 1)", {"--locality": text}) from error


def _nsa(base: NSAConfig, changes: Mapping[str, str]) -> NSAConfig:
    from ..search.presets import unknown_name

    known = [field.name for field in fields(NSAConfig)]
    for name, value in changes.items():
        if name not in known:
            raise unknown_name("constant of NSA", name, known)
        if not value.isdigit():
            raise InvalidConfig(f"{name} must be a whole number", {name: value})
    return NSAConfig(**{**base.to_dict(), **{name: int(value) for name, value in changes.items()}})


def choose_specs(names: Iterable[str]) -> list[KernelSpec]:
    """The specs of the named families in pipeline order; all of them if none is named."""
    from ..kernels import all_specs, get_spec

    wanted = {get_spec(name).family for name in names}
    return [spec for family, spec in all_specs().items() if not wanted or family in wanted]


def choose_config(spec: KernelSpec, problem: Problem, changes: Mapping[str, str]) -> Config:
    """The default config with the user's values in it, checked."""
    config = spec.default_config(problem)
    params = {param.name: param for param in spec.params}
    for name, text in changes.items():
        config[name] = _value(params[name], text) if name in params else text
    spec.check_config(problem, config)
    return config


def _value(param: Param, text: str) -> Value:
    """The param's value that is written so; the text itself if there is none, which the check then refuses."""
    return next((value for value in param.values if str(value).lower() == text.lower()), text)
