"""Named problems, sequence lengths as users write them, and the problems that a family has to be tuned for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InvalidProblem, UnknownName
from ..spec import KernelSpec, Problem

_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}
MAX_SEQ_LEN = 16 * 1024 * 1024  # tokens; beyond it a length is a slip of the keyboard
_MAX_DIGITS = 12  # of a number that is worth reading


@dataclass(frozen=True)
class Preset:
    """A model's attention shape and the sequence lengths it is tuned for when the user names none."""

    name: str
    doc: str
    problem: Problem
    seq_lens: tuple[int, ...]  # tokens


def _preset(
    name: str, doc: str, heads: tuple[int, int], dims: tuple[int, int], seq_lens: tuple[int, ...] = (8192, 32768, 65536)
) -> Preset:
    problem = Problem(
        seq_q=seq_lens[0],
        seq_k=seq_lens[0],
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        d_qk=dims[0],
        d_v=dims[1],
    )
    return Preset(name, doc, problem, seq_lens)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            _preset("paper-27b", "the 27B model of the paper: 64 heads, 4 kv heads, d 192/128", (64, 4), (192, 128)),
            _preset("gqa16-d128", "64 heads in groups of 16, d 128", (64, 4), (128, 128)),
            _preset("llama-8b-like", "32 heads in groups of 4, d 128", (32, 8), (128, 128)),
            _preset("tiny", "8 small heads on short sequences, for a minute's try", (8, 2), (64, 64), (512, 1024)),
        )
    }
)


def unknown_name(what: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a misspelt name: lists the known ones and offers the closest."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return UnknownName(f"there is no {what} of this name", {what: name}, f"{hint}Known: {', '.join(names)}.")


def get_preset(name: str) -> Preset:
    """The preset of this name; UnknownName with the closest match otherwise."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def parse_seq_lens(text: str) -> tuple[int, ...]:
    """Token counts of a list such as `8k,32k,1000`, or of a range that doubles, `2k..128k`.

    k is 1024, m is 1024 * 1024; repeated counts are dropped.
    """
    return tuple(dict.fromkeys(tokens for part in text.split(",") for tokens in _parse_seq_part(part, text)))


def doublings(first: int, last: int, text: str) -> tuple[int, ...]:
    """`first`, twice that and so on below `last`, then `last`; InvalidProblem for a range `text` that falls."""
    if first > last:
        remedy = f"Write {last}..{first}."
        raise InvalidProblem("a range goes from the smaller number to the larger", {"range": text.strip()}, remedy)
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return (*found, last)


def _parse_seq_part(part: str, text: str) -> tuple[int, ...]:
    first, dots, last = part.partition("..")
    if not dots:
        return (_parse_seq_len(part, text),)
    return doublings(_parse_seq_len(first, text), _parse_seq_len(last, text), part)


def _parse_seq_len(part: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)([km]?)", part.strip().lower())
    if match is not None and len(match[1]) > _MAX_DIGITS:
        raise _too_long(part)
    if match is None or int(match[1]) == 0:
        raise InvalidProblem(
            "sequence lengths are positive whole numbers, with k for 1024 or m for 1048576 behind them",
            {"seq": text, "part": part.strip()},
            "Write for example 8k,32k,64k.",
        )
    tokens = int(match[1]) * _UNITS[match[2]]
    if tokens > MAX_SEQ_LEN:
        raise _too_long(part)
    return tokens


def _too_long(part: str) -> InvalidProblem:
    return InvalidProblem(
        f"a sequence has at most {MAX_SEQ_LEN // _UNITS['m']}m tokens",
        {"seq": part.strip()[:20]},
        "Write for example 8k,32k,64k.",
    )


def at_seq_len(problem: Problem, tokens: int, queries: int | None = None) -> Problem:
    """The problem with `tokens` keys and as many queries, or the last `queries` of them."""
    if queries is not None and queries > tokens:
        raise InvalidProblem(
            "queries are aligned with the last keys, so there cannot be more queries than keys",
            {"seq_q": queries, "seq": tokens},
            "Choose --seq-q at most as large as every --seq.",
        )
    return problem.replace(seq_q=tokens if queries is None else queries, seq_k=tokens)


def takes_one_tensor(spec: KernelSpec) -> bool:
    """True for a family that sees no query heads and one head dim: it serves keys and values in separate launches."""
    fields = set(spec.problem_fields)
    return "d_qk" in fields and not fields & {"d_v", "num_q_heads"}


def tuning_problems(spec: KernelSpec, problem: Problem) -> tuple[Problem, ...]:
    """The problems to tune so that the family serves `problem`: two for a one-tensor family when d_qk != d_v.

    A family to which packing makes no difference sees one long sequence. None if it serves another layout.
    """
    if problem.layout not in spec.layouts:
        return ()
    if problem.layout == "packed" and "layout" not in spec.problem_fields:
        problem = problem.replace(layout="batched", batch=1)
    if not takes_one_tensor(spec) or problem.d_qk == problem.d_v:
        return (problem,)
    return tuple(problem.replace(d_qk=dim, d_v=dim) for dim in (problem.d_qk, problem.d_v))
