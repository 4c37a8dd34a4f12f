"""Where commands print: results to stdout, everything else to stderr; numbers as people read them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InvalidInput
from ..files import whole_file
from ..plain import visible
from .fit import fit_columns

PLAIN_WIDTH = 200  # columns, when stdout is a file or a pipe: rows stay on one line


class PlainConsole(Console):
    """A console that writes control characters of texts out; its own colours stay."""

    def print(self, *objects: Any, **how: Any) -> None:
        """As Console's."""
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **how)


def output() -> Console:
    """The console of results; where it is no terminal COLUMNS tells its width."""
    console = PlainConsole(highlight=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return PlainConsole(highlight=False, width=PLAIN_WIDTH)


def errors() -> Console:
    """The console of messages and progress."""
    return PlainConsole(stderr=True, highlight=False)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Iterable[str] = (),
    less_important: Iterable[str] = (),
    width: int | None = None,
) -> Table:
    """A table of texts; the columns named in `numbers` are aligned to the right and never broken.

    Where it does not fit `width` (the output's, in characters), headers of numbers go on several lines, then columns
    of `less_important` are left out, the first one first, and named below the table.
    """
    cells = [[cell_text(cell) for cell in row] for row in rows]
    found = fit_columns(columns, cells, set(numbers), less_important, output().width if width is None else width)
    table = Table(title=visible(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in found.columns:
        justify: Literal["right", "left"] = "right" if column.is_number else "left"
        overflow: Literal["ellipsis", "fold"] = "ellipsis" if column.is_number else "fold"
        table.add_column(
            column.header, justify=justify, overflow=overflow, no_wrap=column.is_number, width=column.width
        )
    for row in cells:
        table.add_row(*(row[column.index] for column in found.columns))
    if found.left_out:
        table.caption = f"left out, the terminal is too narrow: {', '.join(found.left_out)}"
        table.caption_justify = "left"
    return table


def cell_text(value: object) -> str:
    """A cell's text: nothing for None, four significant digits for floats; never markup or control characters."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)
    if isinstance(value, float) and abs(value) >= 1e4:
        text = f"{value:.0f}"
    return visible(text).replace("[", "\\[")


def problem_text(problem: Mapping[str, Any], family: str) -> str:
    """A problem on one short line, such as `T 65536 HQ 64 H 4 d 192/128 bfloat16`; locality only where it counts."""
    dims = f"{problem['d_qk']}" if problem["d_qk"] == problem["d_v"] else f"{problem['d_qk']}/{problem['d_v']}"
    tokens = f"{problem['seq_k']}" if problem["seq_q"] == problem["seq_k"] else f"{problem['seq_q']}/{problem['seq_k']}"
    parts = [f"B {problem['batch']}"] if problem["batch"] != 1 else []
    parts += [f"T {tokens}", f"HQ {problem['num_q_heads']}", f"H {problem['num_kv_heads']}", f"d {dims}"]
    parts += [problem["dtype"]]
    parts += [problem["layout"]] if problem["layout"] != "batched" else []
    parts += [f"pages of {problem['page_size']}"] if problem.get("page_size", 64) != 64 else []
    parts += ["fp8 cache"] if problem.get("cache_dtype", "problem") != "problem" else []
    from ..kernels import all_specs  # needs torch, which `--help` does not

    known = all_specs().get(family)
    if known is not None and "locality" in known.problem_fields:
        parts.append(f"locality {problem['locality']:g}")
    if known is not None and "phi_hidden" in known.problem_fields and problem.get("phi_hidden", 128) != 128:
        parts.append(f"phi {problem['phi_hidden']}")
    return " ".join(parts)


def gain_text(default_us: float | None, winner_us: float | None) -> str:
    """How many times faster the winner is than the default."""
    return f"{default_us / winner_us:.2f}x" if default_us and winner_us else ""


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; InvalidInput if the folder cannot be written."""
    with asked_file(path) as file:
        file.write(text.encode())


@contextmanager
def asked_file(path: Path) -> Iterator[BinaryIO]:
    """The file that a user named, written as a whole or not at all; InvalidInput if the folder cannot be written."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        values = {"path": str(path), "reason": error.strerror}
        remedy = "Name a file in an existing folder that you may write."
        raise InvalidInput("the file cannot be written", values, remedy) from error


def there_is(counts: Mapping[str, int]) -> str:
    """What a question might have asked for where its answer is empty, and how."""
    asked = {"winners": "db best", "measured": "db query --table trials", "predicted": "db query --kind predicted"}
    names = {"winners": "winner", "measured": "measured trial", "predicted": "prediction"}
    found = [f"{count_text(counts[kind], name)} ({asked[kind]})" for kind, name in names.items() if counts[kind]]
    return f"no row; of this GPU, family and problem there are: {', '.join(found) or 'no records at all'}"


def count_text(count: int, name: str, plural: str = "") -> str:
    """`1 row`, `2 rows`; `plural` where it is not made by an s."""
    return f"{count} {name}" if count == 1 else f"{count} {plural or f'{name}s'}"
