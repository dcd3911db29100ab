"""train(): the only place where an optimizer steps."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train import checkpoint_files
from dist_train.best import judge
from dist_train.checkpoint import held_state
from dist_train.config import RunConfig
from dist_train.data import DROPOUT, Schedule, derive_seed, partition, prefetch, row_seeds
from dist_train.engine import Engine, StepOutcome
from dist_train.errors import ConfigError, NumericError, Preempted
from dist_train.evaluate import evaluate, tell
from dist_train.events import log_event
from dist_train.fit import largest_shapes
from dist_train.heartbeat import Heartbeat
from dist_train.meter import Meter
from dist_train.optim import lr_at, set_lr
from dist_train.peak import StepPeak
from dist_train.plan import LaunchPlan
from dist_train.rundir import RunDir
from dist_train.save import Saver
from dist_train.score import Score, is_of_group
from dist_train.step_profile import StepProfile
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
    best_metric: str | None = None
    """What best_value is of; None, before the first one and in older checkpoints: the metric that was asked for."""
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
    state: TrainState
    ema: dict[str, Tensor] | None
    """The moving average of each range of the weights that this rank holds."""
    saver: Saver
    stop: StopFlag
    tracker: Tracker | None
    heartbeat: Heartbeat
    memory: StepPeak
    profile: StepProfile
    score: Score
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
    shapes: tuple[tuple[int, int], ...]
    """(rows, longest row) of this rank's micro-batches."""


@dataclass(frozen=True)
class Launched:
    """A step whose kernels run, or wait to, on the device."""

    step: int
    """Its number, from 1."""
    samples: int
    """Trained up to its end."""
    data: StepData
    lr: float
    outcome: StepOutcome


def train(training: Training) -> None:
    """Train from training.state to the end of the schedule. Preempted after a signal; all is saved."""
    try:
        _train(training)
    except NumericError:
        training.saver.finish()  # the ranks raise it alike; the save under way is from before
        raise


def _train(training: Training) -> None:
    config, plan, state, engine = training.config, training.plan, training.state, training.engine
    rows = training.task.rows("train")
    schedule = schedule_of(training, rows)
    last_step = min(plan.steps, config.train.stop_after_steps or plan.steps)
    if state.step >= last_step or state.stopped_early:
        return
    steps = prefetch(lambda step: make_step(training, rows, schedule, step), state.step, last_step)
    meter, saved_at, saved_step = Meter(), time.monotonic(), state.step
    engine.module.train()
    before: Launched | None = None
    for index, data in enumerate(_timed(steps, meter)):
        if index == 0:
            _seed_model(training, 0)
            engine.warm_up(engine.to_device(data.batches[0]))
            if plan.fits and config.train.micro_batch_size == "auto":
                probe_largest(training, rows)
        wants_save = _minutes_passed(config.checkpoint.every_minutes, saved_at)
        training.profile.at(index)
        with training.memory.around(index, state.step + 1, data.shapes):
            launched = _launch(training, schedule, data, wants_save)
        if index == 0:
            # A stop that was asked for during the start is heard at once.
            stop_asked, save_asked = _settle(training, launched, meter)
            before = None
        else:
            # The step before this one has run by now: to read what it came to waits for nothing.
            stop_asked, save_asked = _settle(training, before, meter)
            before = launched
        # A staged stop is no reason to evaluate: the stages together must do what one run does.
        evaluates = _evaluation_due(config, schedule, state.step, plan.steps)
        due = config.checkpoint.every_steps is not None and state.step % config.checkpoint.every_steps == 0
        if not (evaluates or due or save_asked or stop_asked or state.step == last_step):
            continue
        stopped_now, _ = _settle(training, before, meter)
        stop_asked, before = stop_asked or stopped_now, None
        since = meter.pause()
        training.profile.close()  # what follows is no step
        improved = evaluates and _evaluate(training)
        ended = state.step == last_step or state.stopped_early
        if (improved or due or save_asked or stop_asked or ended) and saved_step != state.step:
            save_checkpoint(training)
            saved_at, saved_step = time.monotonic(), state.step
        meter.resume(since)
        if ended or stop_asked:
            training.saver.finish()
        if ended:
            return
        if stop_asked:
            raise Preempted(f"stopped by a signal after step {state.step}; the checkpoint of that step is saved.")


