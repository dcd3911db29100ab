"""The report's pictures of defect detection: curves, and the parts that the model got most wrong. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_train import plots
from dist_train.metrics import ranking
from recipes.defect_detection.decisions import ACCEPT, REJECT
from recipes.defect_detection.predictions import DEFECTIVE, header_of, lists_of, probabilities
from recipes.defect_detection.stored import StoredImages

_SHOWN = 8
_COLUMNS = 4

Picture = dict[str, str]


def precision_recall(tables: Mapping[str, pa.Table]) -> Picture:
    """Of model and baselines, with the model's point at its F1 threshold."""
    figure, (axes,) = plots.make_axes(1, 4.6, 3.6)
    for (name, table), colour in zip(tables.items(), plots.COLOURS, strict=False):
        score, defective = probabilities(table)[:, DEFECTIVE], _defective(table)
        _, positive, ends = ranking(score, defective)
        hits, seen = np.cumsum(positive)[ends], ends + 1
        axes.step(hits / max(positive.sum(), 1), hits / seen, where="post", color=colour, label=name, linewidth=1.2)
        if name == "model":
            flagged = _flagged(table)
            found = (flagged & defective).sum()
            axes.plot(
                found / max(defective.sum(), 1), found / max(flagged.sum(), 1), "o", color=colour, label="F1 threshold"
            )
    axes.set(xlabel="recall of defective parts", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()
    return plots.picture(
        figure, "Precision and recall", "Test split; the threshold was chosen on the validation split."
    )


def costs(table: pa.Table) -> Picture:
    """What 1,000 parts cost at each threshold without an operator: escapes and over-kill."""
    figure, (axes,) = plots.make_axes(1, 4.6, 3.6)
    score, defective = probabilities(table)[:, DEFECTIVE], _defective(table)
    rising = np.sort(np.unique(score))
    escapes = np.array([(defective & (score < cut)).sum() for cut in rising]) / max(defective.sum(), 1)
    overkill = np.array([(~defective & (score >= cut)).sum() for cut in rising]) / max((~defective).sum(), 1)
    axes.plot(rising, escapes, color=plots.COLOURS[1], label="defective parts that escape")
    axes.plot(rising, overkill, color=plots.COLOURS[0], label="good parts that are rejected")
    decision = np.array(table["decision"].to_pylist())
    for word, edge, style in (
        (ACCEPT, score[decision == ACCEPT].max(initial=0.0), ":"),
        (REJECT, score[decision == REJECT].min(initial=1.0), "--"),
    ):
        axes.axvline(
            edge,
            color="0.5",
            linestyle=style,
            linewidth=1,
            label=f"{word} {'up to' if word == ACCEPT else 'from'} here",
        )
    axes.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return plots.picture(
        figure, "Escapes and over-kill", "By threshold on the test split; what lies between the lines is reviewed."
    )


def worst(table: pa.Table, prepared: Path) -> list[Picture]:
    """The defective parts that seemed best and the good ones that seemed worst; with classes, the surest errors."""
    stored, header = StoredImages(prepared), header_of(table)
    probability, truth = probabilities(table), table["label"].to_numpy()
    if header.is_binary:
        score, flagged = probability[:, DEFECTIVE], _flagged(table)
        misses = _first(score, (truth == DEFECTIVE) & ~flagged)
        rejects = _first(-score, (truth != DEFECTIVE) & flagged)
        parts = [
            ("Worst misses", "Defective parts that were not flagged, the surest first.", misses),
            ("Worst false rejects", "Good parts that were flagged, the surest first.", rejects),
        ]
    else:
        wrong = _first(-probability.max(1), probability.argmax(1) != truth)
        parts = [("Worst errors", "Images of another class than predicted, the surest first.", wrong)]
    return [_grid(table, stored, title, caption, rows) for title, caption, rows in parts if len(rows)]


def _grid(table: pa.Table, stored: StoredImages, title: str, caption: str, rows: np.ndarray) -> Picture:
    """Each image beside itself under its heat map; the marked defect outlined, the map's peak crossed."""
    header, probability = header_of(table), probabilities(table)
    lines = -(-len(rows) // _COLUMNS)
    figure, axes = plots.make_grid(lines, 2 * _COLUMNS, 9.2, 1.5 * lines)
    cells = axes.reshape(-1)
    for axis in cells:
        axis.set_axis_off()
    heat = lists_of(table, "heat").astype(np.float32)
    ids, labels = table["id"].to_pylist(), table["label"].to_numpy()
    for place, row in enumerate(rows.tolist()):
        number = int(table["row"][row].as_py())
        image = stored.image_or_blank(number)
        shown = np.moveaxis(image, 0, 2) if len(image) == 3 else image[0]
        left, right = cells[2 * place], cells[2 * place + 1]
        for axis in (left, right):
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255)
        height, width = image.shape[1:]
        assert header.heat_shape is not None
        right.imshow(
            heat[row].reshape(header.heat_shape),
            cmap="inferno",
            alpha=0.45,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        right.plot(
            table["peak_x"][row].as_py() * width - 0.5,
            table["peak_y"][row].as_py() * height - 0.5,
            "x",
            color="#00FFFF",
            markersize=4,
        )
        mask = stored.mask(number)
        if mask is not None and mask.any() and not mask.all():
            left.contour(mask, levels=[0.5], colors=["#00FFFF"], linewidths=0.6)
        predicted = header.labels[int(probability[row].argmax())]
        said = (
            f"p={probability[row, DEFECTIVE]:.2f}"
            if header.is_binary
            else f"{header.labels[labels[row]]} as {predicted}"
        )
        left.set_title(plots.plain(f"{ids[row]}"[-26:]), fontsize=5)
        right.set_title(plots.plain(said), fontsize=5)
    return plots.picture(figure, title, caption)


def _first(rising: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(rising[rows], kind="stable")][:_SHOWN]


def _defective(table: pa.Table) -> np.ndarray:
    return table["label"].to_numpy() == DEFECTIVE


def _flagged(table: pa.Table) -> np.ndarray:
    return table["predicted"].to_numpy() == DEFECTIVE
