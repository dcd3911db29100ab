"""train(): the only place where an optimizer steps."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train import checkpoint, checkpoint_files
from dist_train.config import RunConfig
from dist_train.data import DROPOUT, Schedule, derive_seed, partition, prefetch, row_seeds
from dist_train.engine import Engine
from dist_train.errors import NumericError, Preempted
from dist_train.evaluate import evaluate
from dist_train.events import log_event
from dist_train.heartbeat import Heartbeat
from dist_train.meter import Meter
from dist_train.optim import lr_at, set_lr
from dist_train.plan import LaunchPlan
from dist_train.rundir import RunDir
from dist_train.stop import StopFlag
from dist_train.task import Batch, Rows, Task
from dist_train.track import Tracker

# Steps in a row with a gradient that is not finite after which the run gives up.
_MOST_NONFINITE = 3


@dataclass
class TrainState:
    """The loop's counters, saved together with the tensors."""

    step: int = 0
    samples: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    nonfinite_in_a_row: int = 0
    stopped_early: bool = False


@dataclass
class Training:
    """What the loop works on; built by worker.py, on every rank."""

    config: RunConfig
    plan: LaunchPlan
    run: RunDir
    engine: Engine
    task: Task
    optimizer: torch.optim.Optimizer
    state: TrainState
    ema: dict[str, Tensor] | None
    stop: StopFlag
    tracker: Tracker | None
    heartbeat: Heartbeat
    fingerprints: dict[str, str]
    """What the result depends on beside the config, by name."""


@dataclass(frozen=True)
class StepData:
    """One step's share of this rank, with what is known of the whole step."""

    batches: list[Batch]
    ids: np.ndarray
    total_weight: float
    useful: int
    padded: int


def train(training: Training) -> None:
    """Train from training.state to the end of the schedule. Preempted after a signal; all is saved."""
    config, plan, state, engine = training.config, training.plan, training.state, training.engine
    rows = training.task.rows("train")
    schedule = Schedule(len(rows.ids), plan.global_batch_size, config.seed)
    last_step = min(plan.steps, config.train.stop_after_steps or plan.steps)
    if state.step >= last_step or state.stopped_early:
        return
    steps = prefetch(lambda step: make_step(training, rows, schedule, step), state.step, last_step)
    meter, saved_at, saved_step = Meter(), time.monotonic(), state.step
    engine.module.train()
    for index, data in enumerate(steps):
        if index == 0:
            _seed_model(training, 0)
            engine.warm_up(engine.to_device(data.batches[0]))
        wants_save = _minutes_passed(config.checkpoint.every_minutes, saved_at)
        stop_asked, save_asked = _one_step(training, schedule, data, meter, wants_save)
        since = meter.pause()
        ended = state.step == last_step
        improved = False
        # A staged stop is no reason to evaluate: the stages together must do what one run does.
        if _evaluation_due(config, schedule, state.step, plan.steps):
            improved = _evaluate(training)
            ended = ended or state.stopped_early
        due = config.checkpoint.every_steps is not None and state.step % config.checkpoint.every_steps == 0
        if (improved or due or save_asked or stop_asked or ended) and saved_step != state.step:
            save_checkpoint(training)
            saved_at, saved_step = time.monotonic(), state.step
        meter.resume(since)
        if ended:
            return
        if stop_asked:
            raise Preempted(f"stopped by a signal after step {state.step}; the checkpoint of that step is saved.")


def save_checkpoint(training: Training) -> None:
    """Commit a checkpoint of the present state, then remove those that need not be kept."""
    run, engine, state = training.run, training.engine, training.state
    tensors = checkpoint.named_state(engine.module, training.optimizer, training.ema)
    meta = {
        "state": asdict(state),
        "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
        "fingerprints": training.fingerprints,
        "run": run.name,
    }

    def committed(folder: str) -> None:
        log_event(run.events, "checkpoint_committed", step=state.step, folder=folder)
        checkpoint_files.prune(run.checkpoints, training.config.checkpoint.keep_last)

    checkpoint.save(run.checkpoints, engine, tensors, state.step, meta, committed)


