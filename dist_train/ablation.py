"""What each component of a recipe adds: the ladder of a config as runs, and the table of their results. Torch-free."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.config import RunConfig
from dist_train.errors import ConfigError
from dist_train.metrics import interval
from dist_train.score import Score


@dataclass(frozen=True)
class Rung:
    """One step of the ladder."""

    name: str
    settings: tuple[str, ...]
    """Its own `key=value`, and those of all rungs before it."""

    @property
    def slug(self) -> str:
        """The name as part of a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    index: int
    rung: Rung
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rung.slug}-s{self.seed}"


def parse_ladder(config: RunConfig) -> list[Rung]:
    """The rungs of a config, from the first. ConfigError for a ladder that is none."""
    if not config.ladder or len(config.ladder) < 2:
        raise ConfigError(
            "the recipe has no ladder of two rungs or more to compare. In its file, for example:\n"
            "  ladder:\n    - 'plain: task.label_smoothing=0 train.ema_decay=null'\n"
            "    - '+ label smoothing: task.label_smoothing=0.1'\n    - '+ moving average: train.ema_decay=0.998'",
            "ladder",
        )
    rungs: list[Rung] = []
    for text in config.ladder:
        name, colon, settings = text.partition(":")
        try:
            own = shlex.split(settings)
        except ValueError as error:
            raise ConfigError(f"ladder: the rung {text!r} cannot be read: {error}.", "ladder") from error
        if not colon or not name.strip() or not own or not all("=" in word for word in own):
            raise ConfigError(f"ladder: the rung {text!r} is not of the form `NAME: key=value key=value`.", "ladder")
        rungs.append(Rung(name.strip(), (*(rungs[-1].settings if rungs else ()), *own)))
    slugs = [rung.slug for rung in rungs]
    twice = [rung.name for rung in rungs if slugs.count(rung.slug) > 1 or not rung.slug]
    if twice:
        raise ConfigError(f"ladder: {twice[0]!r} needs a name that differs in letters or digits.", "ladder")
    return rungs


def make_grid(rungs: Sequence[Rung], seeds: int, first_seed: int = 0) -> list[Cell]:
    """Every rung with one seed before any has two: a study that is broken off is a smaller one."""
    pairs = [(rung, seed) for seed in range(first_seed, first_seed + seeds) for rung in rungs]
    return [Cell(index, rung, seed) for index, (rung, seed) in enumerate(pairs)]


def compare_rungs(
    rungs: Sequence[Rung], tables: Mapping[tuple[str, int], pa.Table], score: Score, samples: int
) -> list[dict[str, Any]]:
    """One entry a rung that has results: its metrics, mean and standard deviation over seeds, and its paired
    differences to the rung before and to the first.

    tables: test predictions by rung and seed. A difference is the mean over the seeds that both rungs have, and its
    interval covers which rows were sampled, given these seeds: the same draws for all.
    """
    if not tables:
        return []
    first = next(iter(tables.values()))
    for (name, seed), table in tables.items():
        if not table["row"].equals(first["row"]):
            raise ConfigError(f"{name} with seed {seed} was tested on other rows than the others.")
    draws = np.array([np.ones(first.num_rows), *score.draws(first, samples)])
    values = {place: _drawn(score, table, draws) for place, table in tables.items()}
    entries: list[dict[str, Any]] = []
    done = [rung for rung in rungs if any(name == rung.name for name, _ in values)]
    for rung in done:
        own = {seed: metrics for (name, seed), metrics in values.items() if name == rung.name}
        entry: dict[str, Any] = {"rung": rung.name, "settings": list(rung.settings), "seeds": sorted(own)}
        entry["metrics"] = {
            metric: _over_seeds([own[seed][metric][0] for seed in sorted(own)]) for metric in next(iter(own.values()))
        }
        for key, other in (("to_rung_before", done[len(entries) - 1]), ("to_first_rung", done[0])):
            if entries:
                entry[key] = {"rung": other.name, **_difference(values, rung.name, other.name)}
        entries.append(entry)
    return entries


def verdicts(entries: Sequence[Mapping[str, Any]], score: Score) -> list[str]:
    """A plain sentence on each rung and compared metric: does it help?"""
    sentences = []
    for entry in entries[1:]:
        difference = entry["to_rung_before"]
        for metric, value in difference["metrics"].items():
            if metric not in score.compared or value["value"] is None:
                continue
            ends = [score.sign(metric) * value[end] for end in ("low", "high")]
            verb = "helps" if min(ends) > 0 else "HARMS" if max(ends) < 0 else "is not shown to help"
            sentences.append(
                f"{entry['rung']} {verb}: {metric} {value['value']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}] "
                f"to {difference['rung']}, {len(difference['seeds'])} seed{'s' * (len(difference['seeds']) != 1)}."
            )
    return sentences


def _drawn(score: Score, table: pa.Table, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Each shown metric of all rows, and of each draw: [1 + samples]."""
    measure = score.values(table)
    every = [measure(weights) for weights in draws]
    shown = dict.fromkeys((*score.headline, *score.compared))
    return {name: np.array([values[name] for values in every]) for name in shown if name in every[0]}


def _over_seeds(points: list[float]) -> dict[str, float | None]:
    mean = float(np.mean(points))
    return {"mean": mean if np.isfinite(mean) else None, "std": _spread(points)}


def _spread(points: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None of a single one, or where a value is not defined."""
    spread = float(np.std(points, ddof=1)) if len(points) > 1 else np.nan
    return spread if np.isfinite(spread) else None


def _difference(values: Mapping[tuple[str, int], Mapping[str, np.ndarray]], rung: str, other: str) -> dict[str, Any]:
    seeds = sorted({seed for name, seed in values if name == rung} & {seed for name, seed in values if name == other})
    if not seeds:
        return {"seeds": [], "metrics": {}}
    metrics = {}
    for metric in values[rung, seeds[0]]:
        each = np.array([values[rung, seed][metric] - values[other, seed][metric] for seed in seeds])
        mean = each.mean(0)
        metrics[metric] = {**interval(float(mean[0]), mean[1:]), "std_over_seeds": _spread(each[:, 0].tolist())}
    return {"seeds": seeds, "metrics": metrics}
