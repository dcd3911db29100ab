"""Read a folder saved by `datasets`, or a hub data set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError, DataError
from dist_train.hub import check_reachable
from dist_train.table_files import Batch, as_text, check_columns

_BATCH_ROWS = 10_000


def open_dataset(path: str, revision: str | None, offline: bool = False) -> dict[str, Any] | None:
    """The splits of a folder that `datasets` saved or of `hub:NAME`, by name ("" for a single one); None for files."""
    if path.startswith("hub:"):
        return _open_hub(path.removeprefix("hub:"), revision, offline)
    folder = Path(path)
    if not folder.is_dir() or not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"data.path is {path}, which `datasets` cannot load: {error}") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def _open_hub(name: str, revision: str | None, offline: bool) -> dict[str, Any]:
    import datasets

    if not name:
        raise ConfigError("data.path is hub: without a name; write for example data.path=hub:owner/name.")
    what = f"data.path is hub:{name}" + (f" at {revision}" if revision else "")
    if not offline:
        check_reachable(what, "save it there with save_to_disk(FOLDER), and set data.path=FOLDER")
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the library raises many kinds: no network, no such name, gated, scripts
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if offline:
            raise DataError(
                f"{what}, but asking the hub is switched off (data.offline or HF_HUB_OFFLINE), and it was not "
                f"downloaded before: {first}\nRun `dist-train prepare` with data.offline=false where there is network, "
                "with the same HF_HOME."
            ) from error
        raise DataError(
            f"{what}, which could not be loaded: {first}\n"
            "Check the name and this machine's network; or download it elsewhere, save it with save_to_disk(FOLDER), "
            "and set data.path=FOLDER."
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def resolved_revision(dataset: Any) -> str | None:
    """The commit that a hub data set was downloaded from; None for a folder."""
    for address in dataset.info.download_checksums or {}:
        found = re.search(r"@([0-9a-f]{40})/", address)
        if found:
            return found[1]
    return None


def read_dataset(dataset: Any, where: str, columns: dict[str, str]) -> Iterator[Batch]:
    """Batches of a `datasets` split."""
    check_columns(where, dataset.column_names, columns)
    chosen = dataset.select_columns(list(columns))
    names = {name: getattr(dataset.features[name], "names", None) for name in columns}
    for start in range(0, len(chosen), _BATCH_ROWS):
        part = chosen[start : start + _BATCH_ROWS]
        rows = zip(*([_class_name(value, names[name]) for value in part[name]] for name in columns), strict=True)
        yield [dict(zip(columns, row, strict=True)) for row in rows]


def _class_name(value: Any, names: list[str] | None) -> str | None:
    """A ClassLabel column holds indices; its names are what people call the classes. -1 stands for no label there."""
    if names and value is not None:
        return names[value] if value >= 0 else None
    return as_text(value)
