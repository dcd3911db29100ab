"""The report's figures, as SVG in a data address: self-contained, sharp at any size, run nothing. Torch-free."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito: told apart also by readers who see few colours.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_MOST_NUMBERED = 20  # classes up to which a cell's count is printed


def curves(lines: Sequence[Mapping[str, Any]], metric: str, best_step: int | None) -> dict[str, str]:
    """Training loss, and the validation metric with the step that was kept. lines: the records of metrics.jsonl."""
    figure, (left, right) = make_axes(2, 8.6, 3.0)
    for split, colour in (("train", COLOURS[0]), ("validation", COLOURS[1])):
        points = [(line["step"], line["loss"]) for line in lines if line["split"] == split and line.get("loss")]
        if points:
            left.plot(*zip(*points, strict=True), color=colour, label=split, marker="." if len(points) < 30 else "")
    points = [(line["step"], line[metric]) for line in lines if line["split"] == "validation" and metric in line]
    if points:
        right.plot(*zip(*points, strict=True), color=COLOURS[1], marker=".", label=f"validation {metric}")
    if best_step is not None:
        right.axvline(best_step, color="0.5", linestyle="--", linewidth=1, label=f"kept: step {best_step}")
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel=metric)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    caption = "Loss of training steps (with dropout, and label smoothing if any) and of the validation split."
    return picture(figure, "Learning curves", caption)


def confusion(counts: np.ndarray, labels: Sequence[str]) -> dict[str, str]:
    """counts [classes, classes]: rows are the truth. Coloured by the share of each true class."""
    size = max(3.2, min(9.0, 0.55 * len(labels) + 2))
    figure, (axes,) = make_axes(1, size + 1.2, size)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    if len(labels) <= _MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{int(count)}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(len(labels)), [plain(label) for label in labels], rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), [plain(label) for label in labels])
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return picture(figure, "Confusion matrix", "Rows of the test split; colour is the share of the true class.")


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, str]:
    """bins: for each model its bins of confidence, each with confidence, accuracy and rows."""
    figure, (axes,) = make_axes(1, 4.2, 3.6)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    for (name, points), colour in zip(bins.items(), COLOURS, strict=False):
        size = [4 + 60 * point["rows"] / sum(each["rows"] for each in points) for point in points]
        where = [point["confidence"] for point in points], [point["accuracy"] for point in points]
        axes.plot(*where, color=colour, linewidth=1, label=name)
        axes.scatter(*where, s=size, color=colour)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()
    return picture(figure, "Reliability", "Accuracy by confidence in 15 bins; a dot's area is its share of the rows.")


def per_class(classes: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, str]:
    """classes: for each class its metrics as {"value", "low", "high"} and how many `rows` it has."""
    names = sorted(classes, key=lambda name: classes[name][metric]["value"] or 0.0)
    figure, (axes,) = make_axes(1, 6.0, max(1.8, 0.28 * len(names) + 0.8))
    for place, name in enumerate(names):
        entry = classes[name][metric]
        if entry["value"] is not None:
            axes.plot([entry["low"], entry["high"]], [place, place], color=COLOURS[0], linewidth=1.5)
            axes.plot(entry["value"], place, "o", color=COLOURS[0], markersize=4)
    axes.set_yticks(range(len(names)), [f"{plain(name)} ({classes[name]['rows']})" for name in names])
    axes.set(xlabel=metric, ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="x", color="0.9")
    return picture(figure, f"{metric} per class", "Test split with 95 % intervals; the number of rows in brackets.")


def make_axes(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its `count` axes side by side. Sizes in inches."""
    figure, grid = make_grid(1, count, width, height)
    return figure, grid[0]


def make_grid(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]."""
    # Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture(figure: Any, title: str, caption: str) -> dict[str, str]:
    """The figure as what a report shows: title, caption, and the image as a data address."""
    encoded = base64.b64encode(svg(figure)).decode()
    return {"title": title, "caption": caption, "image": f"data:image/svg+xml;base64,{encoded}"}


def svg(figure: Any) -> bytes:
    """The figure as a file."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dist-train", "font.family": "sans-serif"}):
        # No date: the same run gives the same report.
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def plain(label: str) -> str:
    """A label that matplotlib does not read as mathematics, cut to a readable length."""
    short = label if len(label) <= 28 else f"{label[:27]}…"
    return short.replace("$", r"\$")
