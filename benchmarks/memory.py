"""Predicted against measured peak of a training step, on CPU ranks: one JSON line a configuration, then the errors.

    python -m benchmarks.memory                # all 24, what fine-tuning adds, the states of large models: minutes
    python -m benchmarks.memory held_out zero3 # those whose name holds each word; states: bytes between passes alone

Eight of the 24 were chosen before the formulas were tuned on the other sixteen, and never used for that.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.task import Batch, weighted_sum
from recipes.ticket_routing.config import ModelConfig
from recipes.ticket_routing.encoder import LSTMEncoder, TransformerEncoder
from recipes.ticket_routing.model import TicketClassifier
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    model: str
    strategy: str
    world_size: int
    rows: int
    micro_batches: int
    length: int
    precision: str = "fp32"
    checkpointing: bool = False
    ema: bool = False
    held_out: bool = False
    tuned: str = ""
    """A key of TUNED."""

    @property
    def name(self) -> str:
        words = [self.model, f"{self.strategy}x{self.world_size}", f"{self.micro_batches}x{self.rows}x{self.length}"]
        words += [self.precision, *["checkpointing"] * self.checkpointing, *["ema"] * self.ema]
        return " ".join([*words, *["held_out"] * self.held_out, *[self.tuned] * bool(self.tuned)])


TRANSFORMERS = {
    "small": ({"layers": 2, "width": 128, "heads": 4, "feedforward": 512}, 12_000),
    "medium": ({"layers": 6, "width": 256, "heads": 8, "feedforward": 1024}, 12_000),
    "large": ({"layers": 12, "width": 512, "heads": 8, "feedforward": 2048}, 20_000),
    "huge": ({"layers": 12, "width": 640, "heads": 8, "feedforward": 2560}, 20_000),
}

CASES = (
    # Tuned on.
    Case("small", "single", 1, 64, 1, 192),
    Case("medium", "single", 1, 16, 2, 128, ema=True),
    Case("medium", "single", 1, 32, 1, 128, precision="bf16"),
    Case("large", "single", 1, 8, 1, 128, checkpointing=True),
    Case("lstm", "single", 1, 32, 1, 96),
    Case("cnn", "single", 1, 32, 1, 32),
    Case("medium", "ddp", 2, 16, 1, 128),
    Case("medium", "ddp", 2, 8, 3, 128, precision="bf16"),
    Case("large", "zero1", 2, 4, 2, 64),
    Case("medium", "zero1", 4, 8, 1, 128),
    Case("large", "zero2", 2, 4, 2, 64),
    Case("medium", "zero2", 4, 8, 1, 64, ema=True),
    Case("large", "zero3", 2, 4, 1, 64),
    Case("medium", "zero3", 4, 8, 2, 128, precision="bf16"),
    Case("large", "fsdp", 2, 4, 1, 64),
    Case("medium", "fsdp", 4, 8, 2, 128, precision="bf16"),
    # Held out.
    Case("large", "single", 1, 4, 4, 96, precision="bf16", held_out=True),
    Case("medium", "single", 1, 48, 1, 160, checkpointing=True, ema=True, held_out=True),
    Case("lstm", "ddp", 2, 24, 2, 64, held_out=True),
    Case("cnn", "ddp", 4, 48, 1, 48, held_out=True),
    Case("large", "zero1", 4, 2, 1, 96, precision="bf16", held_out=True),
    Case("medium", "zero2", 2, 12, 3, 96, checkpointing=True, held_out=True),
    Case("large", "zero3", 4, 2, 2, 96, checkpointing=True, held_out=True),
    Case("large", "fsdp", 2, 4, 3, 96, precision="bf16", checkpointing=True, ema=True, held_out=True),
)

# Many parameter groups, and frozen layers.
TUNED: dict[str, dict[str, Any]] = {
    "": {},
    "decay": {"layer_decay": 0.9},
    "frozen_half": {"layer_decay": 0.9, "freeze": 3},
    "frozen_backbone": {"freeze": "backbone"},
}
FINE_TUNED = tuple(
    Case("medium", strategy, 2, 8, 1, 128, tuned=tuned)
    for tuned in ("decay", "frozen_half", "frozen_backbone")
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
)

# Weights, gradients and optimizer state of 72 M parameters, after a backward pass.
STATES = tuple(
    Case("huge", strategy, world_size, 1, 1, 16)
    for strategy in ("zero1", "zero2", "zero3", "fsdp")
    for world_size in (2, 4)
)


class Classifier(nn.Module):
    """A small convolutional network with group norms, over images of any size."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 256)
        layers = [self._layer(*pair) for pair in itertools.pairwise(widths)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 5)

    @staticmethod
    def _layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())

    def forward(self, batch: Batch) -> Tensor:
        logits = self.head(self.body(batch["image"]).mean((2, 3))).float()
        return weighted_sum(nn.functional.cross_entropy(logits, batch["label"], reduction="none"), batch["weight"])


