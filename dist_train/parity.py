"""Record what a training does step by step, whole, so that it can be held against the same training done otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.engine import Engine, StepOutcome
from dist_train.loop import Training, make_step, schedule_of, train
from dist_train.rundir import write_json


def record(training: Training) -> None:
    """Train, and write RUN/parity: losses, gradient norms and whole gradients of each step, the weights before and
    after, and what in the model keeps two ways of training it from being equal. On all ranks; rank 0 writes."""
    engine = training.engine
    obstacles = find_obstacles(training)
    before = _in_one_row(whole_weights(engine))
    recorder = Recorder(engine)
    train(training)
    after = _in_one_row(whole_weights(engine))
    if engine.rank == 0:
        folder = training.run.parity
        folder.mkdir(exist_ok=True)
        np.save(folder / "gradients.npy", np.stack(recorder.gradients))
        np.save(folder / "weights.npy", np.stack([before, after]))
        write_json(folder / "parity.json", {**recorder.curves(), "obstacles": obstacles})


class Recorder:
    """Stands before the engine's step, and keeps what comes by."""

    def __init__(self, engine: Engine) -> None:
        self.gradients: list[np.ndarray] = []
        """The whole gradient of each step, before clipping, its tensors in the order of their names."""
        self._outcomes: list[StepOutcome] = []
        self._engine, self._step = engine, engine.step
        engine.step = self._recorded  # type: ignore[method-assign]

    def _recorded(self, wishes: Tensor) -> StepOutcome:
        whole = self._engine.strategy.full_gradients()
        scale = 1.0 if self._engine.scaler is None else float(self._engine.scaler.scale)
        if self._engine.rank == 0:  # one copy of all whole gradients is enough
            flat = torch.cat([whole[name].detach().reshape(-1) for name in sorted(whole)])
            self.gradients.append((flat / scale).float().cpu().numpy())
        outcome = self._step(wishes)
        self._outcomes.append(outcome)
        return outcome

    def curves(self) -> dict[str, list[float]]:
        read = [outcome.read() for outcome in self._outcomes]
        return {"losses": [sums[0] for sums, *_ in read], "gradient_norms": [norm for _, norm, *_ in read]}


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """All weights by name on the CPU, whatever part of them this rank holds. A collective."""
    mine: list[Any] = [(held.name, held.shape, held.start, held.flat.cpu()) for held in engine.strategy.weights()]
    whole: dict[str, Tensor] = {}
    for parts in engine.gather_objects(mine):
        for name, shape, start, flat in parts:
            whole.setdefault(name, torch.zeros(shape)).view(-1)[start : start + len(flat)] = flat
    return whole


def _in_one_row(tensors: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]).numpy()


def has_batch_statistics(module: nn.Module) -> str | None:
    """The first BatchNorm layer that takes its statistics from the batch in training; None where there is none, or all
    are kept in evaluation mode."""
    found = (name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer.training)
    return next(found, None)


def find_obstacles(training: Training) -> list[str]:
    """Why two ways of training this model cannot be equal, in words."""
    engine, found = training.engine, []
    engine.module.train()
    normed = has_batch_statistics(engine.module)
    if normed is not None:
        found.append(
            f"BatchNorm ({normed}): its statistics are those of each rank's micro-batch; GroupNorm or LayerNorm have "
            "none"
        )
    rows = training.task.rows("train")
    batch = engine.to_device(make_step(training, rows, schedule_of(training, rows), 0).batches[0])
    losses = []
    with torch.no_grad(), engine.buffers_kept():
        for seed in (0, 1):
            torch.manual_seed(seed)
            losses.append(float(engine.forward(batch)))
    if losses[0] != losses[1]:
        found.append("dropout or other randomness inside the model: set it to 0 for this comparison")
    return found
