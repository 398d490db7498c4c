"""The page's line charts: each a drawing, a sentence that says what it shows, and its numbers as a table.

The page's bars: where each begins and ends, in percent of its track.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from fairway.certification.accounting import EVAL_S
from fairway.reporting.budgets import TRAIN_S
from fairway.reporting.certificates import Standing
from fairway.reporting.facts import Facts
from fairway.reporting.plot import Line, Plot, plot, signed
from fairway.reporting.runs import Run, share
from fairway.reporting.scores import Rung, Score

# The page has so many hues; more lines begin again.
HUES = 7


@dataclass(frozen=True)
class Chart:
    """A drawing with its names: `x_label` and `y_label` say what the axes are; rows of text stand under `columns`."""

    name: str
    title: str
    summary: str
    x_label: str
    y_label: str
    drawing: Plot
    columns: list[str]
    rows: list[list[str]]


def charts(facts: Facts) -> list[Chart]:
    """Training (bits per byte, loss) and the course along the stream (itself, and apart by evaluator)."""
    found = [_curve(facts.runs), _loss(facts.runs), _stream(facts)]
    return [*found, _apart(facts)] if len(facts.scores) > 1 else found


def hue(index: int) -> int:
    """The hue of the index-th series: 1 ... HUES."""
    return index % HUES + 1


def _curve(runs: list[Run]) -> Chart:
    lines = [Line(f"seed {run.seed}", run.curves["val_bpb"], hue(i), dots=True) for i, run in enumerate(runs)]
    return Chart(
        name="curve",
        title="Validation while training",
        summary=_course("Validation", lines, "bits per byte"),
        x_label="step",
        y_label="bits per byte",
        drawing=plot(lines),
        **_numbers("step", lines, "{:,g}", "{:.4f}"),
    )


def _loss(runs: list[Run]) -> Chart:
    train = [
        Line(f"seed {run.seed}, training", run.curves["train_loss"], hue(i), "faint") for i, run in enumerate(runs)
    ]
    val = [
        Line(f"seed {run.seed}, validation", run.curves["val_loss"], hue(i), dots=True) for i, run in enumerate(runs)
    ]
    return Chart(
        name="loss",
        title="Loss while training",
        summary=_course("Training", train, "nats a token") + " " + _course("Validation", val, "nats a token"),
        x_label="step",
        y_label="nats a token",
        drawing=plot([*train, *val]),
        **_numbers("step", [*train, *val], "{:,g}", "{:.4f}"),
    )


def _course(name: str, lines: list[Line], unit: str) -> str:
    """Where the seeds begin and end, in a sentence."""
    begin, end = ([line.points[place] for line in lines] for place in (0, -1))
    return f"{name}: {_span(begin)} {unit} at step {begin[0][0]:,}, {_span(end)} at step {max(end)[0]:,}."


def _span(points: list[tuple[float, float]]) -> str:
    low, high = (pick(f"{y:.3f}" for _, y in points) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _stream(facts: Facts) -> Chart:
    lines = [_profile(facts, i, score) for i, score in enumerate(facts.scores)]
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
        **_numbers("percent of the stream", lines, "{:.1f}", "{:.4f}"),
    )


def _apart(facts: Facts) -> Chart:
    """The other evaluators less the first: where along the stream they gain."""
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
        **_numbers("percent of the stream", lines, "{:.1f}", "{:+.5f}"),
    )


def _profile(facts: Facts, index: int, score: Score) -> Line:
    """The mean over seeds of an evaluator's course; dashed where the figure is not legal."""
    means = [mean(seeds) for seeds in zip(*(run.profiles[score.name] for run in facts.runs), strict=True)]
    points = [(share(part, len(means)), nats) for part, nats in enumerate(means)]
    return Line(score.label, points, hue(index), "solid" if score.standing == "legal" else "dashed")


def _numbers(x_name: str, lines: list[Line], x_form: str, y_form: str) -> dict[str, Any]:
    """The lines as a table: a row for each x, a column for each line, empty where it has no point."""
    places = sorted({x for line in lines for x, _ in line.points})
    known = [dict(line.points) for line in lines]
    rows = [[x_form.format(x), *(signed(y_form.format(ys[x])) if x in ys else "" for ys in known)] for x in places]
    return {"columns": [x_name, *(line.name for line in lines)], "rows": rows}


@dataclass(frozen=True)
class Bar:
    """A labelled bar; `mark` is a limit or a published figure on the same scale, in percent."""

    label: str
    detail: str
    value: str
    # From the level before, where there was one.
    change: str
    start: float
    width: float
    # improved, worsened or level; of time, within or over.
    tone: str
    standing: Standing | None
    mark: float | None


def ladder_range(rungs: list[Rung]) -> tuple[float, float]:
    """The scale of the ladder in bits per byte: from just below its lowest level to just above its highest."""
    levels = [level for rung in rungs for level in (rung.bpb, rung.before, rung.published) if level is not None]
    room = 0.05 * (max(levels) - min(levels)) or 0.01
    return min(levels) - room, max(levels) + room


def ladder_bars(rungs: list[Rung]) -> list[Bar]:
    """From the level before to the level reached."""
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
    """Seconds of the worst seed by stage, against the limit of those that have one."""
    times = stage_times(facts.runs)
    scale = max(TRAIN_S, EVAL_S, *(max(seconds) for _, seconds in times)) * 1.02
    limits = {"train": TRAIN_S, f"evaluate {facts.shipped.name}": EVAL_S}
    return [_time_bar(name, max(seconds), limits.get(name), scale) for name, seconds in times]


def stage_times(runs: list[Run]) -> list[tuple[str, list[float]]]:
    """Each stage that times itself, with its seconds by seed."""
    names = list(runs[0].scores)
    return [
        ("train", [run.train["wall_s"] for run in runs]),
        *([("adapt", [run.adapt["adapt_s"] for run in runs])] if runs[0].adapt["epochs"] else []),
        *((f"evaluate {name}", [run.scores[name]["eval_s"] for run in runs]) for name in names),
        *((f"certify {name}", [run.certificates[name].certify_s for run in runs]) for name in names),
    ]


def _time_bar(name: str, seconds: float, limit: float | None, scale: float) -> Bar:
    over = limit is not None and seconds > limit
    return Bar(
        label=name,
        detail="" if limit is None else f"limit {limit:.0f} s",
        value=f"{seconds:,.1f} s",
        change="",
        start=0.0,
        width=round(100 * seconds / scale, 2),
        tone="over" if over else "within",
        standing=None,
        mark=round(100 * limit / scale, 2) if limit is not None else None,
    )
