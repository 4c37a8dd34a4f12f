"""Options that several commands share, and the problems, families and configs they describe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import NSAConfig
from ..errors import InvalidConfig, InvalidInput, InvalidProblem
from ..spec import CACHE_DTYPES, DTYPES, LAYOUTS, Config, KernelSpec, Param, Problem, Value

if TYPE_CHECKING:
    from ..search.presets import Preset

DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

PresetOption = Annotated[str | None, typer.Option("--preset", help="A named problem; the options below change it.")]
SeqOption = Annotated[str, typer.Option("--seq", help="Sequence lengths, such as 8k,32k,64k or 2k..128k.")]
SeqQOption = Annotated[
    str | None, typer.Option("--seq-q", help="Queries, the last of each sequence, such as 1; as many as keys if none.")
]
DtypeOption = Annotated[list[str] | None, typer.Option("--dtype", help=f"One or more of {', '.join(DTYPES)}.")]
LocalityOption = Annotated[
    list[str] | None,
    typer.Option("--locality", help="Chance in [0, 1) that a block was also chosen by the token before; one or more."),
]
BatchOption = Annotated[int | None, typer.Option("--batch", help="Batch size, or number of packed sequences.")]
HeadsOption = Annotated[int | None, typer.Option("--heads", help="Query heads.")]
KvHeadsOption = Annotated[int | None, typer.Option("--kv-heads", help="Heads of keys and values.")]
BatchesOption = Annotated[
    str | None, typer.Option("--batch", help="Batch sizes, or numbers of packed sequences, such as 1,4 or 1..8.")
]
ManyHeadsOption = Annotated[str | None, typer.Option("--heads", help="Query heads, such as 32,64.")]
ManyKvHeadsOption = Annotated[str | None, typer.Option("--kv-heads", help="Heads of keys and values, such as 4,8.")]
DqkOption = Annotated[int | None, typer.Option("--d-qk", help="Head dimension of queries and keys.")]
DvOption = Annotated[
    int | None, typer.Option("--d-v", help="Head dimension of values; as --d-qk if only that is given.")
]
PhiHiddenOption = Annotated[
    int | None, typer.Option("--phi-hidden", help="Width of the hidden layer of learned compression.")
]
LayoutOption = Annotated[str | None, typer.Option("--layout", help=f"One of {', '.join(LAYOUTS)}.")]
PageSizeOption = Annotated[
    int | None, typer.Option("--page-size", help="Tokens a page of a paged cache, 64 if none; needs --layout paged.")
]
CacheDtypeOption = Annotated[
    str | None, typer.Option("--cache-dtype", help="fp8, or problem (as --dtype); needs --layout paged.")
]
NsaOption = Annotated[
    list[str] | None, typer.Option("--nsa", help="A constant of NSA, such as --nsa select_block_size=32; repeatable.")
]
DbOption = Annotated[
    str | None,
    typer.Option("--db", help="Database: a file such as tuned.sqlite, or a URL such as postgresql+psycopg://..."),
]
PolicyOption = Annotated[
    str, typer.Option("--policy", help="How times are taken: eager-cold, eager-warm, graph-cold or graph-warm.")
]


def split(values: Iterable[str] | None, option: str = "") -> list[str]:
    """Parts of options that may be repeated, separated by commas, or both; doubles are dropped.

    InvalidInput if `option` is named and was given without any part: nobody means `all` by that.
    """
    given = list(values or ())
    parts = (part.strip() for value in given for part in value.split(","))
    found = list(dict.fromkeys(part for part in parts if part))
    if option and given and not found:
        remedy = f"Name one or more, separated by commas, or leave {option} out."
        raise InvalidInput(f"{option} names nothing", {option: ",".join(given)}, remedy)
    return found


def check_device(name: str) -> str:
    """The name of a CUDA device; InvalidInput for anything else."""
    if re.fullmatch(r"cuda(:\d{1,3})?", name) is None:
        raise InvalidInput("--device is a CUDA device", {"--device": name}, "Write cuda, cuda:0, cuda:1 and so on.")
    return name


def assignments(values: Iterable[str] | None, option: str) -> dict[str, str]:
    """`name=value` texts as a dict."""
    pairs = {}
    for part in split(values, option):
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
    phi_hidden: int | None = None
    seq_q: str | None = None  # queries; None is as many as keys, or one if paged
    page_size: int | None = None
    cache_dtype: str | None = None

    def problems(self, default_preset: str) -> list[Problem]:
        """One problem for each sequence length, dtype and locality, in this order."""
        from ..search.presets import at_seq_len, get_preset, parse_seq_lens

        preset = get_preset(self.preset or default_preset)
        base = self._shaped(preset)
        usual = 1 if base.layout == "paged" else None
        queries = usual if self.seq_q is None else _one_length(self.seq_q)
        seq_lens = parse_seq_lens(self.seq) if self.seq else preset.seq_lens
        dtypes = [parse_dtype(name) for name in self.dtypes] or [base.dtype]
        localities = [_locality(text) for text in self.localities] or [base.locality]
        return [
            at_seq_len(base, tokens, queries).replace(dtype=dtype, locality=locality)
            for tokens in seq_lens
            for dtype in dtypes
            for locality in localities
        ]

    def _shaped(self, preset: Preset) -> Problem:
        heads = preset.problem.num_q_heads if self.heads is None else self.heads
        kv_heads = preset.problem.num_kv_heads if self.kv_heads is None else self.kv_heads
        _check_heads(heads, kv_heads)
        given = {
            "batch": self.batch,
            "num_q_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "d_qk": self.d_qk,
            "d_v": self.d_v if self.d_v is not None else self.d_qk,
            "layout": None if self.layout is None else _layout(self.layout),
            "phi_hidden": self.phi_hidden,
            "page_size": self.page_size,
            "cache_dtype": None if self.cache_dtype is None else _cache_dtype(self.cache_dtype),
            "nsa": _nsa(preset.problem.nsa, self.nsa) if self.nsa else None,
        }
        if given["layout"] != "paged" and (self.page_size is not None or self.cache_dtype is not None):
            values = {"--page-size": self.page_size, "--cache-dtype": self.cache_dtype, "--layout": self.layout}
            raise InvalidInput(
                "--page-size and --cache-dtype are those of a paged cache", values, "Add --layout paged."
            )
        return preset.problem.replace(**{name: value for name, value in given.items() if value is not None})


def _one_length(text: str) -> int:
    from ..search.presets import parse_seq_lens

    lengths = parse_seq_lens(text)
    if len(lengths) != 1:
        raise InvalidInput("--seq-q is one number of queries", {"--seq-q": text}, "Write for example --seq-q 1.")
    return lengths[0]


def _check_heads(heads: int, kv_heads: int) -> None:
    if kv_heads > 0 and heads % kv_heads:
        raise InvalidProblem(
            "the number of query heads must be a multiple of the number of kv heads",
            {"num_q_heads": heads, "num_kv_heads": kv_heads},
            "Choose for example --heads 64 --kv-heads 4.",
        )


def _layout(name: str) -> str:
    from ..search.presets import unknown_name

    if name not in LAYOUTS:
        raise unknown_name("layout", name, LAYOUTS)
    return name


def _cache_dtype(name: str) -> str:
    from ..search.presets import unknown_name

    full = "float8_e4m3fn" if name.lower() in ("fp8", "e4m3") else name.lower()
    if full not in CACHE_DTYPES:
        raise unknown_name("cache dtype", name, ("fp8", *CACHE_DTYPES))
    return full


def parse_dtype(name: str) -> str:
    """The full name of a dtype or of its short form; UnknownName with the nearest one."""
    from ..search.presets import unknown_name

    full = DTYPE_ALIASES.get(name.lower(), name.lower())
    if full not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return full


def _locality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise InvalidInput("locality must be in [0, 1)", {"--locality": text}, "Write for example --locality 0,0.8.")
    return value


def _nsa(base: NSAConfig, changes: Mapping[str, str]) -> NSAConfig:
    from ..search.presets import unknown_name

    known = [field.name for field in fields(NSAConfig)]
    for name, value in changes.items():
        if name not in known:
            raise unknown_name("constant of NSA", name, known)
        if not value.isdecimal() or len(value) > 9:
            remedy = f"Write for example --nsa {name}=64."
            raise InvalidConfig(f"{name} must be a whole number below a billion", {name: value}, remedy)
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
    return next((value for value in param.widest if str(value).lower() == text.lower()), text)
