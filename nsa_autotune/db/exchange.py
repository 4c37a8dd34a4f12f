"""JSON lines: one record a line, sorted keys and sorted lines, so that files can be reviewed and compared."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import StoreError
from ..spec import DEFAULT_POLICY, canonical_json
from .checks import RACED, shorten
from .records import TrialRecord, WinnerRecord

MAX_LINE_BYTES = 1_000_000
LINE_VERSION = 2
FIRST_VERSION_LACKS: dict[str, dict[str, Any]] = {  # what version 1 did not know, by record
    "winner": {"policy": DEFAULT_POLICY, "verdict": RACED, "rivals": [], "resources": None},
    "trial": {"policy": DEFAULT_POLICY, "environment": None},
}
RECORD_TYPES: dict[str, type[TrialRecord] | type[WinnerRecord]] = {"winner": WinnerRecord, "trial": TrialRecord}


@dataclass(frozen=True)
class ImportSummary:
    """What an import found: `kept` counts winners that gave way to one of a higher source."""

    winners: int = 0
    kept: int = 0
    trials: int = 0


def format_line(record: TrialRecord | WinnerRecord) -> str:
    """One record as one line of canonical JSON."""
    name = "winner" if isinstance(record, WinnerRecord) else "trial"
    line = canonical_json({"schema_version": LINE_VERSION, "record": name, **record.to_dict()})
    if len(line) > MAX_LINE_BYTES:
        raise StoreError(
            f"a line must not exceed {MAX_LINE_BYTES} bytes", {"family": record.family, "bytes": len(line)}
        )
    return line


def format_lines(records: Iterable[TrialRecord | WinnerRecord]) -> str:
    """Lines in an order that depends on nothing but the records: GPU, family, problem, then time."""
    keyed = [
        (type(r).__name__, r.fingerprint["gpu"], r.family, r.problem_key, r.created, format_line(r)) for r in records
    ]
    return "".join(f"{entry[-1]}\n" for entry in sorted(keyed))


def parse_lines(content: bytes, name: str) -> list[TrialRecord | WinnerRecord]:
    """The records of a file; raise StoreError that names the first bad line."""
    records = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse_line(line))
        except StoreError as error:
            raise StoreError(
                f"line {number} of {name}: {error.rule}", error.values, error.remedy or "Nothing was imported."
            ) from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing: a temporary file in the same folder takes its name at the end."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StoreError("the file cannot be written", {"folder": str(path.parent), "message": str(error)}) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except OSError as error:
        raise StoreError("the file cannot be written", {"path": str(path), "message": str(error)}) from error
    finally:
        temporary.unlink(missing_ok=True)


def _parse_line(line: bytes) -> TrialRecord | WinnerRecord:
    if len(line) > MAX_LINE_BYTES:
        raise StoreError(f"a line must not exceed {MAX_LINE_BYTES} bytes", {"bytes": len(line)})
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise StoreError("a line must be a JSON object", {"message": str(error)}) from error
    if not isinstance(data, dict):
        raise StoreError("a line must be a JSON object", {"line": shorten(data)})
    version, name = data.pop("schema_version", None), data.pop("record", None)
    if isinstance(version, bool) or version not in (1, LINE_VERSION):
        raise StoreError(
            f"schema_version must be 1 or {LINE_VERSION}",
            {"schema_version": shorten(version)},
            "Upgrade nsa-autotune.",
        )
    if not isinstance(name, str) or name not in RECORD_TYPES:
        raise StoreError(f"record must be one of {', '.join(RECORD_TYPES)}", {"record": shorten(name)})
    if version == 1:
        data = {**FIRST_VERSION_LACKS[name], **data}
    return RECORD_TYPES[name].from_dict(data)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return data
