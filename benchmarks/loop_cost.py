"""What the loop adds to a step: a micro-model under `dist_train.train` and under a raw torch loop, interleaved.

    python -m benchmarks.loop_cost

Both take the same rows in the same order through the same model, AdamW and gradient clipping, one process, one thread.
Prints one JSON line: milliseconds of a step, medians over the repeats.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dist_train
from dist_train.config import RunConfig
from dist_train.data import Schedule
from dist_train.events import read_lines
from dist_train.optim import make_optimizer
from dist_train.parameter_groups import Layers
from dist_train.task import Batch, ListedRows, weighted_sum

ROWS, WIDTH, BATCH, STEPS, WARM_UP, REPEATS = 4096, 64, 64, 1500, 200, 5


class Net(nn.Module):
    """About half a millisecond a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, batch: Batch) -> torch.Tensor | dict[str, torch.Tensor]:
        logits = self.layers(batch["x"])
        if not self.training:
            return {"logits": logits}
        return weighted_sum(nn.functional.cross_entropy(logits, batch["y"], reduction="none"), batch["weight"])


class Rows(ListedRows):
    """Arrays, of which a batch is taken at once."""

    def take(self, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        x, y = self.rows[0]
        return [(x[indices], y[indices])]


class Micro:
    """Rows in memory."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._x = generator.standard_normal((ROWS, WIDTH)).astype(np.float32)
        self._y = self._x[:, :8].argmax(1).astype(np.int64)

    def build_model(self) -> nn.Module:
        return Net()

    def rows(self, split: str) -> Rows:
        count = ROWS if split == "train" else BATCH
        ones = np.ones(count, dtype=np.int64)
        return Rows([(self._x[:count], self._y[:count])], ones, ones.astype(np.float64), np.arange(count))

    def collate(self, rows: list[tuple[np.ndarray, np.ndarray]], seeds: np.ndarray) -> Batch:
        ((x, y),) = rows
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}


METRIC = "count"


def measure(table: object) -> Callable[[np.ndarray], dict[str, float]]:
    return lambda weights: {"count": float(weights.sum())}


def main() -> None:
    torch.set_num_threads(1)
    task, config = Micro(), None
    seen: dict[str, list[float]] = {"toolkit": [], "raw": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            for name in ("toolkit", "raw") if repeat % 2 == 0 else ("raw", "toolkit"):
                config = _config(Path(folder), repeat)
                seen[name].append(_toolkit(task, config) if name == "toolkit" else _raw(task, config))
                print(f"{name:8s} {1000 * seen[name][-1]:.3f} ms", file=sys.stderr, flush=True)
    medians = {name: 1000 * statistics.median(values) for name, values in seen.items()}
    figures = {
        **{f"{name}_ms": round(value, 4) for name, value in medians.items()},
        "added_ms": round(medians["toolkit"] - medians["raw"], 4),
        "steps": STEPS,
        "repeats": REPEATS,
        "by_repeat_ms": {name: [round(1000 * value, 4) for value in values] for name, values in seen.items()},
    }
    print(json.dumps(figures))


def _config(folder: Path, repeat: int) -> RunConfig:
    words = {
        "recipe": "micro",
        "name": f"micro{repeat}",
        "output_dir": str(folder),
        "train": {"steps": WARM_UP + STEPS, "global_batch_size": BATCH, "micro_batch_size": BATCH},
        "eval": {"every_steps": WARM_UP + STEPS, "bootstrap_samples": 100},
        "track": {"wandb": "disabled", "log_every_steps": 10},
    }
    return RunConfig.model_validate(words)


def _toolkit(task: Micro, config: RunConfig) -> float:
    """Seconds a step, from what the run itself logs."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = dist_train.train(task, config, score=sys.modules[__name__])
    lines = [line for line in read_lines(run.metrics) if line["split"] == "train" and line["step"] > WARM_UP]
    lines = lines[:-1]  # of the last one the time is not that of ten steps
    return statistics.fmean(BATCH / line["samples_per_s"] for line in lines)


def _raw(task: Micro, config: RunConfig) -> float:
    torch.manual_seed(0)
    model = task.build_model()
    model.train()
    depth = {name: 1 for name, _ in model.named_parameters()}
    optimizer = make_optimizer(model.named_parameters(), config.optim, Layers(depth, 0))
    rows, schedule = task.rows("train"), Schedule(ROWS, BATCH, 0)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            began = time.perf_counter()
        chosen = schedule.rows_of(step)
        batch = task.collate(rows.take(chosen), chosen)
        batch["weight"] = torch.ones(len(chosen))
        loss = model(batch) / BATCH
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
