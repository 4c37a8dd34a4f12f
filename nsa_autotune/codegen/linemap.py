"""Which template line wrote which generated line: marks put in by a Jinja extension and taken out after rendering."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: they never occur in a template
_MARK = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")

Origin = tuple[str, int]  # (template, line)


class LineMarks(Extension):
    """Puts `template:line` before each line of template text; `take_marks` removes it again."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:  # type: ignore[override]
        """Mark the text tokens of one template."""
        for token in stream:
            if token.type != "data":
                yield token
                continue
            yield Token(token.lineno, "data", _mark_lines(token.value, stream.name or "?", token.lineno))


def _mark_lines(text: str, template: str, first_line: int) -> str:
    pieces = text.split("\n")
    marked = []
    for index, piece in enumerate(pieces):
        opens_expression = index == len(pieces) - 1 and piece != ""  # spaces before {{ ... }} begin a line too
        if (piece.strip() or opens_expression) and not (index == 0 and first_line == 0):
            piece = f"{_OPEN}{template}:{first_line + index}{_CLOSE}{piece}"
        marked.append(piece)
    return "\n".join(marked)


def take_marks(text: str) -> tuple[str, list[Origin | None]]:
    """The text without marks, and the origin of every line (None for blank ones)."""
    lines: list[str] = []
    origins: list[Origin | None] = []
    for line in text.split("\n"):
        found = _MARK.search(line)
        lines.append(_MARK.sub("", line))
        if found is None:
            origins.append(None)
        else:
            template, number = found.group(1).rsplit(":", 1)
            origins.append((template, int(number)))
    return "\n".join(lines), origins


def strip_marks(line: str) -> str:
    """One line without its marks."""
    return _MARK.sub("", line)


def explain_line(line_map: list[Origin | None], line: int) -> str:
    """`generated line 57 = templates/slc_attn_fwd.py.j2:41`, searching upwards from a line without an origin."""
    for number in range(min(line, len(line_map)), 0, -1):
        origin = line_map[number - 1]
        if origin is not None:
            return f"generated line {line} = templates/{origin[0]}:{origin[1]}"
    return f"generated line {line}"
