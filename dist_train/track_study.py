"""A scaling study in W&B: one group, a run a size with every measured step, and a run that sums up."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.config import RunConfig
from dist_train.config_io import flatten
from dist_train.rundir import read_json, write_json
from dist_train.scaling import Repeat, flat_table
from dist_train.track import open_wandb, wandb_mode

_SUMMARY = "summary"


def track_study(
    folder: Path, study: Mapping[str, Any], repeats: Mapping[str, Sequence[Repeat]], config: RunConfig
) -> str | None:
    """Write the group, online or offline as W&B is set. repeats: of each size, by its name. Returns the command that
    uploads what lies here; None where nothing does. Whatever W&B meets, the study stands."""
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    shutil.rmtree(folder / "wandb", ignore_errors=True)  # of the study before it went on
    try:
        for entry in study["sizes"]:
            _track_size(folder, study, entry, repeats[entry["name"]], config, mode)
        _track_summary(folder, study, config, mode)
    except Exception as error:
        print(f"W&B is off: {error}", file=sys.stderr)
    offline = sorted((folder / "wandb").glob("offline-run-*"))
    return f"wandb sync {folder / 'wandb'}/offline-run-*" if offline else None


def _track_size(
    folder: Path,
    study: Mapping[str, Any],
    entry: Mapping[str, Any],
    repeats: Sequence[Repeat],
    config: RunConfig,
    mode: str,
) -> None:
    plan = {"strategy": entry["strategy"], "nodes": entry["nodes"], "ranks": entry["ranks"]}
    run = _open(folder, study, entry["name"], {**flatten(config), "scaling": {**study["asked"], **plan}}, config, mode)
    for number, repeat in enumerate(repeats):
        for seconds in repeat.step_s:
            run.log({"repeat": number, "step_ms": 1000 * seconds})
    run.summary.update({name: value for name, value in entry.items() if value is not None})
    run.finish()


def _track_summary(folder: Path, study: Mapping[str, Any], config: RunConfig, mode: str) -> None:
    import wandb

    run = _open(folder, study, _SUMMARY, {**flatten(config), "scaling": study["asked"]}, config, mode)
    columns, *rows = flat_table(study["sizes"])
    table = wandb.Table(columns=columns, data=rows)
    run.log({"scaling": table, "page": wandb.Html(str(folder / "scale.html"))})
    for strategy, found in study["fits"].items():
        for each in found["predictions"]:
            run.summary[f"prediction/{strategy}/{each['ranks']} ranks/step_ms"] = 1000 * each["step_s"]
    run.summary["failed"] = sorted(study["failed"])
    run.finish()


def _open(
    folder: Path, study: Mapping[str, Any], name: str, values: Mapping[str, Any], config: RunConfig, mode: str
) -> Any:
    known = folder / "wandb_ids.json"
    ids = read_json(known) if known.is_file() else {}
    if name not in ids:
        ids[name] = uuid.uuid4().hex[:8]
        write_json(known, ids)
    hardware, git = study["hardware"], study["git"]
    tags = [hardware["gpus"][0] if hardware["gpus"] else hardware["cpu"]]
    tags += [git["commit"][:12]] if git else []
    own = {
        "id": ids[name],
        "dir": str(folder),
        "name": f"{study['name']}/{name}",
        "group": config.track.group or study["name"],
        "job_type": "scaling summary" if name == _SUMMARY else "scaling",
        "tags": [*config.track.tags, *(tag[:64] for tag in tags)],
        "config": dict(values),
    }
    return open_wandb(own, config, mode, lambda error: print(f"W&B is offline: {error}", file=sys.stderr))
