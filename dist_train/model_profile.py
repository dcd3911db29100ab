"""What a training step of a model needs beside its weights: measured once by activation_profile.py, read here.

Torch-free: the planner evaluates it in the launcher's process. Files lie in the cache folder, keyed by content.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import RunConfig
from dist_train.prepared import cache_folder
from dist_train.rundir import json_text, write_atomic

# Changes whenever the same model would be measured differently.
VERSION = 2
OUTSIDE = -1
"""The block of parameters that lie in none: embeddings, last norm, head."""
NO_GRADIENT = -1


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    block: int
    """Which repeated block it belongs to, or OUTSIDE."""
    trainable: bool
    numel: int
    depth: int
    """Of its layer, see `parameter_groups.Layers`."""


@dataclass(frozen=True)
class Timeline:
    """Forward and backward pass, cut where a block begins or ends and where a gradient appears.

    Each interval has the peak of the bytes that are neither parameter, buffer nor finished gradient: activations that
    wait for the backward pass, temporaries, logits, and a gradient on its way.
    """

    backward: tuple[bool, ...]
    blocks: tuple[int, ...]
    """The block that runs in each interval."""
    gradients: tuple[int, ...]
    """Index of the parameter whose gradient is finished at the interval's end, or NO_GRADIENT."""
    peaks: list[list[list[int]]]
    """[rows][lengths][intervals], in bytes."""
    starts: list[list[list[int]]]
    """The same bytes when the interval begins."""
    kept: list[list[int]]
    """[rows][lengths]: bytes that wait for the backward pass when the forward pass has ended."""


@dataclass(frozen=True)
class ModelProfile:
    """Peaks at a few points (rows, length). Between points of rows it is read as a line, over lengths as a parabola."""

    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    cached: Timeline
    """With autocast's cache of cast weights (or in fp32, where there is none)."""
    uncached: Timeline | None
    """Without that cache, as under fsdp; None in fp32."""
    evaluation: list[list[int]]
    """[rows][lengths]: peak of a forward pass in evaluation."""
    method: str
    """"fake tensors", or "a small real pass" where a model's shapes depend on its data."""

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.trainable)

    def timeline(self, autocast_caches: bool) -> Timeline:
        return self.cached if autocast_caches or self.uncached is None else self.uncached

    def at(self, values: Any, rows: int, length: int) -> np.ndarray:
        """`values` [rows][lengths][...] at (rows, length); never below 0."""
        table = np.asarray(values, dtype=np.float64)
        by_rows = np.tensordot(_line(self.rows, rows), table, axes=1)
        return np.maximum(np.tensordot(_parabola(self.lengths, length), by_rows, axes=1), 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelProfile:
        fields = {name: value[name] for name in ModelProfile.__dataclass_fields__}
        parameters = tuple(Parameter(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields["parameters"])
        lines = {name: _read_timeline(fields[name]) for name in ("cached", "uncached")}
        points = {name: tuple(fields[name]) for name in ("rows", "lengths")}
        return ModelProfile(**{**fields, **lines, **points, "parameters": parameters})


def profile_file(config: RunConfig, data_fingerprint: str, precision: str, code: Path) -> Path:
    """Where the profile of this model lies, or will. `code`: the folder of the recipe's modules."""
    described = {
        "version": VERSION,
        "recipe": config.recipe,
        "model": config.model.model_dump(mode="json"),
        "task": config.task.model_dump(mode="json"),
        "data": data_fingerprint,
        "precision": precision,
        "activation_checkpointing": config.train.activation_checkpointing,
        "freeze": config.optim.freeze,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(code.glob("*.py"))],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return cache_folder(config) / f"profile-{key[:24]}.json"


def load_profile(path: Path) -> ModelProfile | None:
    """The profile in `path`; None when it is not there, or was written by another version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return ModelProfile.from_json(value) if value["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_profile(path: Path, profile: ModelProfile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json_text(profile.to_json()) if len(profile.parameters) < 50 else json.dumps(profile.to_json()))


def _read_timeline(value: dict[str, Any] | None) -> Timeline | None:
    if value is None:
        return None
    flat = {name: tuple(value[name]) for name in ("backward", "blocks", "gradients")}
    return Timeline(**{**value, **flat})


def _line(points: tuple[int, ...], value: int) -> np.ndarray:
    """Weights of the points for linear interpolation, the outer segments going on beyond their ends.

    A peak is the largest of several straight lines, so it is convex: the chord between two points is never below it.
    """
    weights = np.zeros(len(points))
    if len(points) == 1:
        weights[0] = value / points[0]
        return weights
    right = int(np.clip(np.searchsorted(points, value), 1, len(points) - 1))
    low, high = points[right - 1], points[right]
    weights[right] = (value - low) / (high - low)
    weights[right - 1] = 1.0 - weights[right]
    return weights


def _parabola(points: tuple[int, ...], value: int) -> np.ndarray:
    """Lagrange weights of the points: exact for what grows with the square of the length."""
    if len(points) == 1:
        return np.ones(1)
    weights = np.ones(len(points))
    for index, own in enumerate(points):
        for other in points:
            if other != own:
                weights[index] *= (value - other) / (own - other)
    return weights
