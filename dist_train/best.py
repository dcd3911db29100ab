"""Which evaluation was the best: by the metric that was asked for, or by the loss where the split cannot tell it.

PR-AUC is not defined on a validation split without a positive row: no step would ever be the best one. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dist_train.score import Score


class Verdict(NamedTuple):
    """What an evaluation came to."""

    metric: str
    """What it was judged by."""
    value: float
    improved: bool
    replaced: bool
    """The first one that is judged by the loss instead of the metric."""


def judge(state: Any, asked: str, metrics: Mapping[str, float], score: Score) -> Verdict:
    """Keep the best evaluation in the loop's counters. What is not a number is never better; as long as none was one,
    there is nothing to gain on, and the evaluations without a gain are not counted."""
    by_asked = state.best_value is not None and state.best_metric in (None, asked)
    name, sign = asked, score.sign(asked)
    if not by_asked and not np.isfinite(metrics[asked]) and score.loss is not None:
        name, sign = score.loss, -1.0
    value = metrics[name]
    first = state.best_value is None or name != (state.best_metric or asked)
    improved = bool(np.isfinite(value)) and (first or sign * value > sign * state.best_value)
    if improved:
        state.best_value, state.best_step, state.best_metric = value, state.step, name
        state.evaluations_without_gain = 0
    elif state.best_value is not None:
        state.evaluations_without_gain += 1
    return Verdict(name, value, improved, improved and first and name != asked)
