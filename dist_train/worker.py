"""What each rank runs: python -m dist_train.worker RUN_DIR."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_train.errors import CheckpointError, ConfigError, CrashError, ToolkitError
from dist_train.events import current_attempt, log_event
from dist_train.rundir import RunDir

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run this rank to its end. Returns the exit code; the cause of a failure is in events.jsonl."""
    run = RunDir.existing(arguments[0])
    rank = int(os.environ.get("RANK", "0"))
    _die_with_parent()
    _redirect_output(run.rank_log(rank))
    attempt = current_attempt(run.events)
    log_event(run.events, "rank_started", attempt=attempt, rank=rank, pid=os.getpid(), host=os.uname().nodename)
    try:
        run_rank(run, attempt, tuple(arguments[1:]))
    except ToolkitError as error:
        return _report(run, attempt, rank, error)
    except BaseException as error:
        traceback.print_exc()
        crash = CrashError(f"rank {rank}: {type(error).__name__}: {error}\nThe traceback is in {run.rank_log(rank)}.")
        return _report(run, attempt, rank, crash)
    log_event(run.events, "rank_finished", attempt=attempt, rank=rank)
    return 0


def run_rank(run: RunDir, attempt: int, arguments: tuple[str, ...] = ()) -> None:
    """Config, task, engine, resume, train, finish: in this order, on every rank.

    arguments: --accept=code goes on with changed code; --evaluate=CHECKPOINT trains nothing.
    """
    from dist_train.config_io import load_run_config
    from dist_train.finish import finish
    from dist_train.loop import train
    from dist_train.recipe import load_recipe

    accepted = {word.removeprefix("--accept=") for word in arguments if word.startswith("--accept=")}
    evaluate = next((word.removeprefix("--evaluate=") for word in arguments if word.startswith("--evaluate=")), None)
    config = load_run_config(run)
    recipe = load_recipe(config.recipe)
    training = _build(run, config, recipe, attempt)
    try:
        _resume(training, _fingerprints(run, recipe), accepted)
        if evaluate is None:
            train(training)
        finish(training, recipe, evaluate or "best")
    finally:
        training.engine.close()


def _build(run: RunDir, config: Any, recipe: Any, attempt: int) -> Any:
    import json

    import torch

    from dist_train.data import INIT, derive_seed
    from dist_train.engine import Engine
    from dist_train.loop import Training, TrainState
    from dist_train.optim import make_optimizer
    from dist_train.plan import LaunchPlan
    from dist_train.stop import StopFlag
    from dist_train.track import Tracker

    plan = LaunchPlan.from_json(json.loads(run.plan.read_text()))
    stop = StopFlag()
    stop.install()
    engine = Engine(plan.device, plan.precision, config.parallel.timeout_s)
    if engine.world_size != plan.world_size:
        raise ConfigError(
            f"{engine.world_size} ranks were started, but the plan has {plan.world_size}: start the run with "
            "dist-train, or set parallel.processes_per_node to what your launcher starts."
        )
    task = recipe.task.make_task(config, Path(json.loads(run.data_facts.read_text())["folder"]))
    torch.manual_seed(derive_seed(INIT, config.seed))
    engine.prepare(task.build_model())
    optimizer = make_optimizer(engine.module, config.optim)
    ema = None
    if config.train.ema_decay is not None:
        ema = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    tracker = Tracker(run, config, attempt) if engine.rank == 0 else None
    training = Training(config, plan, run, engine, task, optimizer, TrainState(), ema, stop, tracker, lambda: None)
    fingerprints = _fingerprints(run, recipe)
    training.save = lambda: _save(training, fingerprints)
    return training


def _fingerprints(run: RunDir, recipe: Any) -> dict[str, str]:
    """What a checkpoint was made with: a resume compares them."""
    import hashlib
    import json

    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(recipe.config.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"code": digest.hexdigest(), "data": json.loads(run.data_facts.read_text())["fingerprint"]}


def _save(training: Any, fingerprints: dict[str, str]) -> None:
    from dist_train import checkpoint, checkpoint_files

    run, engine, state = training.run, training.engine, training.state
    tensors = checkpoint.named_state(engine.module, training.optimizer, training.ema)
    scale = None if engine.scaler is None else engine.scaler.state_dict()

    def committed(folder: str) -> None:
        log_event(run.events, "checkpoint_committed", step=state.step, folder=folder)
        keep = [state.best_step] if state.best_step is not None else []
        checkpoint_files.prune(run.checkpoints, training.config.checkpoint.keep_last, keep)

    meta = {"state": asdict(state), "scaler": scale, "fingerprints": fingerprints, "run": run.name}
    checkpoint.save(run.checkpoints, engine, tensors, state.step, meta, committed)


def _resume(training: Any, fingerprints: dict[str, str], accepted: set[str]) -> None:
    """Restore the newest checkpoint that verifies, if there is one; rank 0 looks, all load."""
    from dist_train import checkpoint, checkpoint_files
    from dist_train.loop import TrainState

    run, engine = training.run, training.engine
    manifest = engine.broadcast(_choose_checkpoint(run) if engine.rank == 0 else None)
    if isinstance(manifest, str):
        raise CheckpointError(manifest)
    if manifest is None:
        return
    _compare(fingerprints, manifest["fingerprints"], accepted)
    folder = checkpoint_files.step_folder(run.checkpoints, manifest["step"])
    # 1. weights and buffers  2. optimizer  3. moving average  4. loss scale  5. counters, the data position among them
    checkpoint.load_weights(engine.module, folder, manifest, use_ema=False)
    restored = checkpoint.load_optimizer(engine.module, training.optimizer, folder, manifest)
    if training.ema is not None:
        training.ema.update(checkpoint.read_tensors(folder, manifest, "ema/"))
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


def _compare(now: dict[str, str], then: dict[str, str], accepted: set[str]) -> None:
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
    from dist_train import checkpoint_files
    from dist_train.events import read_lines

    manifest, damages = checkpoint_files.newest_valid(run.checkpoints)
    for damage in damages:
        print(f"damaged checkpoint: {damage}", flush=True)
        log_event(run.events, "checkpoint_damaged", file=str(damage.file), what=damage.what)
    if manifest is None:
        if any(record["event"] == "checkpoint_committed" for record in read_lines(run.events)):
            return "no checkpoint verifies, although one was committed:\n" + "\n".join(map(str, damages))
        return None
    for damage in damages:
        folder = damage.file.parent
        if folder.exists():
            checkpoint_files.set_aside(folder)
    return manifest


def _report(run: RunDir, attempt: int, rank: int, error: ToolkitError) -> int:
    print(f"{error.title}: {error}", file=sys.stderr, flush=True)
    log_event(run.events, "failed", attempt=attempt, rank=rank, code=error.exit_code, message=str(error))
    return error.exit_code


def _redirect_output(path: Path) -> None:
    """Everything this rank prints, native code included, goes to its own log."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


def _die_with_parent() -> None:
    """Have the kernel kill this rank when its parent dies, so that no killed launcher leaves training behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
