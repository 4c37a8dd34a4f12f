"""The page: facts and figures through one template into one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from ..db.exchange import write_atomically
from ..errors import InvalidInput
from . import text
from .data import Keys, Report, WinnerRow
from .figures import roofline_figures, search_figure, speedup_figures

GENERATOR = "nsa-autotune report"  # stands in the page, so that only such pages are replaced
FILE = "index.html"
ANY = "-"  # of a mark's key: shown only while that filter is off


@dataclass(frozen=True)
class Filter:
    """One selection box: the values that occur, and their texts."""

    field: str
    label: str
    values: tuple[str | int, ...]
    texts: tuple[str, ...]


def filters_of(keys: Iterable[Keys]) -> tuple[Filter, ...]:
    """What the page can be narrowed to; marks name the places of their values."""
    found = list(keys)
    gpus, families = sorted({k.gpu for k in found}), sorted({k.family for k in found})
    dtypes, policies = sorted({k.dtype for k in found}), sorted({k.policy for k in found})
    lengths = sorted({k.seq for k in found if k.seq is not None})
    return (
        Filter("gpu", "GPU", tuple(gpus), tuple(gpus)),
        Filter("family", "Family", tuple(families), tuple(families)),
        Filter("dtype", "Dtype", tuple(dtypes), tuple(map(text.dtype_text, dtypes))),
        Filter("policy", "Policy", tuple(policies), tuple(policies)),
        Filter("seq", "Tokens", tuple(lengths), tuple(map(text.tokens_text, lengths))),
    )


def render_page(report: Report) -> str:
    """The whole page as HTML."""
    every = [item.keys for items in (report.winners, report.searches, report.speedups) for item in items]
    filters = filters_of(every)
    script, style = _asset("page.js"), _asset("page.css")
    values: dict[str, Any] = {
        "report": report,
        "filters": filters,
        "facts": facts(report),
        "speedups": speedup_figures(report.speedups),
        "rooflines": roofline_figures(report.winners, report.gpus),
        "searches": [(search, search_figure(search)) for search in report.searches],
        "tables": _tables(report.winners),
        "data": page_data(report),
        "place": _placer(filters),
        "generator": GENERATOR,
        "script": script,
        "style": style,
        "script_hash": _source_hash(script),
        "style_hash": _source_hash(style),
    }
    return _environment().get_template("page.html.j2").render(values)


def write_page(folder: Path, html: str) -> Path:
    """Write index.html whole or not at all; InvalidInput where a file of somebody else's would be replaced."""
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        values = {"--out": str(folder), "reason": error.strerror}
        raise InvalidInput("the page cannot be written", values, "Name a folder that you may write.") from error
    if old and f'content="{GENERATOR}"' not in old:
        remedy = "Name another folder, or move that file away."
        raise InvalidInput("the folder holds a page that is not a report's", {"file": str(path)}, remedy)
    write_atomically(path, html)
    return path


def facts(report: Report) -> list[tuple[str, str]]:
    """What the numbers are and where they come from."""
    dates = sorted(text.date_text(row.created) for row in report.winners)
    sources = Counter(row.source for row in report.winners)
    trials = sum(len(search.times_us) for search in report.searches)
    told = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
    found = [
        ("Database", report.database),
        ("Page made", f"{report.created[:16].replace('T', ' ')} UTC by nsa-autotune {report.tool_version}"),
        ("Winners", f"{len(report.winners)} ({told})" if told else "none"),
        ("Measured", f"{dates[0]} to {dates[-1]}, on the GPU that each row names" if dates else "nothing yet"),
        ("Searches", f"{len(report.searches)}, with {trials} trials" if report.searches else "none in this database"),
    ]
    origins = sorted({s.origin for s in report.speedups if s.origin != "winner"})
    return [*found, ("Benchmarks", ", ".join(origins) or "none: name files with --bench")]


def page_data(report: Report) -> dict[str, Any]:
    """The numbers of the page as JSON, with the evidence of each winner."""
    return {
        "schema": 1,
        "created": report.created,
        "winners": [
            {**asdict(row), "versions": text.versions_text(row.fingerprint, row.tool_version)} for row in report.winners
        ],
        "speedups": [{**asdict(item), "ratio": item.ratio} for item in report.speedups],
        "searches": [asdict(search) for search in report.searches],
    }


def _tables(rows: Sequence[WinnerRow]) -> list[tuple[str, list[tuple[int, WinnerRow]]]]:
    """Rows with their numbers, one table a GPU."""
    numbered = enumerate(rows)
    return [(gpu, list(group)) for gpu, group in groupby(numbered, key=lambda item: item[1].keys.gpu)]


def _placer(filters: Sequence[Filter]) -> Any:
    places = [{value: str(place) for place, value in enumerate(f.values)} for f in filters]

    def place(keys: Keys) -> str:
        """The places of the values among their filters', such as `0 3 0 0 -`."""
        values = (keys.gpu, keys.family, keys.dtype, keys.policy, keys.seq)
        return " ".join(ANY if value is None else known[value] for known, value in zip(places, values, strict=True))

    return place


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nsa_autotune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("time_text", "tokens_text", "date_text", "dtype_text", "digits", "versions_text", "short_versions_text")
    environment.filters |= {name: getattr(text, name) for name in names}
    return environment


def _asset(name: str) -> str:
    return (resources.files("nsa_autotune.report") / "templates" / name).read_text(encoding="utf-8")


def _source_hash(source: str) -> str:
    """What a content security policy calls an inline script or style: nothing else in the page may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
