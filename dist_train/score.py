"""How a recipe is scored: its score.py as a value, what it leaves out filled in. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.errors import ConfigError
from dist_train.metrics import bootstrap_weights

# Apart from the run's seed: the same predictions have the same intervals, whoever trained them.
_BOOTSTRAP_SEED = 20_240_229
Values = Callable[[np.ndarray], dict[str, float]]
"""Every metric by name, row i counted weights[i] times. GROUP/NAME/METRIC is a metric of a part of the rows (a class, a
cohort); its METRIC `rows` is how many they are. A bootstrap sample is such weights, and so every metric has an
interval."""


@dataclass(frozen=True)
class Score:
    """What score.py of a recipe gives, under the names in brackets; the first two it must give."""

    metric: str
    """[METRIC] The validation metric that picks the best checkpoint, unless eval.metric names another of `metrics`."""
    measure: Callable[[pa.Table], Values]
    """[measure] From a table of kept predictions to the function that weighs its rows."""
    metrics: tuple[str, ...]
    """[METRICS] Those that eval.metric may name, and the first ones that a report shows."""
    lower_is_better: frozenset[str] = frozenset()
    """[LOWER_IS_BETTER] Which of them, errors and losses, are better when lower."""
    unit: str | None = None
    """[UNIT] The column of predictions that names what was sampled, for example a part or a user: intervals are over
    these; else over rows."""
    loss: str | None = None
    """[LOSS] The one that the training minimises, drawn beside the training loss."""
    headline: tuple[str, ...] = ()
    """[HEADLINE] The columns of the summary; else `metrics`."""
    compared: tuple[str, ...] = ()
    """[COMPARED] Those by which the report says whether the model beats a baseline; else `metric`."""
    about_baselines: Mapping[str, str] = ()  # type: ignore[assignment]
    """[BASELINES] Each baseline and what it is."""
    baselines: Callable[[Path, Any, Callable[[str], None]], dict[str, dict[str, pa.Table]]] = lambda *_: {}
    """[baselines] From the prepared folder and the config: their predictions by baseline and split, trained on the
    training split."""
    calibrate: Callable[[pa.Table, Any], dict[str, Any]] = lambda validation, config: {}
    """[calibrate] From the validation predictions: what turns an output into a decision (temperature, thresholds)."""
    decide: Callable[[pa.Table, Mapping[str, Any]], pa.Table] = lambda table, decision: table
    """[decide] The predictions with that applied."""
    remarks: Callable[[Mapping[str, Any]], list[str]] = lambda metrics: []
    """[remarks] Plain sentences below the summary, from the model's metrics on the test split with their intervals."""
    details: Callable[[pa.Table], dict[str, Any]] = lambda table: {}
    """[details] What report.json keeps beside the metrics."""
    figures: Callable[[Mapping[str, pa.Table], Mapping[str, Any], Path], list[dict[str, str]]] = lambda *_: []
    """[figures] The report's own figures, from the test predictions of model and baselines, the model's metrics by
    group, and the prepared folder: each with title, caption and image."""

    def values(self, table: pa.Table) -> Values:
        """`measure` of the table, its values as plain numbers."""
        weighed = self.measure(table)
        return lambda weights: {name: float(value) for name, value in weighed(weights).items()}

    def point(self, table: pa.Table) -> dict[str, float]:
        """Every metric with each row counted once."""
        return self.values(table)(np.ones(table.num_rows))

    def draws(self, table: pa.Table, samples: int) -> Iterator[np.ndarray]:
        """Row weights [rows] of bootstrap samples, of whole units where the recipe names what they are; the same for
        every table of the same rows."""
        if self.unit not in table.column_names:
            yield from bootstrap_weights(table.num_rows, samples, _BOOTSTRAP_SEED)
            return
        units, unit_of = np.unique(np.array(table[self.unit].to_pylist()), return_inverse=True)
        for drawn in bootstrap_weights(len(units), samples, _BOOTSTRAP_SEED):
            yield drawn[unit_of]

    @property
    def sampled(self) -> str:
        """What a bootstrap sample draws, in the plural."""
        return f"{self.unit or 'row'}s"

    def sign(self, metric: str) -> float:
        """1 where higher is better, else -1."""
        return -1.0 if metric in self.lower_is_better else 1.0


def read_score(module: Any, where: str) -> Score:
    """The Score of a module, or of any object that has its names. ConfigError for what is missing."""
    missing = [name for name in ("METRIC", "measure") if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"{where} has no {' and no '.join(missing)}: METRIC names the validation metric that picks the best "
            "checkpoint, and measure(predictions) returns the function from row weights to every metric by name."
        )
    metric = module.METRIC
    metrics = tuple(getattr(module, "METRICS", (metric,)))
    given = {
        name: getattr(module, name)
        for name in ("baselines", "calibrate", "decide", "remarks", "details", "figures")
        if hasattr(module, name)
    }
    return Score(
        metric,
        module.measure,
        metrics,
        frozenset(getattr(module, "LOWER_IS_BETTER", ())),
        getattr(module, "UNIT", None),
        getattr(module, "LOSS", None),
        tuple(getattr(module, "HEADLINE", metrics)),
        tuple(getattr(module, "COMPARED", (metric,))),
        dict(getattr(module, "BASELINES", {})),
        **given,
    )


def is_of_group(metric: str) -> bool:
    return metric.count("/") >= 2


def by_group(entries: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries named GROUP/NAME/METRIC as [GROUP][NAME][METRIC]. A NAME may hold slashes of its own."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for full, entry in entries.items():
        if is_of_group(full):
            group, _, rest = full.partition("/")
            name, _, metric = rest.rpartition("/")
            groups.setdefault(group, {}).setdefault(name, {})[metric] = entry
    return groups
