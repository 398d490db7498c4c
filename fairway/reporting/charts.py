"""The page's charts: lines along training and along the stream, and bars for bits per byte by stage and for seconds.

A line chart is a drawing with a sentence that says what it shows and its numbers as a table, for readers who cannot see
it. A bar says where it begins and ends, in percent of the width that it is drawn in.

The geometry of a line chart (where ticks, lines and dots go, and how their numbers are written) comes first. The page's
template draws it. Horizontal places are percentages, so that a chart fills any width without scaling its text; vertical
places are pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, Literal

from fairway.reporting.budgets import eval_s, limit_s, train_s
from fairway.reporting.facts import Facts, Rung
from fairway.reporting.runs import Run, Score, Standing, share

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


# The number of hues that the page's style sheet defines. Further lines use them again from the first one on.
HUES = 7


@dataclass(frozen=True)
class Chart:
    """A drawing with its titles and its numbers: `rows` of text under the headings `columns`."""

    name: str
    title: str
    summary: str
    x_label: str
    y_label: str
    drawing: Plot
    columns: list[str]
    rows: list[list[str]]


def charts(facts: Facts) -> list[Chart]:
    """Loss and gradient while training, the loss along the stream, and how the other evaluators differ along it.

    The last one needs two evaluators.
    """
    found = [_loss(facts.runs), _gradient(facts.runs), _stream(facts)]
    return [*found, _apart(facts)] if len(facts.scores) > 1 else found


def hue(index: int) -> int:
    """The hue of the series with that index: 1 to HUES."""
    return index % HUES + 1


def _loss(runs: list[Run]) -> Chart:
    """Training and validation loss. Bits per byte are the same curve in other units, and stand among the numbers."""

    def lines(curve: str, name: str, look: Look) -> list[Line]:
        return [
            Line(f"seed {run.seed}, {name}", run.curves[curve], hue(i), look, dots=look == "solid")
            for i, run in enumerate(runs)
        ]

    train, val = lines("train_loss", "training", "faint"), lines("val_loss", "validation", "solid")
    bpb = lines("val_bpb", "bits per byte", "solid")
    return Chart(
        name="loss",
        title="Loss while training",
        summary=f"{course('Training', train, 'nats a token')} {course('Validation', val, 'nats a token')} "
        f"{course('That is', bpb, 'bits per byte')}",
        x_label="step",
        y_label="nats a token",
        drawing=plot([*train, *val]),
        **numbers("step", [*train, *val, *bpb], "{:,g}", "{:.4f}"),
    )


def _gradient(runs: list[Run]) -> Chart:
    lines = [Line(f"seed {run.seed}", run.curves["micro_grad_norm"], hue(i)) for i, run in enumerate(runs)]
    return Chart(
        name="gradient",
        title="Gradient while training",
        summary="L2 norm of a micro-batch's gradient over all weights before it is clipped, mean over the "
        f"micro-batches of a step. {course('Norm', lines, '')}",
        x_label="step",
        y_label="norm",
        drawing=plot(lines),
        **numbers("step", lines, "{:,g}", "{:.4f}"),
    )


def course(name: str, lines: list[Line], unit: str) -> str:
    """A sentence on where the seeds' lines begin and end."""
    begin, end = ([line.points[place] for line in lines] for place in (0, -1))
    unit = f" {unit}" if unit else ""
    return f"{name}: {_span(begin)}{unit} at step {begin[0][0]:,}, {_span(end)} at step {max(end)[0]:,}."


