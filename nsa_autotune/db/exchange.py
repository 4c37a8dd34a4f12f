"""JSON lines: one record a line, sorted keys and sorted lines, so that files can be reviewed and compared.

What comes from a file is parameters and numbers: every field is checked, nothing of it is executed, and a file that is
too large, too deep or of an unknown version is refused with the line and the reason.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Generator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import StoreError
from ..files import whole_file
from ..spec import DEFAULT_POLICY, canonical_json
from .checks import RACED, shorten
from .designs import DesignRecord
from .records import TrialRecord, WinnerRecord
from .sense import Judge, refuse_unfit

MAX_LINE_BYTES = 1_000_000
MAX_LINES = 10_000_000
MAX_FILE_BYTES = 8 * 2**30
MAX_AHEAD = timedelta(days=1)  # of our clock: newer records win, so none may come from the far future
LINE_VERSION = 2
FIRST_VERSION_LACKS: dict[str, dict[str, Any]] = {  # what version 1 did not know, by record
    "winner": {"policy": DEFAULT_POLICY, "verdict": RACED, "rivals": [], "resources": None},
    "trial": {"policy": DEFAULT_POLICY, "environment": None},
    "design": {},
}
Record = TrialRecord | WinnerRecord | DesignRecord
RECORD_TYPES: dict[str, type[TrialRecord] | type[WinnerRecord] | type[DesignRecord]] = {
    "winner": WinnerRecord,
    "trial": TrialRecord,
    "design": DesignRecord,
}
NAME_OF = {kind: name for name, kind in RECORD_TYPES.items()}


def format_line(record: Record) -> str:
    """One record as one line of canonical JSON."""
    line = canonical_json({"schema_version": LINE_VERSION, "record": NAME_OF[type(record)], **record.to_dict()})
    if len(line) > MAX_LINE_BYTES:
        raise StoreError(
            f"a line must not exceed {MAX_LINE_BYTES} bytes", {"record": NAME_OF[type(record)], "bytes": len(line)}
        )
    return line


def format_lines(records: Iterable[Record]) -> str:
    """Lines in an order that depends on nothing but the records: kind, GPU, family and problem, then time."""
    keyed = [(type(r).__name__, r.fingerprint["gpu"], _subject(r), r.created, format_line(r)) for r in records]
    return "".join(f"{entry[-1]}\n" for entry in sorted(keyed))


def parse_lines(content: bytes, name: str) -> list[Record]:
    """The records of a file's content; raise StoreError that names the first bad line."""
    return list(_records_of(io.BytesIO(content), name))


def read_lines(path: Path, judge: Judge | None = None) -> Generator[Record, None, None]:
    """The records of a file, one line in memory at a time; raise StoreError that names the first bad line."""
    try:
        if path.exists() and not path.is_file():  # a pipe or device may have no end
            raise StoreError("an import reads a regular file", {"path": str(path)}, "Write the records to a file.")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise StoreError(
                    f"a file must not exceed {MAX_FILE_BYTES} bytes",
                    {"path": str(path), "bytes": size},
                    "Export one GPU or family at a time.",
                )
            yield from _records_of(stream, str(path), judge)
    except OSError as error:
        raise StoreError("the file cannot be read", {"path": str(path), "message": str(error)}) from error


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing: a temporary file in the same folder takes its name at the end."""
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        values = {"path": str(path), "message": error.strerror}
        remedy = "Name a file in an existing folder that you may write."
        raise StoreError("the file cannot be written", values, remedy) from error


def refuse_future(record: Record) -> None:
    """Raise StoreError for a foreign record that claims to be newer than our clock allows."""
    if datetime.fromisoformat(record.created) > datetime.now(UTC) + MAX_AHEAD:
        raise StoreError("created lies in the future", {"created": record.created}, "Set the clocks right.")


def _subject(record: Record) -> tuple[str, str]:
    if isinstance(record, DesignRecord):
        return (record.study_digest, record.digest)
    return (record.family, record.problem_key)


def _records_of(stream: BinaryIO, name: str, judge: Judge | None = None) -> Iterator[Record]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 2):  # a longer line shows by its length
        number += 1
        try:
            if number > MAX_LINES:
                raise StoreError(f"a file must not exceed {MAX_LINES} lines", {}, "Export one GPU or family at a time.")
            if line.strip():
                record = _parse_line(line.rstrip(b"\r\n"))
                refuse_unfit(record, judge)
                yield record
        except StoreError as error:
            raise StoreError(
                f"line {number} of {name}: {error.rule}", error.values, error.remedy or "Nothing was imported."
            ) from error


def _parse_line(line: bytes) -> Record:
    if len(line) > MAX_LINE_BYTES:
        raise StoreError(f"a line must not exceed {MAX_LINE_BYTES} bytes", {"bytes": f"more than {MAX_LINE_BYTES}"})
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise StoreError("a line must be a JSON object", {"message": shorten(str(error))}) from error
    if not isinstance(data, dict):
        raise StoreError("a line must be a JSON object", {"line": shorten(data)})
    version, name = data.pop("schema_version", None), data.pop("record", None)
    if not isinstance(version, int) or isinstance(version, bool) or version not in (1, LINE_VERSION):
        raise StoreError(
            f"schema_version must be 1 or {LINE_VERSION}",
            {"schema_version": shorten(version)},
            "Upgrade nsa-autotune.",
        )
    if not isinstance(name, str) or name not in RECORD_TYPES:
        raise StoreError(f"record must be one of {', '.join(RECORD_TYPES)}", {"record": shorten(name)})
    if version == 1:
        data = {**FIRST_VERSION_LACKS[name], **data}
    record = RECORD_TYPES[name].from_dict(data)
    refuse_future(record)
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return data
