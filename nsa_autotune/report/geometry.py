"""What a figure is made of: plain geometry in px, which a template writes as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .axes import Tick
from .data import Keys

COLOURS = 8  # classes c0 to c7 of the style sheet
SHAPES = 4  # symbols s0 to s3
OTHER = COLOURS - 1  # grey


@dataclass(frozen=True)
class Canvas:
    """Size of a figure and of the frame inside it, in px."""

    width: int = 440
    height: int = 320
    left: int = 62
    right: int = 430
    top: int = 12
    bottom: int = 276


LARGE = Canvas()
SMALL = Canvas(width=340, height=170, left=52, right=332, top=10, bottom=136)


@dataclass(frozen=True)
class Mark:
    """One measured value."""

    x: float
    y: float
    colour: int
    shape: int
    keys: Keys
    title: str
    winner: int | None = None  # number of the row whose evidence it opens


@dataclass(frozen=True)
class Line:
    """A path through values, or a roof."""

    path: str
    style: str  # class of the style sheet
    colour: int = OTHER
    keys: Keys | None = None  # None is always shown


@dataclass(frozen=True)
class Label:
    """A text in the frame."""

    x: float
    y: float
    text: str
    anchor: str = "end"


@dataclass(frozen=True)
class Entry:
    """One line of a legend."""

    text: str
    colour: int
    shape: int


@dataclass(frozen=True)
class Figure:
    """One plot."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    labels: tuple[Label, ...] = ()
    legend: tuple[Entry, ...] = ()
    canvas: Canvas = LARGE


def path_text(points: Iterable[tuple[float, float]]) -> str:
    """Straight lines through points, as SVG writes them."""
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def stairs_text(points: Sequence[tuple[float, float]], end: float) -> str:
    """A line that stays at each point's height until the next, and then up to `end`."""
    steps = "".join(f"H{x}V{y}" for x, y in points[1:])
    return f"M{points[0][0]} {points[0][1]}{steps}H{end}"