def _span(points: list[tuple[float, float]]) -> str:
    """The lowest and the highest y of some points, or the one y that all of them have."""
    low, high = (pick(f"{y:.3f}" for _, y in points) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _stream(facts: Facts) -> Chart:
    """The loss of the first evaluator. Those of the others run so close to it that only their difference shows."""
    lines = [_profile(facts, 0, facts.scores[0])]
    hardest, easiest = (pick(lines[0].points, key=lambda point: point[1]) for pick in (max, min))
    return Chart(
        name="stream",
        title="Loss along the validation stream",
        summary=f"Mean over {len(lines[0].points)} equal parts of the stream, in order. For {lines[0].name} it lies "
        f"between {easiest[1]:.3f} nats a token ({easiest[0]:.0f}% of the way) and {hardest[1]:.3f} "
        f"({hardest[0]:.0f}%).",
        x_label="share of the stream",
        y_label="nats a token",
        drawing=plot(lines, x_unit="%", x_range=(0, 100)),
        **numbers("percent of the stream", lines, "{:.1f}", "{:.4f}"),
    )


def _apart(facts: Facts) -> Chart:
    """The loss of every other evaluator minus that of the first, to see where along the stream it gains."""
    first, *others = [_profile(facts, i, score) for i, score in enumerate(facts.scores)]
    lines = [
        Line(line.name, [(x, y - base) for (x, y), (_, base) in zip(line.points, first.points, strict=True)], line.hue,
             line.look)
        for line in others
    ]  # fmt: skip
    gains = [signed(f"{line.name} {mean(y for _, y in line.points):+.4f}") for line in lines]
    return Chart(
        name="apart",
        title=f"Difference to {first.name} along the stream",
        summary=f"Below zero is better than {first.name}. On average, in nats a token: {', '.join(gains)}.",
        x_label="share of the stream",
        y_label="nats a token",
        drawing=plot(lines, x_unit="%", x_range=(0, 100), mark_zero=True),
        **numbers("percent of the stream", lines, "{:.1f}", "{:+.5f}"),
    )


def _profile(facts: Facts, index: int, score: Score) -> Line:
    """The loss of an evaluator along the stream, the mean over seeds. Dashed unless the score is legal."""
    means = [mean(seeds) for seeds in zip(*(run.profiles[score.name] for run in facts.runs), strict=True)]
    points = [(share(part, len(means)), nats) for part, nats in enumerate(means)]
    return Line(score.label, points, hue(index), "solid" if score.standing == "legal" else "dashed")


def numbers(x_name: str, lines: list[Line], x_form: str, y_form: str) -> dict[str, Any]:
    """The lines as a table: a row for each x and a column for each line, with an empty cell where it has no point."""
    places = sorted({x for line in lines for x, _ in line.points})
    known = [dict(line.points) for line in lines]
    rows = [[x_form.format(x), *(signed(y_form.format(ys[x])) if x in ys else "" for ys in known)] for x in places]
    return {"columns": [x_name, *(line.name for line in lines)], "rows": rows}


@dataclass(frozen=True)
class Bar:
    """A labelled bar. `start`, `width` and `mark` are percentages of the width that it is drawn in."""

    label: str
    detail: str
    value: str
    # The difference to the level before as text, empty if there was none.
    change: str
    start: float
    width: float
    # The look of the bar: improved, worsened or level for bits per byte, within or over for seconds.
    tone: str
    standing: Standing | None
    # Where a limit or a published figure is marked, if there is one.
    mark: float | None


def ladder_range(rungs: list[Rung]) -> tuple[float, float]:
    """The scale of the ladder in bits per byte: from just below its lowest level to just above its highest."""
    levels = [level for rung in rungs for level in (rung.bpb, rung.before, rung.published) if level is not None]
    room = 0.05 * (max(levels) - min(levels)) or 0.01
    return min(levels) - room, max(levels) + room


def ladder_bars(rungs: list[Rung]) -> list[Bar]:
    """One bar for each level, from the level before it to the level itself."""
    low, high = ladder_range(rungs)
    return [_rung_bar(rung, lambda level: round(100 * (level - low) / (high - low), 2)) for rung in rungs]


def _rung_bar(rung: Rung, place: Callable[[float], float]) -> Bar:
    before = rung.bpb if rung.before is None else rung.before
    gap = rung.bpb - before
    left, right = sorted((place(before), place(rung.bpb)))
    return Bar(
        label=rung.name,
        detail=rung.label,
        value=f"{rung.bpb:.4f}",
        change="" if rung.before is None else signed(f"{gap:+.4f}"),
        start=left,
        width=round(right - left, 2),
        tone="level" if rung.before is None else "improved" if gap <= 0 else "worsened",
        standing=rung.standing,
        mark=place(rung.published) if rung.published is not None else None,
    )


def time_bars(facts: Facts) -> list[Bar]:
    """What the slowest seed used of the track's budgets of time: training, and evaluation by each evaluator.

    A limit is marked if that work was done on the track's machine; seconds of another do not compare with it.
    """
    runs = facts.runs
    used = [("training", max(train_s(run) for run in runs), limit_s(runs, "training", None))]
    for score in facts.scores:
        seconds, limit = max(eval_s(run, score.name) for run in runs), limit_s(runs, "evaluation", score.name)
        used.append((f"evaluation, {score.name}", seconds, limit))
    scale = 1.02 * max(max(seconds, limit or 1.0e-3) for _, seconds, limit in used)
    return [_time_bar(name, seconds, limit, scale) for name, seconds, limit in used]


def _time_bar(name: str, seconds: float, limit: float | None, scale: float) -> Bar:
    return Bar(
        label=name,
        detail="" if limit is None else f"limit {limit:.0f} s",
        value=f"{seconds:,.1f} s",
        change="",
        start=0.0,
        width=round(100 * seconds / scale, 2),
        tone="over" if limit is not None and seconds > limit else "within",
        standing=None,
        mark=None if limit is None else round(100 * limit / scale, 2),
    )
