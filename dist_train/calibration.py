"""Temperature scaling (Guo et al. 2017) of kept probabilities. Torch-free."""

from __future__ import annotations

import numpy as np


def sharpen(probability: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities [n, labels] that logits divided by the temperature give: float64, from the probabilities alone,
    since logits and their log differ by a constant of the row."""
    logs = np.log(np.maximum(probability.astype(np.float64), 1e-30)) / temperature
    powers = np.exp(logs - logs.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def fit_temperature(probability: np.ndarray, truth: np.ndarray, least: float) -> float:
    """The temperature, from `least` to e^3, that makes the true labels [n] likeliest. probability: [n, labels]."""
    from scipy.optimize import minimize_scalar

    def log_loss(log_temperature: float) -> float:
        chosen = sharpen(probability, float(np.exp(log_temperature)))[np.arange(len(truth)), truth]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    return float(np.exp(minimize_scalar(log_loss, bounds=(np.log(least), 3.0), method="bounded").x))