def _timed(steps: Iterator[StepData], meter: Meter) -> Iterator[StepData]:
    """The steps, the time that each is waited for being counted. The first has had no step to hide behind."""
    for index in itertools.count():
        began = time.perf_counter()
        data = next(steps, None)
        if data is None:
            return
        if index > 0:
            meter.waited(time.perf_counter() - began)
        yield data


def schedule_of(training: Training, rows: Rows) -> Schedule:
    return Schedule(len(rows.ids), training.plan.global_batch_size, training.config.seed)


def save_checkpoint(training: Training) -> None:
    """Begin to save the present state; it is committed once every rank has written (see Saver)."""
    engine, state = training.engine, training.state
    meta = {
        "state": asdict(state),
        "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
        "fingerprints": training.fingerprints,
        "run": training.run.name,
    }
    held = held_state(engine.strategy, training.ema, engine.rank)
    training.saver.start(held, state.step, meta)


def make_saver(run: RunDir, engine: Engine, config: RunConfig) -> Saver:
    """The saver of a run: each commit is an event, and then those that need not be kept are removed."""

    def committed(step: int, folder: str) -> None:
        log_event(run.events, "checkpoint_committed", step=step, folder=folder)
        checkpoint_files.prune(run.checkpoints, config.checkpoint.keep_last)

    return Saver(run.checkpoints, engine, config.checkpoint.asynchronous, committed)


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
    shapes = tuple((len(part), int(lengths[part].max())) for part in parts[engine.rank] if len(part))
    weight = float(rows.weights[chosen].sum())
    return StepData(batches, rows.ids[chosen], weight, int(lengths.sum()), padded, shapes)


def _launch(training: Training, schedule: Schedule, data: StepData, wants_save: bool) -> Launched:
    """Forward, backward, agree, update: enqueued on the device, with nothing read back."""
    config, plan, state, engine = training.config, training.plan, training.state, training.engine
    losses = []
    engine.begin_step()
    for index, batch in enumerate(data.batches):
        _seed_model(training, index)
        last = index == len(data.batches) - 1
        losses.append(engine.backward(engine.to_device(batch), data.total_weight, last))
    lr = lr_at(state.step, plan.steps, config.optim)
    set_lr(engine.strategy.optimizer, lr, state.step)
    # One collective carries the loss and what the ranks must agree on.
    said = [float(bool(training.stop)), float(wants_save), *map(float, training.saver.wishes())]
    loss_sum = torch.stack(losses).double().sum(0, keepdim=True)
    wishes = torch.cat([loss_sum, torch.tensor(said, dtype=torch.float64).to(engine.device, non_blocking=True)])
    outcome = engine.step(wishes)
    if training.ema is not None and config.train.ema_decay is not None:
        _update_ema(training, average_decay(state.step, config.train.ema_decay))
    state.step += 1
    training.heartbeat.step = state.step
    state.samples = schedule.samples_before(state.step)
    return Launched(state.step, state.samples, data, lr, outcome)


def _settle(training: Training, launched: Launched | None, meter: Meter) -> tuple[bool, bool]:
    """Read what a step came to, on all ranks alike, and log it. Returns (stop, save): what the ranks agreed on."""
    if launched is None:
        return False, False
    config, plan, state, data = training.config, training.plan, training.state, launched.data
    (loss, stop, save, written, failed), gradient_norm, finite, at_bottom = launched.outcome.read()
    # fp16 overflows now and then while its scale finds its place: that counts once the scale can fall no further.
    state.nonfinite_in_a_row = 0 if finite else state.nonfinite_in_a_row + int(at_bottom)
    meter.add(len(data.ids), data.useful, data.padded)
    if not finite:
        _report_nonfinite(training, launched)
    step = launched.step
    if training.tracker is not None and (step % config.track.log_every_steps == 0 or step == plan.steps):
        values = {"loss": loss / data.total_weight, "lr": launched.lr, "grad_norm": gradient_norm, **meter.read()}
        training.tracker.log("train", step, launched.samples, values)
    training.saver.heard(written, failed)
    return stop > 0, save > 0


