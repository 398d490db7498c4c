"""The geometry of a line chart: where ticks, lines and dots go, and how their numbers are written.

The page's template draws it. Horizontal places are percentages, so that a chart fills any width without scaling its
text; vertical places are pixels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

# Pixels from the top edge of the drawing to its highest and to its lowest value.
TOP, BOTTOM = 10, 230

Look = Literal["solid", "faint", "dashed"]


@dataclass(frozen=True)
class Line:
    """A named series of points (x, y) in one of the page's hues, 1 to 7. If `dots` is true, its points are marked."""

    name: str
    points: list[tuple[float, float]]
    hue: int
    look: Look = "solid"
    dots: bool = False


@dataclass(frozen=True)
class Dot:
    """A marked point: its place in percent and pixels, and the text that names it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Stroke:
    """A line as it is drawn; `path` lists its points in percent and pixels, as an SVG polyline wants them."""

    line: Line
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Plot:
    """Everything that is drawn: place and text of each tick, and the strokes.

    `zero` is the place of y = 0 if that is marked, None otherwise.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    strokes: list[Stroke]
    zero: float | None


def plot(
    lines: list[Line], *, x_unit: str = "", x_range: tuple[float, float] | None = None, mark_zero: bool = False
) -> Plot:
    """Lay out lines that share their axes. At least one line must have a point.

    `x_unit` is written behind every x, and `x_range` is the range of the axis if it is not that of the points.
    `mark_zero` extends the vertical axis to y = 0 and marks it.
    """
    xs = list(x_range) if x_range else [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [0.0] * mark_zero
    x_scale, y_scale = _Scale(min(xs), max(xs), 0, 100), _Scale(*_padded(min(ys), max(ys)), BOTTOM, TOP)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(y_scale.low, y_scale.high, 6)
    return Plot(
        x_ticks=[(x_scale(x), f"{x:,.{_decimals(x_ticks)}f}{x_unit}") for x in x_ticks],
        y_ticks=[(y_scale(y), signed(f"{y:,.{_decimals(y_ticks)}f}")) for y in y_ticks],
        strokes=[_stroke(line, x_scale, y_scale, x_unit) for line in lines],
        zero=y_scale(0.0) if mark_zero else None,
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between low and high, 1, 2 or 5 times a power of ten apart: at least one and at most `most`."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if 1 <= last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [low]


@dataclass(frozen=True)
class _Scale:
    """A linear map of [low, high] to [start, end]. If low and high are the same, it maps to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with a little room above and below, even if it is a single value."""
    room = 0.06 * (high - low) or abs(high) * 0.01 or 1.0
    return low - room, high + room


def _decimals(values: list[float]) -> int:
    """How many digits after the point it takes to tell the values apart."""
    gap = min((b - a for a, b in pairwise(values)), default=1.0)
    return max(0, -math.floor(math.log10(gap) + 1e-9))


def _stroke(line: Line, x_scale: _Scale, y_scale: _Scale, x_unit: str) -> Stroke:
    places = [(x_scale(x), y_scale(y)) for x, y in line.points]
    texts = [f"{line.name}: {y:.4f} at {x:,g}{x_unit}" for x, y in line.points]
    dots = [Dot(x, y, text) for (x, y), text in zip(places, texts, strict=True)] if line.dots else []
    return Stroke(line, " ".join(f"{x:g},{y:g}" for x, y in places), dots)


def signed(text: str) -> str:
    """A formatted number with a true minus sign (U+2212), which is as wide as a plus sign."""
    return text.replace("-", "\N{MINUS SIGN}")
