"""The report as a picture: the training curve on the left, the figures it led to on the right."""

import io

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from stages.report.runs import Run


def figure(runs: list[Run], compressors: dict[str, float]) -> bytes:
    """PNG bytes: validation bpb by step for every seed, and bars of bpb by evaluator (first seed) and compressor."""
    drawing, (curve, bars) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        curve.plot(*zip(*run.curve, strict=True), marker="o", markersize=3, label=f"seed {run.seed}")
    curve.set(xlabel="step", ylabel="bits per byte", title="Validation while training")
    curve.legend(frameon=False)
    scores = {name: score["val_bpb"] for name, score in runs[0].scores.items()}
    heights = compressors | {"trained": runs[0].train["val_bpb"]} | scores
    colours = ["#b0b7c3"] * len(compressors) + ["#7aa6d8"] + ["#1f5fa8"] * len(scores)
    drawn = bars.bar(list(heights), list(heights.values()), color=colours)
    for name, bar in zip(heights, drawn, strict=True):
        if name == "slot":
            bar.set(hatch="//", facecolor="white", edgecolor="#1f5fa8")
    bars.bar_label(drawn, fmt="%.3f", fontsize=8)
    bars.set(title="Bits per byte (hatched: not a code length)")
    bars.tick_params(axis="x", rotation=20)
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(drawing)
    return buffer.getvalue()
