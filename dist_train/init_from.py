"""Start from the weights of an earlier run: which of them fit, what is taken row by row, and the record of it.

Torch-free when imported: what belongs to model.init_from is checked before a rank starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dist_train.errors import ConfigError, DataError
from dist_train.rundir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "model.init_from"
# What every model folder holds beside the model (see model_folder.py): its run and step, and the facts of its data.
_ORIGIN, _FACTS = "dist_train.json", "facts.json"
# Names that one line shows.
_MOST_NAMES = 10


@dataclass(frozen=True)
class TakenParameter:
    """One parameter or buffer of the new model."""

    name: str
    shape: tuple[int, ...]
    how: Literal["whole", "rows", "new"]
    """rows: those of the labels that the earlier model knew."""
    rows: int | None = None
    """How many, where it has one a label."""


@dataclass(frozen=True)
class Taken:
    """What a model took from an earlier one."""

    folder: Path
    """The earlier model's folder."""
    parameters: tuple[TakenParameter, ...]
    kept: tuple[str, ...]
    """Labels of both models, in the order of the new one."""
    new: tuple[str, ...]
    removed: tuple[str, ...]


def model_folder(given: str) -> Path:
    """The exported model that model.init_from names: a run's best/, or such a folder itself. DataError without one."""
    path = Path(given)
    folder = path / "best" if (path / "config.yaml").is_file() else path
    if (folder / _ORIGIN).is_file() and (folder / _FACTS).is_file():
        return folder
    if folder != path:
        raise DataError(
            f"{KEY} is {path}, a run that has no best/ yet: its training has to end first. "
            f"Go on with it by `dist-train resume {path}`, or name another run.",
            KEY,
        )
    what = "which is neither a run nor its best/ folder" if path.exists() else "but there is no such folder"
    raise DataError(
        f"{KEY} is {path}, {what}: name the directory of a finished run, for example runs/NAME (`dist-train runs` "
        "lists them). The weights of a Hugging Face encoder come in with model.pretrained.",
        KEY,
    )


def earlier_runs(folder: Path) -> list[RunDir]:
    """The run of a model folder, the one that it started from, and so on, as far as they are there."""
    found: dict[Path, RunDir] = {}
    run = RunDir(folder.parent)
    while run.path not in found and run.data_facts.is_file():
        found[run.path] = run
        if run.init_from.is_file():
            run = RunDir(Path(read_json(run.init_from)["folder"]).parent)
    return list(found.values())


def take_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    old_labels: Sequence[str],
    new_labels: Sequence[str],
    label_parameters: Collection[str],
    folder: Path,
) -> Taken:
    """Copy `weights`, an earlier model's state by name, into `model`; ConfigError names all that does not fit.

    label_parameters: names of those with one row a label. A label that both models know keeps its row, wherever it now
    stands; the row of a new label stays as `model` has it. All else is taken whole, or nothing is taken at all.
    """
    own = model.state_dict()  # detached, over the model's own memory
    _refuse_misfits(own, weights, len(old_labels), len(new_labels), label_parameters, folder)
    old_row = {label: row for row, label in enumerate(old_labels)}
    kept = [label for label in new_labels if label in old_row]
    to_rows = [row for row, label in enumerate(new_labels) if label in old_row]
    from_rows = [old_row[label] for label in kept]
    taken = []
    for name, tensor in own.items():
        if name not in label_parameters:
            tensor.copy_(weights[name])
            taken.append(TakenParameter(name, tuple(tensor.shape), "whole"))
            continue
        if kept:
            tensor[to_rows] = weights[name][from_rows].to(tensor)
        taken.append(TakenParameter(name, tuple(tensor.shape), "rows" if kept else "new", len(kept)))
    new = tuple(label for label in new_labels if label not in old_row)
    removed = tuple(label for label in old_labels if label not in set(new_labels))
    return Taken(folder, tuple(taken), tuple(kept), new, removed)


def _refuse_misfits(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    old_count: int,
    new_count: int,
    label_parameters: Collection[str],
    folder: Path,
) -> None:
    problems = [f"{name} has no place in this model" for name in weights if name not in own]
    for name, tensor in own.items():
        if name not in weights:
            problems.append(f"{name} is not in it")
            continue
        here, there = tuple(tensor.shape), tuple(weights[name].shape)
        by_label = name in label_parameters
        if by_label and (here[:1], there[:1]) != ((new_count,), (old_count,)):
            rows = f"one row a label ({new_count}, there {old_count})"
            problems.append(f"{name} is {here}, there {there}, but must have {rows}")
        elif (here[1:] if by_label else here) != (there[1:] if by_label else there):
            problems.append(f"{name} is {here} in this model, but {there} there")
    if problems:
        more = f"\n  and {len(problems) - _MOST_NAMES} more" if len(problems) > _MOST_NAMES else ""
        raise ConfigError(
            f"{KEY}: the weights in {folder} are not those of this model, and none were taken:\n  "
            + "\n  ".join(problems[:_MOST_NAMES])
            + more
            + f"\nTrain the model that they belong to (its settings are in config.yaml of its run), or set {KEY}=null.",
            KEY,
        )


def record_start(run: RunDir, taken: Taken) -> str:
    """Write init_from.json. Returns the same in a few lines."""
    origin = read_json(taken.folder / _ORIGIN)
    record = {
        "folder": str(taken.folder),
        "run": origin.get("run"),
        "step": origin.get("step"),
        "sha256": {path.name: _sha256(path) for path in sorted(taken.folder.glob("*.safetensors"))},
        "labels": {"kept": list(taken.kept), "new": list(taken.new), "removed": list(taken.removed)},
        "parameters": [asdict(parameter) for parameter in taken.parameters],
    }
    write_json(run.init_from, record)
    return describe_start(record)


def started_from(run: RunDir) -> dict[str, Any] | None:
    """What init_from.json holds, with the number of parameters taken `whole`; None for a run that started anew."""
    if not run.init_from.is_file():
        return None
    record = read_json(run.init_from)
    return {**record, "whole": sum(entry["how"] == "whole" for entry in record["parameters"])}


def describe_start(record: Mapping[str, Any]) -> str:
    """Where the weights came from, what was taken, and which labels are new, a line each."""
    labels, parameters = record["labels"], record["parameters"]
    rows = [
        f"{each['name']} {each['rows']} of {each['shape'][0]} rows" for each in parameters if each["how"] != "whole"
    ]
    whole = f"{len(parameters) - len(rows)} tensors taken whole"
    new, removed = _some(labels["new"]), _some(labels["removed"])
    return "\n".join(
        (
            f"started from   {record['folder']} (run {record['run']}, step {record['step']})",
            f"weights        {', '.join([whole, *rows])}",
            f"labels         {len(labels['kept'])} kept; new: {new}; removed: {removed}",
        )
    )


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_NAMES} more" if len(labels) > _MOST_NAMES else ""
    return ", ".join(labels[:_MOST_NAMES]) + more if labels else "none"


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