def make_step(training: Training, rows: Rows, schedule: Schedule, step: int) -> StepData:
    """Collate this rank's micro-batches of optimizer step `step` (from 0)."""
    plan, engine = training.plan, training.engine
    chosen = schedule.rows_of(step)
    lengths = np.asarray(rows.lengths[chosen], dtype=np.int64)
    micro_batches = max(1, -(-plan.micro_batches * len(chosen) // plan.global_batch_size))
    parts = partition(lengths, engine.world_size, micro_batches, plan.micro_batch_size)
    epoch = schedule.epoch_of(step)
    batches = []
    for part in parts[engine.rank]:
        # A rank with no rows runs one whose loss counts nothing: the others wait for its collectives.
        indices = chosen[part] if len(part) else chosen[:1]
        ids = rows.ids[indices]
        batch = training.task.collate(rows.take(indices), row_seeds(training.config.seed, epoch, ids))
        weights = rows.weights[indices] if len(part) else np.zeros(1)
        batch["weight"] = torch.from_numpy(np.ascontiguousarray(weights)).float()
        batches.append(batch)
    padded = sum(len(part) * int(lengths[part].max()) for rank in parts for part in rank if len(part))
    return StepData(batches, rows.ids[chosen], float(rows.weights[chosen].sum()), int(lengths.sum()), padded)


def _one_step(
    training: Training, schedule: Schedule, data: StepData, meter: Meter, wants_save: bool
) -> tuple[bool, bool]:
    """Forward, backward, agree, update, log. Returns what the ranks agreed on: (stop, save)."""
    config, plan, state, engine = training.config, training.plan, training.state, training.engine
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for index, batch in enumerate(data.batches):
        _seed_model(training, index)
        last = index == len(data.batches) - 1
        loss_sum += engine.backward(engine.to_device(batch), data.total_weight, last).double()
    # One collective carries the loss and both wishes; the gradients are already summed.
    loss, stop, save = engine.sum_over_ranks([float(loss_sum), float(bool(training.stop)), float(wants_save)])
    gradient_norm = engine.clip(training.optimizer, config.optim.clip_norm)
    finite = bool(np.isfinite(gradient_norm))
    lr = lr_at(state.step, plan.steps, config.optim)
    set_lr(training.optimizer, lr)
    engine.step(training.optimizer, finite)
    if finite and training.ema is not None and config.train.ema_decay is not None:
        _update_ema(training.ema, engine.module, config.train.ema_decay)
    state.step += 1
    training.heartbeat.step = state.step
    state.samples = schedule.samples_before(state.step)
    # fp16 overflows now and then while its scale finds its place: that counts once the scale can fall no further.
    hopeless = not finite and (engine.scaler is None or engine.scaler.get_scale() <= 1.0)
    state.nonfinite_in_a_row = 0 if finite else state.nonfinite_in_a_row + int(hopeless)
    meter.add(len(data.ids), data.useful, data.padded)
    if not finite:
        _report_nonfinite(training, data)
    if training.tracker is not None and (state.step % config.track.log_every_steps == 0 or state.step == plan.steps):
        values = {"loss": loss / data.total_weight, "lr": lr, "grad_norm": gradient_norm, **meter.read()}
        training.tracker.log("train", state.step, state.samples, values)
    return stop > 0, save > 0


def _seed_model(training: Training, micro_batch: int) -> None:
    """Dropout is a pure function of seed, step, micro-batch and rank: there is no generator state to save."""
    state, engine = training.state, training.engine
    torch.manual_seed(derive_seed(DROPOUT, training.config.seed, state.step, micro_batch, engine.rank))


def _report_nonfinite(training: Training, data: StepData) -> None:
    state = training.state
    if training.engine.rank == 0:
        ids = [int(row) for row in data.ids[:64]]
        log_event(training.run.events, "nonfinite_step", step=state.step, rows=ids, in_a_row=state.nonfinite_in_a_row)
    if state.nonfinite_in_a_row >= _MOST_NONFINITE:
        raise NumericError(
            f"the gradient was not finite in {_MOST_NONFINITE} steps in a row, up to step {state.step}; the weights "
            "were not touched by them, and the last checkpoint is from before.\nThe rows of these steps are in "
            f"{training.run.events} (nonfinite_step). Start a new run with a lower optim.lr or in fp32."
        )


def _evaluation_due(config: RunConfig, schedule: Schedule, step: int, last_step: int) -> bool:
    period = config.eval.every_steps or schedule.steps_per_epoch
    return step == last_step or step % period == 0


def _minutes_passed(every_minutes: float | None, since: float) -> bool:
    return every_minutes is not None and time.monotonic() - since >= 60 * every_minutes


def _evaluate(training: Training) -> bool:
    """Score the validation split and keep the best in the state. True when this was better than all before."""
    config, state, engine, task = training.config, training.state, training.engine, training.task
    with averaged_weights(training):
        outputs = evaluate(engine, task, task.rows("validation"), config.eval.batch_size)
    metrics: dict[str, float] = {}
    if engine.rank == 0:
        metrics = task.metrics(task.predictions("validation", outputs))
    metrics = engine.broadcast(metrics)
    name = config.eval.metric or task.metric
    if name not in metrics:
        raise KeyError(f"eval.metric is {name}, but this recipe has {', '.join(sorted(metrics))}")
    value = metrics[name]
    improved = state.best_value is None or value > state.best_value
    if improved:
        state.best_value, state.best_step, state.evaluations_without_gain = value, state.step, 0
    else:
        state.evaluations_without_gain += 1
    patience = config.eval.patience
    state.stopped_early = patience is not None and state.evaluations_without_gain >= patience
    if training.tracker is not None:
        if state.stopped_early:
            text = f"stopping early: {patience} evaluations without a better {name} (eval.patience)"
            log_event(training.run.events, "progress", message=text)
        training.tracker.log("validation", state.step, state.samples, metrics)
        log_event(training.run.events, "evaluated", step=state.step, metric=name, value=value, improved=improved)
    return improved


class averaged_weights:  # noqa: N801 - used as a with statement
    """Within it the module holds the moving average of the weights, if there is one."""

    def __init__(self, training: Training) -> None:
        self.module, self.ema = training.engine.module, training.ema

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exc_info: Any) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            if self.ema is not None:
                held = parameter.clone()
                parameter.copy_(self.ema[name])
                self.ema[name].copy_(held)


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], module: torch.nn.Module, decay: float) -> None:
    names = [name for name, _ in module.named_parameters()]
    torch._foreach_lerp_([ema[name] for name in names], list(module.parameters()), 1.0 - decay)
