"""A checkpoint exists whole or not at all, and damage is found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_train import checkpoint_files as files

TESTS = Path(__file__).parent


def _save(root: Path, step: int, shards: int = 2, best: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    temporary = root / f".tmp-{step}"
    temporary.mkdir()
    entries = []
    for rank in range(shards):
        values = np.arange(100, dtype=np.float32) + step
        piece = files.Piece("model/weight", (100 * shards,), "F32", 100 * rank, 100)
        entries.append(files.write_shard(temporary / f"rank-{rank}.safetensors", [(piece, values.view(np.uint8).data)]))
    files.write_manifest(temporary, {"step": step, "shards": entries, "state": {"best_step": best}})
    final = files.step_folder(root, step)
    files.commit(temporary, final)
    return final


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the shim that kills at a system call")
def test_a_kill_at_any_system_call_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    shim = tmp_path / "kill_shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, TESTS / "kill_shim.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_during_save", tmp_path / "run"],
        cwd=TESTS.parent,
        env={**os.environ, "LD_PRELOAD": str(shim), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    # Both outcomes must have been seen, else the shim killed nowhere near the rename.
    assert counted["calls"] > 30
    assert counted["old"] > 10
    assert counted["new"] > 5


def test_a_flipped_bit_anywhere_in_any_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    older, newest = _save(tmp_path / "c", 1), _save(tmp_path / "c", 2)
    generator = random.Random(0)
    for path in sorted(newest.iterdir()):
        original = path.read_bytes()
        # Every byte of the headers, and random offsets beyond.
        offsets = {*range(min(64, len(original))), *generator.sample(range(len(original)), 60)}
        for offset in offsets:
            damaged = bytearray(original)
            damaged[offset] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            manifest, damages = files.newest_valid(tmp_path / "c")
            assert manifest is not None, offset
            assert manifest["step"] == 1, f"{path.name}: the flip at byte {offset} was not found"
            assert damages[0].file == path
        path.write_bytes(original)
    assert files.verify(newest)["step"] == 2
    assert older.exists()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_file_cut_short_is_found(tmp_path: Path, length: int) -> None:
    _save(tmp_path / "c", 1)
    newest = _save(tmp_path / "c", 2)
    for path in sorted(newest.iterdir()):
        original = path.read_bytes()
        path.write_bytes(original[:length])
        manifest, damages = files.newest_valid(tmp_path / "c")
        assert manifest is not None
        assert manifest["step"] == 1
        assert damages[0].file == path
        path.write_bytes(original)


def test_swapped_shards_checkpoints_and_missing_files_are_found(tmp_path: Path) -> None:
    root = tmp_path / "c"
    first, second, third = _save(root, 1), _save(root, 2), _save(root, 3)
    (third / "rank-0.safetensors").rename(third / "x")
    (third / "rank-1.safetensors").rename(third / "rank-0.safetensors")
    (third / "x").rename(third / "rank-1.safetensors")
    shutil.copy(first / "rank-0.safetensors", second / "rank-0.safetensors")
    manifest, damages = files.newest_valid(root)
    assert manifest is not None
    assert manifest["step"] == 1
    # Both shards of one checkpoint hold the same bytes here: only their names in the manifest differ.
    assert [damage.file.parent.name for damage in damages] == ["step-00000003", "step-00000002"]
    shutil.rmtree(third)
    first.rename(third)
    assert "belongs to step 1" in str(files.newest_valid(root)[1][0])
    (third / files.MANIFEST).unlink()
    assert "is missing" in str(files.newest_valid(root)[1][0])


def test_what_cannot_be_read_is_damage_too(tmp_path: Path) -> None:
    _save(tmp_path / "c", 1)
    (tmp_path / "c" / "step-00000002").write_text("a file where a folder should be")
    manifest, damages = files.newest_valid(tmp_path / "c")
    assert manifest is not None
    assert manifest["step"] == 1
    assert "cannot be read" in str(damages[0])


def test_pruning_keeps_the_newest_and_the_best_and_touches_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5)):
        _save(root, step, best=best)
    (root / "notes").mkdir()
    # Were 5 damaged, a resume would fall back to 4, whose best is 2.
    assert files.prune(root, keep_last=2) == [3, 1]
    assert files.committed_steps(root) == [5, 4, 2]
    assert (root / "notes").is_dir()


def test_safetensors_reads_a_shard(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = _save(tmp_path / "c", 7)
    loaded = load_file(folder / "rank-1.safetensors")
    assert loaded["model/weight@100"].tolist() == [7.0 + value for value in range(100)]


def test_a_manifest_of_a_newer_format_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FORMAT_VERSION", 9)
    folder = _save(tmp_path / "c", 1)
    monkeypatch.setattr(files, "FORMAT_VERSION", 1)
    with pytest.raises(files.Damage, match="has format 9; this version reads up to 1"):
        files.verify(folder)
