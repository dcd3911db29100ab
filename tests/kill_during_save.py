"""Saves a second checkpoint and is killed at every call that changes files, one after the other.

Run by test_dist_train_checkpoint_files.py under kill_shim.c; prints one JSON line: how many calls were tried.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from dist_train import checkpoint_files as files

FIRST, SECOND = 100, 200


def save(root: Path, step: int) -> None:
    """The same sequence of file operations as checkpoint.save on one rank, with pruning."""
    final = files.step_folder(root, step)
    temporary = root / f".tmp-{final.name}"
    files.clean(root)
    temporary.mkdir()
    values = np.full(1000, step, dtype=np.float32)
    piece = files.Piece("model/weight", (1000,), "F32", 0, 1000)
    shards = [files.write_shard(temporary / "rank-00000-of-00001.safetensors", [(piece, values.view(np.uint8).data)])]
    files.write_manifest(temporary, {"step": step, "shards": shards})
    files.commit(temporary, final)
    files.prune(root, keep_last=2, keep=[])


def main(root: Path) -> None:
    shim = ctypes.CDLL(None)
    root.mkdir()
    save(root, FIRST // 2)
    save(root, FIRST)
    pristine = root.with_name("pristine")
    shutil.copytree(root, pristine)
    survived = {FIRST: 0, SECOND: 0}
    calls = 0
    while True:
        child = os.fork()
        if child == 0:
            shim.arm(calls)
            save(root, SECOND)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        manifest, damages = files.newest_valid(root)
        assert manifest is not None, (calls, damages)
        assert not damages, (calls, damages)
        survived[manifest["step"]] += 1
        # What the next start does first.
        files.clean(root)
        assert not [entry for entry in root.iterdir() if entry.name.startswith(".")], calls
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
        calls += 1
    print(json.dumps({"calls": calls, "old": survived[FIRST], "new": survived[SECOND]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
