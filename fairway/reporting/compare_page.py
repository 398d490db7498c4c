"""The comparison as one HTML page that needs nothing else: versions, their training curves, documents, records."""

from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean

from fairway.reporting.charts import Bar, Chart, Line, course, hue, numbers, plot, signed
from fairway.reporting.comparison import Published, PublishedRecord
from fairway.reporting.page import render
from fairway.reporting.stored_experiments import Apart, Found, Gap, Pair, Row


def compare_page(found: Found, compared: Pair, published: Published) -> str:
    """The HTML of the comparison. Bytes and seconds of a published record are those of its largest and slowest seed."""
    return render(
        "compare.html",
        found=found,
        compared=compared,
        chart=curves(found.rows),
        gaps={apart.evaluator: gap_bars(apart) for apart in compared.apart if apart.gaps},
        published=[_published(name, record) for name, record in published.records.items()],
        made_at=datetime.now(UTC),
    )


def curves(rows: list[Row]) -> Chart | None:
    """The validation curves laid over each other; versions with the same curve share a line. None without any."""
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for row in rows:
        if row.curve:
            names.setdefault(tuple(row.curve), []).append(row.name)
    if not names:
        return None
    lines = [Line(", ".join(same), list(curve), hue(i), dots=True) for i, (curve, same) in enumerate(names.items())]
    return Chart(
        name="curves",
        title="Validation while training",
        summary=f"{course('Validation', lines, 'bits per byte')} Versions that were trained alike share a line.",
        x_label="step",
        y_label="bits per byte",
        drawing=plot(lines),
        **numbers("step", lines, "{:,g}", "{:.4f}"),
    )


def gap_bars(apart: Apart) -> list[Bar]:
    """A bar for each document that is shown, from no difference in the middle to its difference in bits per byte."""
    most = max(abs(gap.second_bpb - gap.first_bpb) for gap in apart.gaps) or 1.0
    return [_gap_bar(gap, most) for gap in apart.gaps]


def _gap_bar(gap: Gap, most: float) -> Bar:
    difference = gap.second_bpb - gap.first_bpb
    width = round(50 * abs(difference) / most, 2)
    return Bar(
        label=gap.title or "untitled",
        detail=f"{gap.size_bytes:,} bytes, {gap.first_bpb:.4f} to {gap.second_bpb:.4f}",
        value=signed(f"{difference:+.4f}"),
        change="",
        start=50 - width if difference < 0 else 50.0,
        width=width,
        tone="improved" if difference <= 0 else "worsened",
        standing=None,
        mark=50.0,
    )


@dataclass(frozen=True)
class PublishedRow:
    """A published record in the table: means over its seeds, and bytes and seconds of the largest and slowest seed."""

    name: str
    record: PublishedRecord
    bpb: float
    artifact_bytes: int
    train_s: float
    eval_s: float


def _published(name: str, record: PublishedRecord) -> PublishedRow:
    seeds = list(record.seeds.values())
    return PublishedRow(
        name,
        record,
        mean(record.bpb(record.evaluator)),
        max(seed.artifact_bytes for seed in seeds),
        max(seed.train_s for seed in seeds),
        max(seed.eval_s[record.evaluator] for seed in seeds),
    )
