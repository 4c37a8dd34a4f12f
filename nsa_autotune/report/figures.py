"""The figures of the page: speed-ups by length, rooflines, searches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..search.roofline import GpuModel
from .axes import LogAxis, Tick, fit_axis, octaves, round_values
from .data import Search, Speedup, WinnerRow
from .geometry import COLOURS, LARGE, OTHER, SHAPES, SMALL, Entry, Figure, Label, Line, Mark, path_text, stairs_text
from .text import date_text, digits, dtype_text, time_text, tokens_text

BRANCHES = ("cmp", "slc", "win", "gate")  # colours of the roofline, by the beginning of a family's name
BACKWARD_SHAPE = 1


def speedup_figures(speedups: Iterable[Speedup]) -> tuple[Figure, ...]:
    """One figure for each GPU, library and shape of problem; in it one line for each kind of work, alike in all."""
    groups: dict[tuple[str, ...], list[Speedup]] = defaultdict(list)
    for item in speedups:
        one_kernel = item.origin == "winner"
        shape = "" if one_kernel else item.shape
        place = "single kernels" if one_kernel else ""  # after whole attention, as it sorts
        groups[place, item.keys.gpu, item.library, item.keys.dtype, item.keys.policy, shape].append(item)
    names = dict.fromkeys(name for key, group in sorted(groups.items()) for name in _series(group, bool(key[-1])))
    places = {name: place for place, name in enumerate(names)}
    return tuple(_speedup_figure(key, group, places) for key, group in sorted(groups.items()))


def _speedup_figure(key: tuple[str, ...], group: Sequence[Speedup], places: Mapping[str, int]) -> Figure:
    kernels, gpu, library, dtype, policy, shape = key
    x_axis, y_axis = _lengths(group), fit_axis([1.0, *(item.ratio for item in group)], LARGE.bottom, LARGE.top)
    series = _series(group, bool(shape))
    lines = [Line(f"M{LARGE.left} {y_axis.at(1)}H{LARGE.right}", "even")]
    marks, legend = [], []
    for name, items in series.items():
        colour, symbol = places[name] % COLOURS, places[name] // COLOURS % SHAPES
        points = [(x_axis.at(item.keys.seq or 1), y_axis.at(item.ratio)) for item in items]
        lines.append(Line(path_text(points), "series", colour, replace(items[0].keys, seq=None)))
        marks += [
            Mark(x, y, colour, symbol, item.keys, _speedup_title(item))
            for (x, y), item in zip(points, items, strict=True)
        ]
        legend.append(Entry(name, colour, symbol))
    return Figure(
        title=f"{gpu}: time of {library} over ours",
        subtitle=", ".join(part for part in (kernels, shape, dtype_text(dtype), policy) if part),
        x_label="tokens",
        y_label="speed-up",
        x_ticks=x_axis.ticks(octaves(x_axis.low, x_axis.high), lambda value: tokens_text(int(value))),
        y_ticks=y_axis.ticks(_ratios(y_axis), lambda value: f"{value:g}×"),
        lines=tuple(lines),
        marks=tuple(marks),
        labels=(Label(LARGE.right - 4, y_axis.at(1) - 5, "as fast"),),
        legend=tuple(legend),
    )


def _series(group: Iterable[Speedup], one_shape: bool) -> dict[str, list[Speedup]]:
    """What one line joins, by length; work that several files hold is told apart by the file."""
    origins: dict[str, set[str]] = defaultdict(set)
    found: dict[str, list[Speedup]] = defaultdict(list)
    ordered = sorted(group, key=lambda item: (item.keys.seq or 0, item.created))
    for item in ordered:
        origins[item.work].add(item.origin)
    for item in ordered:
        name = item.work if one_shape else f"{item.work}, {item.shape}"
        found[name if len(origins[item.work]) == 1 else f"{name} ({item.origin})"].append(item)
    return found


def _lengths(group: Iterable[Speedup]) -> LogAxis:
    return fit_axis([item.keys.seq or 1 for item in group], LARGE.left, LARGE.right)


def _ratios(axis: LogAxis) -> list[float]:
    powers = octaves(axis.low, axis.high)
    return powers if len(powers) > 2 else round_values(axis.low, axis.high)


def _speedup_title(item: Speedup) -> str:
    return "\n".join(
        (
            f"{digits(item.ratio)}× {item.library}",
            f"{item.work}, {tokens_text(item.keys.seq or 0)} tokens, {item.shape}",
            f"{time_text(item.ours_us)} against {time_text(item.library_us)}",
            f"measured {date_text(item.created)} on {item.keys.gpu}",
        )
    )


def roofline_figures(rows: Sequence[WinnerRow], gpus: Iterable[tuple[str, GpuModel]]) -> tuple[Figure, ...]:
    """One figure for each GPU whose data sheet is known and that has winners with a known cost."""
    numbered = list(enumerate(rows))
    found = []
    for name, gpu in gpus:
        own = [(number, row) for number, row in numbered if row.keys.gpu == name and row.rates is not None]
        if own:
            found.append(_roofline_figure(name, gpu, own))
    return tuple(found)


def _roofline_figure(name: str, gpu: GpuModel, rows: Sequence[tuple[int, WinnerRow]]) -> Figure:
    rates = [row.rates for _, row in rows if row.rates is not None]
    ridge = gpu.mma_tflops / gpu.hbm_tbps
    x_axis = fit_axis([ridge, *(r.intensity for r in rates)], LARGE.left, LARGE.right)
    y_axis = fit_axis([gpu.mma_tflops, *(r.tflops for r in rates)], LARGE.bottom, LARGE.top)
    marks = [
        Mark(x_axis.at(row.rates.intensity), y_axis.at(row.rates.tflops), *_look(row), row.keys, _title(row), number)
        for number, row in rows
        if row.rates is not None
    ]
    looks = sorted({(mark.colour, mark.shape) for mark in marks})
    return Figure(
        title=name,
        subtitle=f"under the roofs of {gpu.name}: {gpu.mma_tflops:g} TFLOP/s, {gpu.hbm_tbps:g} TB/s",
        x_label="operations a byte of device memory",
        y_label="TFLOP/s",
        x_ticks=x_axis.ticks(round_values(x_axis.low, x_axis.high), lambda value: f"{value:g}"),
        y_ticks=y_axis.ticks(round_values(y_axis.low, y_axis.high), lambda value: f"{value:g}"),
        lines=tuple(_roofs(gpu, x_axis, y_axis)),
        marks=tuple(marks),
        labels=tuple(
            Label(LARGE.right - 4, y_axis.at(peak) - 5, name)
            for peak, name in ((gpu.mma_tflops, "16-bit"), (gpu.vector_tflops, "float32"))
        ),
        legend=tuple(Entry(_look_text(colour, shape), colour, shape) for colour, shape in looks),
    )


def _roofs(gpu: GpuModel, x_axis: LogAxis, y_axis: LogAxis) -> list[Line]:
    """The roof of 16-bit products, and that of float32, which runs on the vector units."""
    found = []
    for peak in (gpu.mma_tflops, gpu.vector_tflops):
        ridge = peak / gpu.hbm_tbps
        corners = [(y_axis.low / gpu.hbm_tbps, y_axis.low), (ridge, peak), (max(x_axis.high, ridge), peak)]
        if corners[0][0] < x_axis.low:  # the slope enters through the left side
            corners[0] = (x_axis.low, min(peak, x_axis.low * gpu.hbm_tbps))
        style = "roof" if peak == gpu.mma_tflops else "roof low"
        found.append(Line(path_text([(x_axis.at(x), y_axis.at(y)) for x, y in corners if x >= x_axis.low]), style))
    return found


def _look(row: WinnerRow) -> tuple[int, int]:
    """Colour by branch, shape by direction."""
    branch = row.keys.family.split("_")[0]
    colour = BRANCHES.index(branch) if branch in BRANCHES else OTHER
    return colour, BACKWARD_SHAPE if "_bwd" in row.keys.family else 0


def _look_text(colour: int, shape: int) -> str:
    names = {"cmp": "compression", "slc": "selection", "win": "window", "gate": "gates"}
    branch = names[BRANCHES[colour]] if colour < len(BRANCHES) else "other"
    return f"{branch}, {'backward' if shape == BACKWARD_SHAPE else 'forward'}"


def _title(row: WinnerRow) -> str:
    lines = [
        f"{row.keys.family}, {tokens_text(row.keys.seq or 0)} tokens, {dtype_text(row.keys.dtype)}",
        row.shape,
        f"{time_text(row.median_us)} ({time_text(row.p20_us)} to {time_text(row.p80_us)})",
    ]
    if row.rates is not None:
        lines.append(
            f"{digits(row.rates.tflops)} TFLOP/s, {digits(row.rates.tbps)} TB/s, {row.rates.share:.0%} of the roof"
        )
    return "\n".join([*lines, f"{row.verdict}, measured {date_text(row.created)} on {row.keys.gpu}"])


def search_figure(search: Search) -> Figure | None:
    """Best time so far over the trials; None where nothing worked."""
    timed = [(number, time_us) for number, time_us in enumerate(search.times_us, start=1) if time_us is not None]
    if not timed:
        return None
    count = len(search.times_us)
    y_axis = fit_axis([time_us for _, time_us in timed], SMALL.bottom, SMALL.top)
    x_at = _linear(count)
    dots = "".join(f"M{x_at(number)} {y_axis.at(time_us)}h0" for number, time_us in timed)
    failed = "".join(
        f"M{x_at(number)} {SMALL.bottom - 6}v6" for number, time in enumerate(search.times_us, start=1) if time is None
    )
    best = [(x_at(number), y_axis.at(time_us)) for number, time_us in search.best_so_far]
    lines = [Line(dots, "trials"), Line(failed, "failed"), Line(stairs_text(best, SMALL.right), "series", 0)]
    labels = []
    if search.default_us is not None:
        lines.append(Line(f"M{SMALL.left} {y_axis.at(search.default_us)}H{SMALL.right}", "even"))
        labels.append(Label(SMALL.right - 3, y_axis.at(search.default_us) - 4, "default config"))
    marks = [
        Mark(x, y, 0, 0, search.keys, f"trial {number} of {count}: {time_text(time_us)}, the best so far")
        for (x, y), (number, time_us) in zip(best, search.best_so_far, strict=True)
    ]
    x_ticks = tuple(Tick(x_at(number), str(number)) for number in sorted({1, (count + 1) // 2, count}))
    return Figure(
        title=f"Best time so far: {search.keys.family}, {tokens_text(search.keys.seq or 0)} tokens",
        subtitle=search.shape,
        x_label="trial",
        y_label="",
        x_ticks=x_ticks,
        y_ticks=y_axis.ticks(round_values(y_axis.low, y_axis.high), time_text),
        lines=tuple(line for line in lines if line.path),
        marks=tuple(marks),
        labels=tuple(labels),
        canvas=SMALL,
    )


def _linear(count: int) -> Callable[[int], float]:
    width = SMALL.right - SMALL.left
    return lambda number: round(SMALL.left + width * (number - 0.5) / count, 1)
