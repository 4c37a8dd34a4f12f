"""Data that describes kernels: problems, parameters, constraints, costs. No GPU, no Jinja, no SQL, no Optuna."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from .config import NSAConfig
from .errors import InvalidConfig, InvalidProblem, UnknownName

SCHEMA_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("batched", "packed", "paged")
CACHE_DTYPES = ("problem", "float8_e4m3fn")
PAGE_SIZES = (16, 32, 64, 128, 256)
POLICY_NAMES = ("eager-cold", "eager-warm", "graph-cold", "graph-warm")  # how times are taken; see bench.policy
DEFAULT_POLICY = POLICY_NAMES[0]  # where nobody says
DEFAULT_LOCALITY = 0.8  # assumed where nobody says: trained models select alike for adjacent tokens
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Value = int | float | bool | str
Config = dict[str, Value]  # how it is done: parameter name -> value


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed and stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_policy(name: str) -> None:
    """Raise UnknownName unless times are taken so."""
    if name not in POLICY_NAMES:
        raise UnknownName("no such measurement policy", {"policy": name}, f"Policies: {', '.join(POLICY_NAMES)}.")


def digest(value: object) -> str:
    """First 20 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Problem:
    """What is asked of a kernel: shapes, dtype, constants, layout and locality of the selection.

    In a packed problem `batch` counts sequences and `seq_q`, `seq_k` are totals over them. In a paged one, `seq_q`
    is the number of new tokens of every sequence, and no sequence is longer than `seq_k`.
    """

    batch: int = 1  # B
    seq_q: int = 8192  # TQ, tokens
    seq_k: int = 8192  # TK, tokens
    num_q_heads: int = 64  # HQ
    num_kv_heads: int = 4  # H
    d_qk: int = 128  # D_QK
    d_v: int = 128  # D_V
    dtype: str = "bfloat16"
    layout: str = "batched"
    locality: float = DEFAULT_LOCALITY  # P(a freely chosen block was also chosen by the token before); 0 is random
    phi_hidden: int = 128  # width of phi's hidden layer
    nsa: NSAConfig = field(default_factory=NSAConfig)
    page_size: int = 64  # tokens a page of a paged cache
    cache_dtype: str = "problem"  # of a paged cache

    def __post_init__(self) -> None:
        for name in ("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "phi_hidden"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                remedy = "Give a whole number of at least 1."
                raise InvalidProblem(f"{name} must be a positive int", {name: value}, remedy)
        if self.dtype not in DTYPES:
            raise InvalidProblem(f"dtype must be one of {', '.join(DTYPES)}", {"dtype": self.dtype})
        if self.layout not in LAYOUTS:
            raise InvalidProblem(f"layout must be one of {', '.join(LAYOUTS)}", {"layout": self.layout})
        if self.page_size not in PAGE_SIZES:
            known = f"Use one of {', '.join(map(str, PAGE_SIZES))}."
            raise InvalidProblem("page_size must be a known size", {"page_size": self.page_size}, known)
        if self.cache_dtype not in CACHE_DTYPES:
            known = f"Use one of {', '.join(CACHE_DTYPES)}."
            raise InvalidProblem("cache_dtype must be a known dtype", {"cache_dtype": self.cache_dtype}, known)
        if self.num_q_heads % self.num_kv_heads:
            raise InvalidProblem(
                "the number of query heads must be a multiple of the number of kv heads",
                {"num_q_heads": self.num_q_heads, "num_kv_heads": self.num_kv_heads},
                "Every kv head serves equally many query heads, such as 64 and 4.",
            )
        if self.layout != "packed" and self.seq_q > self.seq_k:
            rule = "queries are aligned with the last keys, so seq_q <= seq_k must hold"
            raise InvalidProblem(rule, {"seq_q": self.seq_q, "seq_k": self.seq_k}, "Pass all the keys.")
        if not 0.0 <= self.locality < 1.0:
            raise InvalidProblem("locality must be in [0, 1)", {"locality": self.locality}, "0 is random, 0.8 usual.")

    @property
    def group_size(self) -> int:
        """G = HQ / H, query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def has_fp8_cache(self) -> bool:
        """True if pages hold float8_e4m3fn, and have scales."""
        return self.cache_dtype != "problem"

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, the NSA constants nested under `nsa`; those of a cache only for a paged problem."""
        values = asdict(self)
        if self.layout != "paged":
            del values["page_size"], values["cache_dtype"]
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """The inverse of `to_dict`."""
        values = dict(data)
        values["nsa"] = NSAConfig(**values.get("nsa", {}))
        return cls(**values)


@dataclass(frozen=True)
class Param:
    """One dimension of a search space: ordered values; `structural` ones change which lines the template renders.

    `reserve` holds values beyond the ends: legal, but tried only next to a config that is among the best and lies on
    that end. `former`: what kernels did before there was the parameter; records of then are read as if they said so.
    """

    name: str
    values: tuple[Value, ...]
    doc: str
    structural: bool = False
    reserve: tuple[int, ...] = ()
    former: Value | None = None

    @cached_property
    def widest(self) -> tuple[Value, ...]:
        """All values that a config may have, in order."""
        low, high = [v for v in self.reserve if v < self.values[0]], [v for v in self.reserve if v > self.values[-1]]  # type: ignore[operator]
        return (*low, *self.values, *high)


@dataclass(frozen=True)
class Constraint:
    """A rule that a (problem, config) pair must meet, with its reason; serves search, errors and defaults alike."""

    reason: str
    holds: Callable[[Problem, Config], bool]


@dataclass(frozen=True)
class ProblemRule:
    """A rule that a problem alone must meet for a family to serve it."""

    reason: str
    holds: Callable[[Problem], bool]
    remedy: str = ""


@dataclass(frozen=True)
class Argument:
    """A tensor of a kernel's launch function: symbolic shape, dtype ("problem": the problem's), content in a trial.

    `fill` is one of normal, weight, bias, gates, lse, lse_cmp, lse_slc, lse_win, delta, blocks, out, the name of an
    index tensor of PackedLayout, or one of a paged cache: tokens, cells, page_scale, table, lengths, counters, and
    state_tokens, state_cells, state_scale of one that the kernel adds to. dtype "cache" is the problem's cache dtype.
    Symbols are resolved by `bench.inputs`.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: str = "problem"
    fill: str = "normal"

    @property
    def is_output(self) -> bool:
        """True for a tensor that the kernel writes."""
        return self.fill == "out" or self.is_state

    @property
    def is_state(self) -> bool:
        """True for a tensor that the kernel writes in parts: the rest stays as it was."""
        return self.fill.startswith("state_")


@dataclass(frozen=True)
class Cost:
    """Work of one launch: useful floating-point operations and the fewest bytes through device memory."""

    flops: float
    bytes_moved: float
    on_chip_bytes: float = 0.0  # bytes that must cross from L2 into the multiprocessors
    mma_flops: float = 0.0  # matrix-unit operations including padding; 0 means `flops`
    tile_rows: int = 0  # of the scores that a program holds at once, and columns; 0 where there are none
    tile_columns: int = 0


@dataclass(frozen=True)
class KernelSpec:
    """One family: what its template needs, what may be searched, what it computes and costs."""

    family: str
    doc: str
    arguments: tuple[Argument, ...]
    problem_fields: tuple[str, ...]  # fields of Problem that enter the key
    nsa_fields: tuple[str, ...]  # fields of NSAConfig that enter the key
    params: tuple[Param, ...]
    constraints: tuple[Constraint, ...]
    rules: tuple[ProblemRule, ...]
    defaults: Callable[[Problem], Config]
    cost: Callable[[Problem, Config], Cost]
    structure: Callable[[Problem, Config], dict[str, Any]]  # what decides the rendered lines
    constants: Callable[[Problem, Config], dict[str, Value]]  # tl.constexpr values of the kernel
    reference: Callable[..., Mapping[str, Any]]  # (problem, inputs by name, layout, positions) -> outputs by name
    scalars: tuple[str, ...] = ()  # numbers that launch takes besides tensors: "scale", "seq_k", "num_new"
    cases: tuple[Problem, ...] = ()  # small problems for tests
    layouts: tuple[str, ...] = ("batched", "packed")  # that the family serves
    importance: Callable[..., Any] | None = None  # (problem, inputs) -> scores of a paged selection, [B * Q, H, NB]
    library: str = ""  # provider measured beside it, if any
    only: tuple[Config, ...] | None = field(default=None, compare=False)  # a list that holds every legal config, if any

    @property
    def template(self) -> str:
        """File name of the template, relative to templates/."""
        return f"{self.family}.py.j2"

    def scalar_values(self, problem: Problem, scale: float) -> dict[str, float | int]:
        """The numbers of one launch by name."""
        known: dict[str, float | int] = {"scale": scale, "seq_k": problem.seq_k, "num_new": problem.seq_q}
        return {name: known[name] for name in self.scalars}

    def problem_key(self, problem: Problem, *, bucket: bool = True) -> str:
        """Canonical JSON of the fields that matter; token counts round up to a power of two when `bucket`."""
        key: dict[str, Any] = {name: getattr(problem, name) for name in self.problem_fields}
        for name in ("seq_q", "seq_k", "batch"):
            if bucket and name in key:
                key[name] = 1 << (int(key[name]) - 1).bit_length()
        constants = problem.nsa.to_dict()
        key["nsa"] = {name: constants[name] for name in self.nsa_fields}
        return canonical_json(key)

    def check_problem(self, problem: Problem) -> None:
        """Raise InvalidProblem with the first rule that the problem breaks."""
        if problem.layout not in self.layouts:
            text = f"{self.family}: layout must be {' or '.join(self.layouts)}"
            raise InvalidProblem(text, {"layout": problem.layout}, f"Say --layout {self.layouts[0]}.")
        for rule in self.rules:
            if not rule.holds(problem):
                names = {name: getattr(problem, name) for name in self.problem_fields}
                raise InvalidProblem(f"{self.family}: {rule.reason}", {**names, "nsa": problem.nsa}, rule.remedy)

    def broken_constraint(self, problem: Problem, config: Config) -> str | None:
        """The reason of the first constraint that the config breaks, or None."""
        for param in self.params:
            if param.name not in config:
                return f"{param.name} is missing"
            value = config[param.name]
            if value not in param.widest or type(value) is not type(param.widest[param.widest.index(value)]):
                return f"{param.name}={config[param.name]!r} is not one of {param.widest}"
        unknown = set(config) - {param.name for param in self.params}
        if unknown:
            return f"unknown parameters {sorted(unknown)}"
        return next((c.reason for c in self.constraints if not c.holds(problem, config)), None)

    def check_config(self, problem: Problem, config: Config) -> None:
        """Raise InvalidConfig with the reason if the config cannot serve the problem."""
        reason = self.broken_constraint(problem, config)
        if reason is not None:
            raise InvalidConfig(f"{self.family}: {reason}", {"config": config}, "See `nsa-autotune render --family`.")

    def completed(self, config: Config) -> Config:
        """A config with the former values of parameters that it was stored without."""
        missing = {p.name: p.former for p in self.params if p.former is not None and p.name not in config}
        return {**config, **missing}

    def default_config(self, problem: Problem) -> Config:
        """The config served when nothing is tuned; obeys every constraint."""
        self.check_problem(problem)
        config = self.defaults(problem)
        self.check_config(problem, config)
        return config

    def variant_digest(self, problem: Problem, config: Config, template_digest: str) -> str:
        """Digest of family, constants, config and template: the name of one rendered source."""
        return digest(
            {
                "schema": SCHEMA_VERSION,
                "family": self.family,
                "structure": self.structure(problem, config),
                "constants": self.constants(problem, config),
                "config": config,
                "template": template_digest,
            }
        )
