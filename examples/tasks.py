"""What the example learns: associative recall made on the spot, or the characters of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

IGNORED = -100  # target of a place that asks nothing, as cross_entropy counts it
REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS = (REPOSITORY / "LICENSE", REPOSITORY / "README.md")  # some 20 thousand characters: small, but always there


@dataclass(frozen=True)
class Task:
    """`batch(size, seq, generator)` draws tokens `[B, T]` and targets `[B, T]`, where IGNORED asks nothing."""

    vocabulary: int
    batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    letters: str = ""  # of a text: the token of each is its place here


@dataclass(frozen=True)
class Recall:
    """Key-value pairs in the first half of the sequence, noise between them; then keys again, whose value is asked.

    A pair is told `repeats` times in a row, as a fact in a text takes more than two words. Between a pair and its
    question lie at least `window` tokens (a quarter of the sequence, if that is less), so that a sliding window alone
    can't answer.
    """

    seq: int
    pairs: int = 64
    keys: int = 512
    values: int = 64
    noise: int = 16
    window: int = 512
    repeats: int = 8

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, not {self.repeats}")
        if not 1 <= self.pairs <= self.keys:
            raise ValueError(f"--pairs must be from 1 to the number of --keys, {self.keys}, not {self.pairs}")
        room = max(8, 4 * self.repeats)  # tokens of a sequence for each of its pairs
        if self.seq < self.pairs * room:
            words = f"--pairs {self.pairs} and --repeats {self.repeats}"
            fewer = f", or choose --pairs from 1 to {self.seq // room}" if self.seq >= room else ""
            raise ValueError(f"--seq must be at least {self.pairs * room} for {words}, not {self.seq}{fewer}")

    @property
    def first_question(self) -> int:
        """First place of a question."""
        return self.seq // 2 + min(self.window, self.seq // 4)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets; ids are keys, then values, then noise."""
        first_noise = self.keys + self.values
        tokens = torch.randint(first_noise, first_noise + self.noise, (size, self.seq), generator=generator)
        targets = torch.full_like(tokens, IGNORED)
        keys = _draw(size, self.keys, self.pairs, generator)
        values = torch.randint(self.keys, first_noise, (size, self.pairs), generator=generator)
        span = 2 * self.repeats  # places that a pair takes
        told = span * _draw(size, self.seq // 2 // span, self.pairs, generator)
        asked = self.first_question + 2 * _draw(size, (self.seq - self.first_question) // 2, self.pairs, generator)
        for place in (*(told + 2 * repeat for repeat in range(self.repeats)), asked):
            tokens.scatter_(1, place, keys).scatter_(1, place + 1, values)
        return tokens, targets.scatter_(1, asked, values)


def recall_task(recall: Recall) -> Task:
    """Associative recall; every batch is new, so accuracy in training is accuracy on unseen sequences.

    A shorter sequence has as many pairs to a token, out of the same keys.
    """

    def batch(size: int, seq: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return replace(recall, seq=seq, pairs=max(1, recall.pairs * seq // recall.seq)).batch(size, generator)

    return Task(recall.keys + recall.values + recall.noise, batch)


def text_task(seq: int, file: Path | None = None) -> Task:
    """The next character of random pieces of `file`, or of the repository's licence and README."""
    try:
        text = "\n".join(path.read_text(encoding="utf-8") for path in ([file] if file else CORPUS))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text must be a text file in UTF-8: {error}") from error
    if len(text) <= seq:
        raise ValueError(f"the text has {len(text)} characters, --seq {seq} needs more; use a shorter --seq")
    letters = "".join(sorted(set(text)))
    ids = to_tokens(text, letters)

    def batch(size: int, seq: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - seq, (size, 1), generator=generator)
        pieces = ids[starts + torch.arange(seq + 1)]  # [B, T + 1]
        return pieces[:, :-1], pieces[:, 1:]

    return Task(len(letters), batch, letters)


def to_tokens(text: str, letters: str) -> Tensor:
    """Tokens of a text `[T]`; ValueError for a letter that there is no token for."""
    place = {letter: index for index, letter in enumerate(letters)}
    unknown = sorted(set(text) - set(place))
    if unknown:
        raise ValueError(f"no token for {''.join(unknown)!r}: the model knows {letters!r}")
    return torch.tensor([place[letter] for letter in text], dtype=torch.int64)


def _draw(rows: int, total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total` for each row, in random order: `[rows, count]`."""
    return torch.rand(rows, total, generator=generator).argsort(dim=-1)[:, :count]
