"""What a scaling study says: rates, efficiency and spread of each size, and a fit that predicts others. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SPREAD_LIMIT = 0.05
"""A point whose repeats lie further apart than this share of their median is flagged."""
LOSS_LIMIT = 1e-4
"""Relative difference of the last loss from the first size's above which a size did not do the same work."""
_WEAK_TERMS = ("1", "log2 n")
_STRONG_TERMS = ("1", "1/n", "log2 n")


@dataclass(frozen=True)
class Size:
    """One point of a study: how many ranks, and how they share the training."""

    strategy: str
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.nodes}x{self.per_node}"


@dataclass(frozen=True)
class Repeat:
    """What one training of a size came to, its warm-up left out."""

    step_s: tuple[float, ...]
    """Seconds of each measured step."""
    samples: int
    tokens: int
    """Positions without padding that the measured steps trained."""
    input_wait_share: float
    padding_share: float
    loss: float | None
    """Of the last step; where the model has dropout, of a short training without, once a size."""
    memory_gib: float
    predicted_gib: float | None
    split: dict[str, float] | None
    """Shares of a step's time by what it went into; None where this repeat was not profiled."""
    shares_one_host: bool
    load: float
    """Processes that wanted to run when it began, averaged over a minute."""
    clock_mhz: float | None

    @property
    def seconds(self) -> float:
        return sum(self.step_s)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds


def summarise(
    measured: Mapping[Size, Sequence[Repeat]], mode: str, price_per_hour: float | None, cores: int
) -> list[dict[str, Any]]:
    """One entry a size that has a repeat, in order; speed-up and efficiency are against the smallest of its strategy.

    mode: strong keeps the global batch, weak keeps each rank's share of it. price_per_hour: of one rank.
    """
    entries = []
    bases: dict[str, tuple[Size, float]] = {}
    losses = {size: next((each.loss for each in repeats if each.loss), None) for size, repeats in measured.items()}
    reference = next((loss for loss in losses.values() if loss is not None), None)
    for size, repeats in measured.items():
        if not repeats:
            continue
        rates = [repeat.samples_per_s for repeat in repeats]
        rate = statistics.median(rates)
        base, base_rate = bases.setdefault(size.strategy, (size, rate))
        speed_up = rate / base_rate
        spread = (max(rates) - min(rates)) / rate
        entry: dict[str, Any] = {
            "name": size.name,
            "strategy": size.strategy,
            "nodes": size.nodes,
            "ranks": size.ranks,
            "repeats": len(repeats),
            "samples_per_s": rate,
            "samples_per_s_by_repeat": rates,
            "tokens_per_s": statistics.median(repeat.tokens / repeat.seconds for repeat in repeats),
            "step_s": statistics.median(step for repeat in repeats for step in repeat.step_s),
            "spread": spread,
            "speed_up": speed_up,
            "efficiency": speed_up * base.ranks / size.ranks,
            "input_wait_share": statistics.median(repeat.input_wait_share for repeat in repeats),
            "padding_share": statistics.median(repeat.padding_share for repeat in repeats),
            "memory_gib": max(repeat.memory_gib for repeat in repeats),
            "predicted_gib": repeats[0].predicted_gib,
            "split": next((repeat.split for repeat in repeats if repeat.split), None),
            "loss": losses[size],
            "load": max(repeat.load for repeat in repeats),
            "clock_mhz": repeats[0].clock_mhz,
            "cost_per_million_samples": (
                None if price_per_hour is None else 1e6 / rate / 3600 * price_per_hour * size.ranks
            ),
        }
        entry["flags"] = _flags(size, repeats, entry, reference if mode == "strong" else None, cores)
        entries.append(entry)
    return entries


def flat_table(entries: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The entries as rows of plain values, a header first."""
    lists = ("flags", "samples_per_s_by_repeat", "split")
    names = [name for name in entries[0] if name not in lists]
    parts = sorted({part for entry in entries for part in entry["split"] or {}})
    header = [*names, *(f"share of {part}" for part in parts), "flags"]
    return [header] + [
        [
            *(entry[name] for name in names),
            *((entry["split"] or {}).get(part) for part in parts),
            "; ".join(entry["flags"]),
        ]
        for entry in entries
    ]


def _flags(
    size: Size, repeats: Sequence[Repeat], entry: Mapping[str, Any], reference: float | None, cores: int
) -> list[str]:
    """What a reader must know before the figures of this size are believed."""
    flags = []
    if entry["spread"] > SPREAD_LIMIT:
        flags.append(f"its repeats lie {entry['spread']:.0%} apart")
    if len(repeats) == 1:
        flags.append("measured once: its spread is not known")
    if cores and size.ranks > cores:
        flags.append(f"{size.ranks} ranks share {cores} cores")
    if size.nodes > 1 and any(repeat.shares_one_host for repeat in repeats):
        flags.append(f"its {size.nodes} nodes share one host: this is no scaling over machines")
    if reference is not None and entry["loss"] is None:
        flags.append("its loss was not compared")
    elif reference is not None and abs(entry["loss"] / reference - 1) > LOSS_LIMIT:
        flags.append(f"its last loss, {entry['loss']:.6g}, is not the first size's, {reference:.6g}")
    return flags


def fit(entries: Sequence[Mapping[str, Any]], mode: str, more_ranks: Sequence[int]) -> dict[str, Any] | None:
    """The seconds of a step as a sum of terms with weights of 0 or more, least squares over the sizes of one strategy:
    a part that is the same on any number of ranks, one that is shared by them (Amdahl 1967), one that grows with the
    depth of a reduction tree. None for fewer than two sizes.

    Three terms need four sizes; with fewer the tree is left out. more_ranks: sizes to predict.
    """
    from scipy.optimize import nnls

    ranks = np.array([entry["ranks"] for entry in entries], dtype=float)
    if len(set(ranks)) < 2:
        return None
    seconds = np.array([entry["step_s"] for entry in entries])
    terms = _WEAK_TERMS if mode == "weak" else _STRONG_TERMS if len(set(ranks)) > 3 else _STRONG_TERMS[:2]
    # Each size counts by its relative error.
    weights, _ = nnls(_terms(terms, ranks) / seconds[:, None], np.ones(len(seconds)))
    fitted = _terms(terms, ranks) @ weights
    ahead = np.array(more_ranks, dtype=float)
    predicted = _terms(terms, ahead) @ weights
    return {
        "terms": dict(zip(terms, weights.tolist(), strict=True)),
        "residuals": (fitted / seconds - 1).tolist(),
        "has_freedom": len(set(ranks)) > len(terms),
        "predictions": [
            {"ranks": int(count), "step_s": float(value)} for count, value in zip(ahead, predicted, strict=True)
        ],
    }


def _terms(names: Sequence[str], ranks: np.ndarray) -> np.ndarray:
    """[sizes, terms]."""
    columns = {"1": np.ones_like(ranks), "1/n": 1 / ranks, "log2 n": np.log2(ranks)}
    return np.stack([columns[name] for name in names], axis=1)
