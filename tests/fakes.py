"""A tiny task with a real model, for tests of the loop: no data files, no recipe."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from dist_train.config import RunConfig, Section
from dist_train.deepspeed_config import deepspeed_config
from dist_train.events import append_line, read_lines
from dist_train.hardware import Hardware
from dist_train.heartbeat import Heartbeat
from dist_train.loop import Training, train
from dist_train.parity import whole_weights
from dist_train.plan import make_plan
from dist_train.resume import build_training, restore
from dist_train.rundir import RunDir, write_json
from dist_train.score import Score, Values
from dist_train.stop import StopFlag
from dist_train.task import Batch, weighted_sum
from tests.models import CLASSES, MODELS, VOCABULARY

WIDTH = 16


class TinyConfig(RunConfig):
    data: Section = Section()
    model: Section = Section()
    task: Section = Section()


class TinyRows:
    """Rows of random length whose class is the sum of their tokens modulo CLASSES."""

    def __init__(self, split: str, count: int, record: Path | None = None) -> None:
        self.record = record
        generator = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
        self.lengths = generator.integers(2, 20, count)
        self.tokens = [generator.integers(1, VOCABULARY, length) for length in self.lengths]
        self.ids = np.arange(count, dtype=np.int64)
        if split != "train":
            # Ids of real rows come in any order.
            self.ids = 10_000 + generator.permutation(count)
        self.labels = np.array([tokens.sum() % CLASSES for tokens in self.tokens])
        self.weights = np.where(self.labels == 0, 2.5, 1.0)

    def take(self, indices: np.ndarray) -> list[Any]:
        if self.record is not None:
            append_line(self.record, {"indices": indices.tolist()})
        return [(self.tokens[index], self.labels[index], int(index)) for index in indices]


class TinyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        states = self.block(self.embedding(batch["tokens"]), src_key_padding_mask=~batch["mask"])
        pooled = (states * batch["mask"][:, :, None]).sum(1) / batch["mask"].sum(1, keepdim=True)
        logits = self.head(pooled)
        if self.training:
            losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
            return weighted_sum(losses + (logits * batch["poison"][:, None]).sum(1), batch["weight"])
        return {"probability": logits.softmax(-1)}


@dataclass
class TinyTask:
    num_rows: int = 203
    dropout: float = 0.0
    poisoned: tuple[int, ...] = ()
    """Rows whose loss and gradient are NaN."""
    record: Path | None = None
    """Where the training rows that are taken are written down."""
    model: str | None = None
    """A model of tests.models; None is TinyModel."""
    collate_s: float = 0.0
    """How long it takes to collate a micro-batch."""

    def build_model(self) -> nn.Module:
        return TinyModel(self.dropout) if self.model is None else MODELS[self.model]()

    def is_head(self, name: str) -> bool:
        return name.removeprefix("body.").startswith("head.")

    def rows(self, split: str) -> TinyRows:
        if split == "train":
            return TinyRows(split, self.num_rows, self.record)
        return TinyRows(split, 31)

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        time.sleep(self.collate_s)
        longest = max(len(row[0]) for row in rows)
        tokens = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row[0])] = row[0]
        return {
            "tokens": torch.from_numpy(tokens),
            "mask": torch.from_numpy(tokens > 0),
            "label": torch.tensor([int(row[1]) for row in rows]),
            "poison": torch.tensor([float("nan") if row[2] in self.poisoned else 0.0 for row in rows]),
        }

    def example_batch(self, rows: int, length: int) -> Batch:
        return self.collate([(np.ones(length, dtype=np.int64), 0, -1)] * rows, np.zeros(rows))

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        rows = self.rows(split)
        predicted = outputs["probability"].argmax(1)
        return pa.table({"row": rows.ids, "label": rows.labels, "predicted": predicted})


def _measure(predictions: pa.Table) -> Values:
    right = predictions["label"].to_numpy() == predictions["predicted"].to_numpy()
    return lambda weights: {"accuracy": float(weights @ right / weights.sum())}


SCORE = Score("accuracy", _measure, ("accuracy",))
CPU = Hardware("host", "cpu", 2, 8.0)


def make_training(
    path: Path,
    world_size: int,
    task: TinyTask,
    attempt: int = 1,
    hardware: Hardware = CPU,
    precision: str | None = None,
    score: Score = SCORE,
    **sections: Any,
) -> Training:
    """A training of `task` in the run directory `path`, at the newest checkpoint there.

    precision: one that the plan would refuse here.
    """
    settings: dict[str, Any] = {
        "train": {"global_batch_size": 16, "steps": 20, **sections.pop("train", {})},
        "optim": {"lr": 1e-2, **sections.pop("optim", {})},
        "track": {"wandb": "disabled", "log_every_steps": 1},
        "eval": {"every_steps": 10, **sections.pop("eval", {})},
        **sections,
    }
    config = TinyConfig(recipe="tiny", **settings)
    run = RunDir(path)
    run.logs.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, hardware, task.num_rows, world_size)
    if precision is not None:
        plan = replace(plan, precision=precision)
    if plan.strategy.startswith("zero"):
        write_json(run.deepspeed_config, deepspeed_config(plan, config.optim.clip_norm))
    rank = int(os.environ.get("RANK", "0"))
    training = build_training(
        run, config, plan, task, attempt, score, {"data": "tiny"}, StopFlag(), Heartbeat(run, rank)
    )
    restore(training)
    return training


def train_tiny(path: Path, world_size: int, task: TinyTask, attempt: int = 1, **sections: Any) -> dict[str, Tensor]:
    """Train and return the final weights."""
    training = make_training(path, world_size, task, attempt, **sections)
    train(training)
    buffers = {name: buffer.clone() for name, buffer in training.engine.module.named_buffers()}
    return whole_weights(training.engine) | buffers


def curve(path: Path, key: str = "loss") -> list[float]:
    """One value of each step's training line; where a step stands twice the last attempt counts."""
    lines = [line for line in read_lines(RunDir(path).metrics) if line["split"] == "train"]
    values = {line["step"]: line[key] for line in sorted(lines, key=lambda line: line["attempt"])}
    assert list(values) == sorted(values)
    return [values[step] for step in sorted(values)]


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunDir(path).events.read_text().splitlines() if f'"{kind}"' in line]
