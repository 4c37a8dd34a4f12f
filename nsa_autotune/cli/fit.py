"""Which columns of a table fit a width, and how wide each one is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.markup import render

GAP_CHARS = 3  # between two columns
EDGE_CHARS = 2  # both edges together
LEAST_TEXT_CHARS = 12  # a longer text may be wrapped at words down to this
LONGEST_WORD_CHARS = 24  # a longer word may be broken


@dataclass(frozen=True)
class Column:
    """One column as it is shown; `width` in characters, None where nothing fits."""

    index: int  # in the rows
    header: str
    is_number: bool
    least: int
    natural: int
    width: int | None = None


@dataclass(frozen=True)
class Fit:
    """The columns to show and the names of those left out."""

    columns: tuple[Column, ...]
    left_out: tuple[str, ...]


def fit_columns(
    names: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[str], less_important: Iterable[str], width: int
) -> Fit:
    """As many columns as are readable in `width` characters; those of `less_important` go, the first one first."""
    shown = list(range(len(names)))
    left_out: list[str] = []
    spare = [name for name in less_important if name in names]
    while True:
        for stacked in (False, True):
            columns = [_measure(names, rows, index, names[index] in numbers, stacked) for index in shown]
            room = width - EDGE_CHARS - GAP_CHARS * (len(columns) - 1) - sum(column.least for column in columns)
            if room >= 0:
                return Fit(tuple(_share(columns, room)), tuple(left_out))
        if not spare:
            return Fit(tuple(columns), tuple(left_out))
        left_out.append(spare.pop(0))
        shown.remove(names.index(left_out[-1]))


def _measure(names: Sequence[str], rows: Sequence[Sequence[str]], index: int, is_number: bool, stacked: bool) -> Column:
    header = names[index]
    if is_number and stacked:
        header = header.replace(" ", "\n").replace("_", "_\n")
    texts = [*header.split("\n"), *(render(row[index]).plain for row in rows)]
    natural = max(map(len, texts))
    if is_number:
        return Column(index, header, is_number, natural, natural)
    longest_word = max((len(word) for text in texts for word in text.split()), default=0)
    least = max(min(longest_word, LONGEST_WORD_CHARS), min(natural, LEAST_TEXT_CHARS))
    return Column(index, header, is_number, least, natural)


def _share(columns: Sequence[Column], room: int) -> list[Column]:
    """Give what is left to the texts that lack most of their natural width."""
    widths = [column.least for column in columns]
    for _ in range(min(room, sum(column.natural - column.least for column in columns))):
        neediest = max(range(len(columns)), key=lambda i: columns[i].natural - widths[i])
        widths[neediest] += 1
    return [replace(column, width=max(1, width)) for column, width in zip(columns, widths, strict=True)]
