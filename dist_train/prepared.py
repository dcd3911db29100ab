"""Prepared data: built once from a recipe's `describe` and `build`, found again by content. Torch-free.

A prepared folder exists whole or not at all; facts.json lists its files.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.config import CachedData
from dist_train.errors import DataError, StorageError
from dist_train.rundir import fsync_folder, json_text, unwritable

FACTS = "facts.json"
Say = Callable[[str], None]
"""Shows the user one line."""


def prepare(config: Any, recipe: Any, say: Say = print) -> Path:
    """The prepared folder of this config: built by `recipe.data` the first time, found again by content.

    ConfigError and DataError come from the recipe; StorageError when the cache folder cannot be written.
    """
    from filelock import FileLock

    if not hasattr(recipe.data, "build"):
        return _unprepared(config, recipe)
    key = _key(config, recipe)
    folder = cache_folder(config) / _folder_name(recipe, key)
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
                    facts = recipe.data.build(config, temporary, say)
                    # The code is part of what a default description says, but not of what the data is.
                    own = hasattr(recipe.data, "describe")
                    commit(temporary, folder, completed(facts, key if own else _fingerprint(temporary)))
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                say(f"data           prepared: {folder}")
    except OSError as error:
        raise unwritable(folder, error, "data.cache_dir") from error
    return folder


def is_of_now(folder: Path, config: Any, recipe: Any) -> bool:
    """Whether `prepare` would find this folder again: the sources, and how they are prepared, are what they were. True
    for a recipe that prepares nothing. DataError when a source cannot be read."""
    return not hasattr(recipe.data, "build") or folder.name == _folder_name(recipe, _key(config, recipe))


def _key(config: Any, recipe: Any) -> str:
    own = hasattr(recipe.data, "describe")
    described = {"recipe": recipe.name, "data": recipe.data.describe(config) if own else describe(config, recipe)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _folder_name(recipe: Any, key: str) -> str:
    return f"{Path(recipe.name).name}-{key[:24]}"


def _unprepared(config: Any, recipe: Any) -> Path:
    """The folder, with facts alone, of a recipe that prepares nothing: its task reads the data itself, each time."""
    from dist_train.task import facts_of_rows

    root = cache_folder(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{Path(recipe.name).name}-", dir=root))
        try:
            facts = facts_of_rows(recipe.make_task(config, temporary))
            folder = root / _folder_name(recipe, facts["rows_fingerprint"])
            if not is_whole(folder):
                commit(temporary, folder, completed(facts, facts["rows_fingerprint"]))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise unwritable(root, error, "data.cache_dir") from error
    return folder


def epoch_rows(config: Any, recipe: Any, facts: dict[str, Any]) -> int:
    """How many rows an epoch shows: those of the training split, unless the recipe's `epoch_rows(config, facts)` says
    otherwise, because it repeats some of them or leaves some out."""
    if hasattr(recipe.data, "epoch_rows"):
        return int(recipe.data.epoch_rows(config, facts))
    return int(facts["splits"]["train"]["rows"])


def _fingerprint(folder: Path) -> str:
    """Of the content of all files below the folder."""
    return hashlib.sha256(json.dumps(_content(folder), sort_keys=True).encode()).hexdigest()


def completed(facts: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Facts with what a report shows and a recipe may leave out."""
    rows = sum(split["rows"] for split in facts["splits"].values())
    unsaid = {"split": {"method": "the recipe's own", "seed": None}, "leaks": {}, "warnings": []}
    return {"fingerprint": fingerprint, "rows": rows, **unsaid, **facts}


def describe(config: Any, recipe: Any) -> dict[str, Any]:
    """What a recipe's prepared data depends on, where the recipe does not say: the values of its `data` section, the
    content of the files that they name, and the recipe's code. DataError for a file that is not there."""
    values: dict[str, Any] = {}
    for key, value in config.data.model_dump(mode="json", exclude=set(CachedData.model_fields)).items():
        extra = type(config.data).model_fields[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("format") == "path" and value is not None:
            values[key] = [_described(path, key) for path in (value if isinstance(value, list) else [value])]
        else:
            values[key] = value
    return {"values": values, "code": [_content(file) for file in recipe.source_files()]}


def _described(path: str, key: str) -> Any:
    """The content of what a path or glob names."""
    found = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not found:
        raise DataError(f"data.{key} is {path}, but there is no such file or folder.")
    try:
        return [_content(Path(file)) for file in found]
    except OSError as error:
        raise DataError(f"data.{key} is {path}, which cannot be read: {error.strerror}.") from error


def _content(path: Path) -> Any:
    """The hash of a file, or those of all files below a folder."""
    if path.is_dir():
        return {str(file.relative_to(path)): _content(file) for file in sorted(path.rglob("*")) if file.is_file()}
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder(config: Any) -> Path:
    """data.cache_dir, else, where a recipe has no such key, the default place."""
    return Path(getattr(config.data, "cache_dir", CachedData().cache_dir)).expanduser()


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


def write_random_splits(
    folder: Path, table: Any, validation_share: float = 0.15, test_share: float = 0.15, seed: int = 0
) -> dict[str, Any]:
    """Deal the rows of a pyarrow Table out at random and store each split, with the number of each row as column `row`.
    Rows that are alike in every column go to one side. Returns the facts about it."""
    import numpy as np
    import pyarrow as pa

    first_of: dict[tuple[Any, ...], int] = {}
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    group = np.array([first_of.setdefault(values, index) for index, values in enumerate(rows)])
    firsts = np.unique(group)
    shuffled = np.random.default_rng(seed).permutation(firsts)
    cuts = [round(len(firsts) * (1 - validation_share - test_share)), round(len(firsts) * (1 - test_share))]
    parts = dict(zip(("train", "validation", "test"), np.split(shuffled, cuts), strict=True))
    splits = {}
    for name, part in parts.items():
        chosen = np.flatnonzero(np.isin(group, part))
        if not len(chosen):
            raise DataError(f"the {name} split is empty: {table.num_rows} rows are too few for these shares.")
        write_split(folder, name, table.take(chosen).append_column("row", pa.array(chosen)))
        splits[name] = {"rows": len(chosen)}
    copies = table.num_rows - len(firsts)
    return {"splits": splits, "split": {"method": "random", "seed": seed}, "leaks": {"exact_duplicates": copies}}


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