class Task:
    """A model with batches of any size, without data."""

    def __init__(self, model: str) -> None:
        self.model = model

    def build_model(self) -> nn.Module:
        if self.model == "cnn":
            return Classifier()
        if self.model == "lstm":
            return TicketClassifier(LSTMEncoder(ModelConfig(kind="lstm", layers=2, width=256), 12_000, 8))
        options, vocabulary = TRANSFORMERS[self.model]
        return TicketClassifier(TransformerEncoder(ModelConfig(**options), vocabulary, 192, 8))

    def is_head(self, name: str) -> bool:
        return "head." in name

    def example_batch(self, rows: int, length: int) -> Batch:
        labels = torch.zeros(rows, dtype=torch.int64)
        if self.model == "cnn":
            return {"image": torch.rand(rows, 3, length, length), "label": labels}
        tokens = torch.ones(rows, length, dtype=torch.int64)
        return {"token_ids": tokens, "token_mask": tokens > 0, "label": labels}


def measure_case(case: Case) -> dict[str, int]:
    """On one rank: the measured peak of a step, and the bytes that are held after a backward pass."""
    from dist_train.deepspeed_config import deepspeed_config
    from dist_train.engine import Engine
    from dist_train.layers import prepare_layers
    from dist_train.peak import live_tensor_bytes, measured

    plan, optim = launch_plan(case), optimizer_config(case)
    deepspeed = deepspeed_config(plan, optim.clip_norm) if case.strategy.startswith("zero") else None
    engine = Engine(plan, 300, deepspeed)
    task = Task(case.model)
    torch.manual_seed(0)
    model = task.build_model()
    engine.prepare(model, optim, prepare_layers(model, task.is_head, optim))
    held = {entry.name: entry.flat.clone() for entry in engine.strategy.weights()} if case.ema else {}
    batches = [task.example_batch(case.rows, length) for length in case_lengths(case)]
    for batch in batches:
        batch["weight"] = torch.ones(case.rows)

    def backward() -> None:
        for index, batch in enumerate(batches):
            engine.backward(batch, float(case.rows * case.micro_batches * case.world_size), index == len(batches) - 1)

    def step() -> None:
        backward()
        engine.step(torch.zeros(1, dtype=torch.float64))

    engine.module.train()
    engine.warm_up(batches[0])
    step()
    step()
    with measured(engine.device) as peak:
        step()
    backward()
    state = live_tensor_bytes()
    del held
    return {"peak": peak.peak, "state": state}


def case_lengths(case: Case) -> list[int]:
    """Micro-batches come longest first, as the partition makes them; images have one size."""
    if case.model == "cnn":
        return [case.length] * case.micro_batches
    return [
        max(1, case.length * (case.micro_batches - index) // case.micro_batches) for index in range(case.micro_batches)
    ]


def launch_plan(case: Case) -> Any:
    from dist_train.plan import LaunchPlan

    size = case.world_size * case.rows * case.micro_batches
    return LaunchPlan(
        device="cpu",
        strategy=case.strategy,
        precision=case.precision,
        nodes=1,
        processes_per_node=case.world_size,
        threads_per_process=1,
        gpu_ids=(),
        global_batch_size=size,
        micro_batch_size=case.rows,
        micro_batches=case.micro_batches,
        rows=size,
        steps_per_epoch=1,
        steps=3,
        activation_checkpointing=case.checkpointing,
    )


def optimizer_config(case: Case) -> Any:
    from dist_train.config import OptimConfig

    return OptimConfig(**TUNED[case.tuned])


def profile_and_setting(case: Case) -> tuple[Any, Any]:
    from dist_train.activation_profile import measure
    from dist_train.memory_layout import Setting

    span = (case.length, case.length) if case.model == "cnn" else (1, 192 if case.model != "lstm" else 128)
    profile = measure(Task(case.model), case.precision, case.checkpointing, span, optimizer_config(case))
    setting = Setting(
        strategy=case.strategy,
        world_size=case.world_size,
        micro_batches=case.micro_batches,
        first=((case.rows, case.length),),
        later=tuple((case.rows, length) for length in case_lengths(case)[1:]),
        evaluation=(1, case.length),
        optim=optimizer_config(case),
        ema=case.ema,
    )
    return profile, setting


def main(words: list[str]) -> int:
    from dist_train.memory import estimate, state_bytes

    errors: list[tuple[bool, float]] = []
    for case in [*CASES, *FINE_TUNED, *STATES]:
        is_state = case in STATES
        if not all(word in (*case.name.split(), case.strategy, "states" if is_state else "peaks") for word in words):
            continue
        answers = run_ranks(case.world_size, measure_case, case, timeout_s=400)
        profile, setting = profile_and_setting(case)
        if is_state:
            predicted, measured = state_bytes(profile, setting), max(answer["state"] for answer in answers)
        else:
            predicted, measured = estimate(profile, setting).peak, max(answer["peak"] for answer in answers)
        error = predicted / measured - 1
        if case in CASES:
            errors.append((case.held_out, error))
        what = "state" if is_state else "peak"
        line = {"case": case.name, "of": what, "predicted": predicted, "measured": measured, "error": round(error, 4)}
        print(json.dumps(line), flush=True)
    for held_out in (False, True):
        some = [error for kind, error in errors if kind == held_out]
        if some:
            mean, lowest = sum(map(abs, some)) / len(some), min(some)
            print(json.dumps({"held_out": held_out, "mean_error": round(mean, 4), "lowest": round(lowest, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
