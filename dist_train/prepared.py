"""Prepared data: built once from a recipe's `describe` and `build`, found again by content. Torch-free.

A prepared folder exists whole or not at all; facts.json lists its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.errors import StorageError
from dist_train.rundir import fsync_folder, json_text, unwritable

FACTS = "facts.json"
Say = Callable[[str], None]
"""Shows the user one line."""


def prepare(config: Any, recipe: Any, say: Say = print) -> Path:
    """The prepared folder of this config: built by `recipe.data` the first time, found again by content.

    ConfigError and DataError come from the recipe; StorageError when the cache folder cannot be written.
    """
    from filelock import FileLock

    described = {"recipe": recipe.name, "data": recipe.data.describe(config)}
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(config) / f"{Path(recipe.name).name}-{key[:24]}"
    if is_whole(folder):
        say(f"data           prepared before: {folder}")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_whole(folder):
                temporary = folder.with_name(f".tmp-{folder.name}")
                shutil.rmtree(temporary, ignore_errors=True)  # what a killed preparation left; we hold the lock
                try:
                    temporary.mkdir()
                    commit(temporary, folder, {"fingerprint": key, **recipe.data.build(config, temporary, say)})
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                say(f"data           prepared: {folder}")
    except OSError as error:
        raise unwritable(folder, error, "data.cache_dir") from error
    return folder


def cache_folder(config: Any) -> Path:
    """data.cache_dir where the recipe has that key, else the default place."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dist-train"
    return Path(getattr(config.data, "cache_dir", None) or default)


def commit(temporary: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Give a filled folder its facts and its name, durably: a power cut must not leave empty files behind a rename."""
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    (temporary / FACTS).write_text(json_text({**facts, "files": sizes}), encoding="utf-8")
    for path in temporary.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if folder.exists() and not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(temporary)  # another process has built the same meanwhile
    fsync_folder(folder.parent)


def is_whole(folder: Path | str) -> bool:
    """Every file that the folder was built with is there, in its size."""
    try:
        files = load_facts(folder)["files"]
        return all((Path(folder) / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def load_facts(folder: Path | str) -> dict[str, Any]:
    """facts.json: what `build` returned, with the fingerprint and the files."""
    return json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))


def write_split(folder: Path, name: str, table: Any) -> None:
    """Store a split, a pyarrow Table, as an Arrow stream."""
    import pyarrow as pa

    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def read_split(folder: Path | str, name: str) -> Any:
    """A split as a pyarrow Table over a memory map."""
    import pyarrow as pa

    with pa.memory_map(str(Path(folder) / f"{name}.arrow")) as source:
        return pa.ipc.open_stream(source).read_all()


def check_space(folder: Path, needed: int, kept: int, say: Say) -> None:
    """Say what will be written; StorageError where the disk lacks it. kept: bytes there that may be used again."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    say(f"data           takes about {_size(needed)} in {folder}, which has {_size(free)} free")
    if free < needed - kept:
        raise StorageError(
            f"the prepared data takes about {_size(needed)}, but {folder} has {_size(free)} free: free some space, or "
            "choose another folder with data.cache_dir=... (the site file can set it once for all runs)."
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