def probe_largest(training: Training, rows: Rows) -> None:
    """Try the largest micro-batches that the plan allows, before hours depend on them. ConfigError when memory ends."""
    plan, engine = training.plan, training.engine
    first, later = largest_shapes(
        rows.lengths, plan.global_batch_size, training.config.seed, plan.world_size, plan.micro_batches,
        plan.micro_batch_size,
    )  # fmt: skip
    largest = [max(shapes, key=lambda shape: shape[0] * shape[1]) for shapes in (first, later) if shapes]
    batches = []
    for count, length in largest:
        batch = training.task.example_batch(count, length)
        batch["weight"] = torch.ones(count)
        batches.append(engine.to_device(batch))
    try:
        engine.probe(batches)
    except torch.OutOfMemoryError as error:
        rows_tried = max(count for count, _ in largest)
        raise ConfigError(
            f"the planned micro-batches of up to {rows_tried} rows do not fit after all: {error}\n"
            f"Set train.micro_batch_size={max(1, rows_tried // 2)}; it was auto, chosen by the plan."
        ) from error


def _seed_model(training: Training, micro_batch: int) -> None:
    """Dropout is a pure function of seed, step, micro-batch and rank: there is no generator state to save."""
    state, engine = training.state, training.engine
    engine.seed(derive_seed(DROPOUT, training.config.seed, state.step, micro_batch, engine.rank))


def _report_nonfinite(training: Training, launched: Launched) -> None:
    state, step = training.state, launched.step
    if training.engine.rank == 0:
        ids = [int(row) for row in launched.data.ids]
        log_event(training.run.events, "nonfinite_step", step=step, rows=ids, in_a_row=state.nonfinite_in_a_row)
    if state.nonfinite_in_a_row >= _MOST_NONFINITE:
        raise NumericError(
            f"the gradient was not finite in {_MOST_NONFINITE} steps in a row, up to step {step}; the weights "
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
    config, state, engine, score = training.config, training.state, training.engine, training.score
    with averaged_weights(training):
        rows, progress = training.task.rows("validation"), tell(engine, training.run.events, "validation")
        outputs = evaluate(engine, training.task, rows, config.eval.batch_size, progress)
    metrics: dict[str, float] = {}
    if engine.rank == 0:
        metrics = _point(score, training.task.predictions("validation", outputs))
    metrics = engine.broadcast(metrics)
    asked = config.eval.metric or score.metric
    if asked not in metrics:
        raise ConfigError(f"{asked} is to pick the best checkpoint, but the recipe measures {', '.join(metrics)}.")
    verdict = judge(state, asked, metrics, score)
    name = verdict.metric
    patience = config.eval.patience
    state.stopped_early = patience is not None and state.evaluations_without_gain >= patience
    if training.tracker is not None:
        if verdict.replaced:
            _progress(training, f"{asked} is not defined on the validation split: {name} picks the best step instead")
        if state.stopped_early:
            _progress(training, f"stopping early: {patience} evaluations without a better {name} (eval.patience)")
        training.tracker.log("validation", state.step, state.samples, metrics)
        told = {"metric": name, "value": verdict.value, "improved": verdict.improved}
        log_event(training.run.events, "evaluated", step=state.step, **told)
    return verdict.improved


def _progress(training: Training, text: str) -> None:
    log_event(training.run.events, "progress", message=text)


def _point(score: Score, table: Any) -> dict[str, float]:
    """The metrics of all rows, those that may pick the best first; what the training minimises is called loss, as in
    the training's own lines."""
    values = {name: value for name, value in score.point(table).items() if not is_of_group(name)}
    first = {name: values[name] for name in score.metrics if name in values}
    return {**({"loss": values[score.loss]} if score.loss else {}), **first, **values}


@contextlib.contextmanager
def averaged_weights(training: Training) -> Iterator[None]:
    """Within it the module holds the moving average of the weights, if there is one."""
    _swap(training)
    try:
        yield
    finally:
        _swap(training)


@torch.no_grad()
def _swap(training: Training) -> None:
    if training.ema is None:
        return
    with training.engine.strategy.changing_weights(for_good=False) as weights:
        for entry in weights:
            held = entry.flat.clone()
            entry.flat.copy_(training.ema[entry.name])
            training.ema[entry.name].copy_(held)


def average_decay(step: int, decay: float) -> float:
    """The decay of the moving average in step `step` (from 0): at first lower, so that a short training's average is
    not the weights that it began with."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def _update_ema(training: Training, decay: float) -> None:
    """A skipped step counts as one that changed no weight."""
    assert training.ema is not None
    weights = [entry for entry in training.engine.strategy.weights() if entry.flat.numel()]
    torch._foreach_lerp_([training.ema[entry.name] for entry in weights], [e.flat for e in weights], 1.0 - decay)
