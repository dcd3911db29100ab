"""Put a training together, save it, and go on from the newest checkpoint that verifies."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, checkpoint_files
from dist_train.config import RunConfig
from dist_train.data import INIT, derive_seed
from dist_train.engine import Engine
from dist_train.errors import CheckpointError, ConfigError
from dist_train.events import log_event, read_lines
from dist_train.heartbeat import Heartbeat
from dist_train.init_from import record_start
from dist_train.layers import prepare_layers
from dist_train.loop import Training, TrainState, make_saver
from dist_train.parameter_groups import describe_groups
from dist_train.peak import StepPeak
from dist_train.plan import LaunchPlan
from dist_train.rundir import RunDir, read_json
from dist_train.score import Score
from dist_train.step_profile import StepProfile
from dist_train.stop import StopFlag
from dist_train.task import Task
from dist_train.track import Tracker


def build_training(
    run: RunDir,
    config: RunConfig,
    plan: LaunchPlan,
    task: Task,
    attempt: int,
    score: Score,
    fingerprints: dict[str, str],
    stop: StopFlag,
    heartbeat: Heartbeat,
) -> Training:
    """Engine, model, optimizer and tracker of this rank, at step 0. ConfigError when the world is not the planned one.

    fingerprints: what the result depends on beside the config, by name; a resume compares them.
    """
    deepspeed = read_json(run.deepspeed_config) if plan.strategy.startswith("zero") else None
    engine = Engine(plan, config.parallel.timeout_s, deepspeed)
    if engine.world_size != plan.world_size:
        raise ConfigError(
            f"{engine.world_size} ranks were started, but the plan has {plan.world_size}: start the run with "
            "dist-train, or set parallel.processes_per_node to what your launcher starts."
        )
    if engine.device.type != plan.device:
        raise ConfigError(
            f"the plan is for {plan.device}, but torch offers {engine.device.type} here: `dist-train doctor` says what "
            "is missing. To train on the CPU hide the GPUs with CUDA_VISIBLE_DEVICES= (empty)."
        )
    torch.manual_seed(derive_seed(INIT, config.seed))
    model = task.build_model()
    _take_over(run, engine, task, model)
    layers = prepare_layers(model, getattr(task, "is_head", None), config.optim)
    named = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    if engine.rank == 0:
        for line in describe_groups(named, layers, config.optim, plan.steps):
            print(line, flush=True)
            log_event(run.events, "progress", message=line)
    engine.prepare(model, config.optim, layers)
    ema = None
    if config.train.ema_decay is not None:
        ema = {entry.name: entry.flat.clone() for entry in engine.strategy.weights()}
    tracker = Tracker(run, config, attempt) if engine.rank == 0 else None
    saver = make_saver(run, engine, config)
    return Training(
        config=config,
        plan=plan,
        run=run,
        engine=engine,
        task=task,
        state=TrainState(),
        ema=ema,
        saver=saver,
        stop=stop,
        tracker=tracker,
        heartbeat=heartbeat,
        memory=StepPeak(engine.device),
        profile=StepProfile(engine, run.profile, config.train.profile),
        score=score,
        fingerprints=fingerprints,
    )


def _take_over(run: RunDir, engine: Engine, task: Task, model: nn.Module) -> None:
    """The weights of an earlier run, on every rank alike. Once there is a checkpoint they come from it: what this run
    started from may be gone by then."""
    take_over = getattr(task, "take_over", None)
    if take_over is None:
        return
    begun = engine.broadcast(bool(checkpoint_files.committed_steps(run.checkpoints)) if engine.rank == 0 else None)
    taken = None if begun else take_over(model)
    if taken is not None and engine.rank == 0:
        text = record_start(run, taken)
        print(text, flush=True)
        log_event(run.events, "progress", message=text)


def restore(training: Training, accepted: Collection[str] = ()) -> None:
    """Load the newest checkpoint that verifies, if there is one; rank 0 looks, all load.

    CheckpointError when one was committed and none verifies; ConfigError when a fingerprint differs that is not in
    `accepted`.
    """
    run, engine = training.run, training.engine
    if engine.rank == 0:
        checkpoint_files.clean(run.checkpoints)  # before the others can begin to save
    manifest = engine.broadcast(_choose_checkpoint(run) if engine.rank == 0 else None)
    if isinstance(manifest, str):
        raise CheckpointError(manifest)
    if manifest is None:
        return
    _compare(training.fingerprints, manifest["fingerprints"], accepted)
    folder = checkpoint_files.step_folder(run.checkpoints, manifest["step"])
    # 1. weights and buffers  2. optimizer  3. moving average  4. loss scale  5. counters, the data position among them
    reader = checkpoint.Reader(folder, manifest)
    checkpoint.load_weights(engine.strategy, reader, use_ema=False)
    restored = checkpoint.load_optimizer(engine.strategy, reader)
    if training.ema is not None:
        checkpoint.load_average(engine.strategy, reader, training.ema)
    if engine.scaler is not None and manifest["scaler"]:
        engine.scaler.load_state_dict(manifest["scaler"])
    training.state = TrainState(**manifest["state"])
    summary = (
        f"weights, {restored} optimizer tensors, {'moving average, ' if training.ema else ''}best metric and position "
        f"(sample {training.state.samples}) restored; saved by {manifest['world_size']} rank(s), now "
        f"{engine.world_size}; order, learning rate and dropout follow from the step; nothing was dropped"
    )
    if engine.rank == 0:
        log_event(run.events, "resumed", step=manifest["step"], summary=summary)


def _compare(now: dict[str, str], then: dict[str, str], accepted: Collection[str]) -> None:
    changed = [name for name in now if now[name] != then[name] and name not in accepted]
    if changed:
        words = " and ".join(changed)
        raise ConfigError(
            f"the {words} changed since the checkpoint was saved, so the run would not go on as it began.\n"
            "Bring back what was, or go on all the same with: dist-train resume RUN "
            + " ".join(f"--accept {name}" for name in changed)
        )


def _choose_checkpoint(run: RunDir) -> dict[str, Any] | str | None:
    """The manifest to resume from, None for a fresh start, or why there is none although one was committed."""
    manifest, damages = checkpoint_files.newest_valid(run.checkpoints)
    for damage in damages:
        print(f"damaged checkpoint: {damage}", flush=True)
        log_event(run.events, "checkpoint_damaged", file=str(damage.file), what=damage.what)
    if manifest is None:
        if damages or any(record["event"] == "checkpoint_committed" for record in read_lines(run.events)):
            return "no checkpoint verifies, although one was committed:\n" + "\n".join(map(str, damages))
        return None
    for damage in damages:
        folder = damage.file.parent
        if folder.exists():
            checkpoint_files.set_aside(folder)
    return manifest
