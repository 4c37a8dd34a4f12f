"""Text files: written so that readers see them whole or not at all, and read with the numbers of their lines."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InvalidInput


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of the file at the end; if anything is raised, the old file stays.

    A link stays one, and what it leads to is written; a device or pipe is no file to replace: OSError.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, and its folder, so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


def numbered_lines(path: str | Path, name: str, rule: str, remedy: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1 on.

    Raises InvalidInput with the rule if the file, which the message calls `name`, cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(rule, {name: str(path), "reason": str(error)}, remedy) from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
