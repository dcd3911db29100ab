"""How recommendations are scored from the predictions that are kept, and what they are held against. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_train.baselines import kept_baselines
from dist_train.prepared import load_facts
from recipes.recsys import baselines as simple
from recipes.recsys import gallery
from recipes.recsys.config import Config
from recipes.recsys.measures import coverage, measure_lists
from recipes.recsys.predictions import header_of

METRIC = "ndcg"
METRICS = ("ndcg", "map", "hit_rate", "mrr")
HEADLINE = (*METRICS, "novelty", "popularity_lift")
COMPARED = ("ndcg", "hit_rate", "mrr")
UNIT = "user"
BASELINES = simple.ABOUT

measure = measure_lists


def details(table: pa.Table) -> dict[str, Any]:
    return {"coverage": coverage(table), "loss": header_of(table).loss}


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"A recommended item has {metrics['popularity_lift']['value']:.1f} times as many training events as one that "
        "was taken."
    ]


def baselines(prepared: Path, config: Config, say: Callable[[str], None]) -> dict[str, dict[str, pa.Table]]:
    """Predictions of each baseline for validation and test, trained on the training events of the prepared folder."""
    names = [name for name in BASELINES if name != "ease" or load_facts(prepared)["items"] <= simple.MOST_EASE_ITEMS]
    task = config.task
    described = [simple.VERSION, names, task.k, task.list_length, task.mask_seen, config.data.period_days]
    about = ", ".join(name.replace("_", "-") for name in names)
    return kept_baselines(
        prepared, described, names, about, lambda folder: simple.train_baselines(folder, config, names), say
    )


def figures(tables: Mapping[str, pa.Table], groups: Mapping[str, Any], prepared: Path) -> list[dict[str, str]]:
    """NDCG by bucket, how it falls with the model's age, what the lists hold, and some sessions."""
    return gallery.figures(tables, groups, prepared)
