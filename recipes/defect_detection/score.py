"""How defect detection is scored from the predictions that are kept, and what it is held against. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.baselines import kept_baselines
from dist_train.metrics import Classification
from dist_train.prepared import load_facts
from recipes.defect_detection import decisions, gallery, texture_baseline
from recipes.defect_detection.config import Config
from recipes.defect_detection.measures import measure_defects, recall_name
from recipes.defect_detection.predictions import HITS, NEAR, header_of, probabilities
from recipes.defect_detection.sampling import is_one_class

METRIC = "pr_auc"
METRICS = ("pr_auc", "f1", "macro_f1", "roc_auc", "accuracy")
HEADLINE = ("pr_auc", "f1", "macro_f1", recall_name(10), "accuracy", "calibration_error")
COMPARED = ("pr_auc", "f1", "macro_f1")
LOSS = "log_loss"
UNIT = "item"
BASELINES = {"texture": texture_baseline.ABOUT, "majority": "the class shares of the training split"}

calibrate = decisions.calibrate
decide = decisions.decide


def measure(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    """All metrics of a predictions table, as a function of row weights."""
    return measure_defects(table) if header_of(table).is_binary else _classes(table)


def _classes(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    classification = _classification(table)
    if "decision" not in table.column_names:
        return classification.values
    sure = np.array(table["decision"].to_pylist()) == decisions.ACCEPT
    right = sure & (table["label"].to_numpy() == probabilities(table).argmax(1))

    def values(weights: np.ndarray) -> dict[str, float]:
        share = float(weights @ ~sure / weights.sum())
        accuracy = float(weights @ right / (weights @ sure)) if weights @ sure else np.nan
        return {**classification.values(weights), "review_share": share, "accuracy_without_review": accuracy}

    return values


def _classification(table: pa.Table) -> Classification:
    probability = probabilities(table)
    return Classification(table["label"].to_numpy(), probability.argmax(1), probability, header_of(table).labels)


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    if "caught" not in metrics:
        share = metrics["review_share"]["value"]
        return [f"{share:.1%} of the test parts are in doubt and go to an operator."] if share is not None else []
    sentences = []
    caught, overkill, review = (metrics[name]["value"] for name in ("caught", "overkill", "review_share"))
    least = metrics["caught_at_least"]["value"]
    if caught is not None:
        sentences.append(
            f"{caught:.1%} of the defective test parts are rejected or reviewed (at least {least:.1%}, one-sided "
            f"95 %), and {1 - caught:.1%} escape."
        )
    if overkill is not None:
        sentences.append(f"{overkill:.1%} of the good parts are rejected; {review:.1%} of all go to an operator.")
    if metrics.get(HITS[0], {"value": None})["value"] is not None:
        peak, middle, random, near_peak, near_middle, near_random = (metrics[name]["value"] for name in HITS)
        sentences.append(
            f"The heat map's peak lies in the marked defect of {peak:.1%} of the found parts; the image's middle does "
            f"in {middle:.1%} of them, a random point in {random:.1%}. Within 1/{1 / NEAR:.0f} of the image's side of "
            f"it they lie in {near_peak:.1%}, {near_middle:.1%} and {near_random:.1%}."
        )
    return sentences


def details(table: pa.Table) -> dict[str, Any]:
    return {} if header_of(table).is_binary else {"confusion": _classification(table).confusion().astype(int).tolist()}


def baselines(prepared: Path, config: Config, say: Callable[[str], None]) -> dict[str, dict[str, pa.Table]]:
    """Predictions of each baseline for validation and test, from what the model may learn from, decided by its rule."""
    one_class = is_one_class(config, load_facts(prepared))
    described = [*texture_baseline.DESCRIBED, one_class]
    train = functools.partial(texture_baseline.train, one_class=one_class)
    tables = kept_baselines(prepared, described, list(BASELINES), BASELINES["texture"], train, say)
    for splits in tables.values():
        decision = calibrate(splits["validation"], config)
        splits |= {split: decide(table, decision) for split, table in splits.items()}
    return tables


def figures(tables: Mapping[str, pa.Table], groups: Mapping[str, Any], prepared: Path) -> list[dict[str, str]]:
    """Curves, classes, and the parts that the model got most wrong, with its heat maps; of the test split."""
    from dist_train import plots

    pictures = []
    if header_of(tables["model"]).is_binary:
        pictures += [gallery.precision_recall(tables), gallery.costs(tables["model"])]
    else:
        measured = _classification(tables["model"])
        pictures += [plots.confusion(measured.confusion(), measured.labels), plots.per_class(groups["class"], "f1")]
    reliability = {name: _classification(tables[name]).reliability() for name in ("model", "texture")}
    return [*pictures, plots.reliability(reliability), *gallery.worst(tables["model"], prepared)]
