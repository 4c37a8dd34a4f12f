"""Text from elsewhere, such as a file or a compiler: no control character of it reaches a terminal."""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1, and what turns the direction of writing
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def has_controls(text: str) -> bool:
    """True if a terminal would do something else than show the text, its tabs and its newlines."""
    return _CONTROLS.search(text) is not None


def visible(text: str) -> str:
    """The text with its control characters written out, such as \\x1b; tabs and newlines stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
