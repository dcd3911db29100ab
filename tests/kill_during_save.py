"""Saves a checkpoint as the training does and is killed at every call that changes files, one after the other.

Run by test_dist_train_checkpoint_files.py under kill_shim.c; prints one JSON line: how many calls were tried.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from dist_train import checkpoint_files as files
from dist_train.loop import Training, save_checkpoint
from tests.fakes import TinyTask, events, make_training

FIRST, SECOND = 100, 200


def save_at(training: Training, step: int) -> None:
    training.state.step = step
    save_checkpoint(training)
    training.saver.finish()


def main(path: Path) -> None:
    torch.set_num_threads(1)
    shim = ctypes.CDLL(None)
    training = make_training(path, 1, TinyTask())
    strategy = training.engine.strategy
    for leaf in strategy.leaves:
        leaf.grad = torch.ones_like(leaf)
    strategy.optimizer.step()
    root = training.run.checkpoints
    # Two are kept, so the third save also removes one.
    save_at(training, FIRST // 2)
    save_at(training, FIRST)
    pristine = path.with_name("pristine")
    shutil.copytree(path, pristine)
    survived = {FIRST: 0, SECOND: 0}
    calls = 0
    while True:
        child = os.fork()
        if child == 0:
            shim.arm(calls)
            save_at(training, SECOND)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        manifest, damages = files.newest_valid(root)
        assert manifest is not None, (calls, damages)
        assert not damages, (calls, damages)
        survived[manifest["step"]] += 1
        for event in events(path, "checkpoint_committed"):
            assert event["step"] <= manifest["step"], f"call {calls}: a commit was announced that did not last"
        # What the next save does first.
        files.clean(root)
        assert not [entry for entry in root.iterdir() if entry.name.startswith(".")], calls
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        shutil.rmtree(path)
        shutil.copytree(pristine, path)
        calls += 1
    print(json.dumps({"calls": calls, "old": survived[FIRST], "new": survived[SECOND]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
