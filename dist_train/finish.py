"""After the training: the best weights are evaluated, exported, loaded back, and reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from dist_train import checkpoint, checkpoint_files
from dist_train.errors import CheckpointError, Preempted, StorageError
from dist_train.evaluate import evaluate, forward_rows, tell
from dist_train.events import log_event
from dist_train.loop import Training
from dist_train.model_folder import read_model, write_model, write_record
from dist_train.report import SPLITS, build_report
from dist_train.rundir import fsync_folder, read_json, storage_error


def finish(training: Training, which: str = "best") -> None:
    """Evaluate checkpoint `which` ("best", "last" or a step) on all ranks; rank 0 exports and reports.

    best/ and the run's own report are of the best checkpoint; those of another lie apart.
    """
    run, engine, task, config = training.run, training.engine, training.task, training.config
    step, reader = _load_checkpoint(training, which)
    is_best = step == _best_step(training)
    results = run if is_best else run.evaluation(step)
    decision: dict[str, Any] = {}
    conditions = [f"test/{name}" for name in getattr(task, "conditions", tuple)()]
    if engine.rank == 0:
        results.forget_conditions()
    for split in (*SPLITS, *conditions):
        _say(training, f"evaluating step {step} on the {split} split")
        outputs = evaluate(engine, task, task.rows(split), config.eval.batch_size, tell(engine, run.events, split))
        if engine.rank != 0:
            continue
        table = task.predictions(split, outputs)
        if split == "validation":
            # Temperature and thresholds come from the validation split, and are then as fixed as the weights.
            decision = training.score.calibrate(table, config)
        write_table(results.prediction_file(split), training.score.decide(table, decision))
    # The other ranks are done: what follows needs no collective, and may take longer than one may wait for.
    if engine.rank != 0:
        return
    if is_best:
        _export(training, step, reader, decision)
    if training.stop:
        raise Preempted(f"stopped before the report was written; go on with: dist-train report {run.path}")
    report = build_report(run, training.score, config, lambda text: _say(training, text), results)
    log_event(run.events, "reported", step=step, folder=str(results.path))
    if training.tracker is not None and is_best:
        training.tracker.finish(report)


def _load_checkpoint(training: Training, which: str) -> tuple[int, checkpoint.Reader]:
    """Put the weights of the checkpoint into the module. Returns its step, and what reads it."""
    run, state = training.run, training.state
    steps = {"best": _best_step(training), "last": state.step}
    step = steps[which] if which in steps else int(which)
    if which == "best" and state.best_step is None:
        _say(training, f"no evaluation has told a best step: {step}, the last one, is taken")
    folder = checkpoint_files.step_folder(run.checkpoints, step)
    try:
        manifest = checkpoint_files.verify(folder)
    except checkpoint_files.Damage as damage:
        raise CheckpointError(
            f"the {which} checkpoint cannot be used: {damage}.\n"
            f"Checkpoints that are there: {checkpoint_files.committed_steps(run.checkpoints)}. "
            f"Evaluate another with: dist-train eval {run.path} --checkpoint last"
        ) from damage
    reader = checkpoint.Reader(folder, manifest)
    checkpoint.load_weights(training.engine.strategy, reader, use_ema=training.ema is not None)
    return step, reader


def _best_step(training: Training) -> int:
    """Before the first evaluation of a staged run the newest weights are the best known."""
    state = training.state
    return state.step if state.best_step is None else state.best_step


def write_table(path: Path, table: Any) -> None:
    """A Parquet file that is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error


def _export(training: Training, step: int, reader: checkpoint.Reader, decision: dict[str, Any]) -> None:
    """Write best/ beside the old one, load it back, and only then put it in its place.

    From the checkpoint's files, into a model of its own: no rank holds all weights under zero3 and fsdp.
    """
    run, task, config = training.run, training.task, training.config
    model = task.build_model()
    checkpoint.plain_model(model, reader, use_ema=training.ema is not None)
    facts = read_json(run.data_facts)
    environment = read_json(run.environment)
    record = {
        "run": run.name,
        "step": step,
        "decision": decision,
        "precision": training.plan.precision,
        "fingerprints": training.fingerprints,
        "versions": environment["versions"],
        "git": environment["git"],
    }
    temporary = run.path / ".best.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_model(temporary, task, model)
        write_record(temporary, config, facts, record)
    except OSError as error:
        raise storage_error(run.best, error) from error
    _check_loads_back(model, read_model(temporary, task), training)
    old = run.path / ".best.old"
    shutil.rmtree(old, ignore_errors=True)
    if run.best.exists():
        os.rename(run.best, old)
    os.rename(temporary, run.best)
    fsync_folder(run.path)
    shutil.rmtree(old, ignore_errors=True)
    log_event(run.events, "exported", step=step, folder=str(run.best))


def _check_loads_back(model: nn.Module, loaded: nn.Module, training: Training) -> None:
    """The exported folder holds the very weights, and they predict what they did.

    Where a recipe saves another form of the model (adapters merged into the weights), the predictions alone tell.
    """
    here, there = model.state_dict(), loaded.state_dict()
    for name, tensor in here.items() if here.keys() == there.keys() else ():
        if not torch.equal(tensor, there[name].cpu()):
            raise StorageError(f"{training.run.best} could not be loaded back: {name} is not what was saved.")
    rows = training.task.rows("validation")
    with torch.no_grad():
        few = np.arange(min(2, len(rows.ids)))
        expected, outputs = (forward_rows(one.eval(), training.task, rows, few) for one in (model, loaded))
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise StorageError(f"{training.run.best} was loaded back, but its predictions are not finite.")
        # Merged weights round otherwise than the two products that they came from.
        if not np.allclose(value, expected[name], rtol=1e-4, atol=1e-5):
            raise StorageError(f"{training.run.best} was loaded back, but its {name} is not that of the model saved.")


def _say(training: Training, text: str) -> None:
    if training.engine.rank == 0:
        print(text, flush=True)
        log_event(training.run.events, "progress", message=text)
