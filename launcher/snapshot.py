"""A copy of the code in the run directory: a job that waits or comes back runs what was submitted, whatever is edited.

The toolkit's own packages lie in RUN/code, the user's project below RUN/code/project.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import dist_train
from dist_train.errors import ConfigError
from dist_train.rundir import fsync_folder, unwritable, write_json
from launcher.process import read_output

_PACKAGES = ("launcher", "dist_train", "slurm", "recipes")
_MOST_MIB = 64
_LARGEST_SHOWN = 5
# What is no code, where no git says what is to be ignored.
_SKIPPED = {"__pycache__", "node_modules", "venv", "runs", "wandb"}


def snapshot(code: Path, source: Path | None) -> dict[str, Any]:
    """Copy the toolkit, and the project that the recipe folder or script `source` belongs to, into the folder `code`.

    Returns what was copied: `project`, where `source` now lies (null without one), `root`, what the project was copied
    from, `commit` and `changed` of it. ConfigError when it is too large.
    """
    toolkit = Path(dist_train.__file__).resolve().parent.parent
    temporary = code.with_name(f".{code.name}.{os.getpid()}.new")
    facts: dict[str, Any] = {"project": None, "root": None, "commit": None, "changed": None}
    try:
        for package in _PACKAGES:
            _copy(_walk(toolkit / package), toolkit, temporary)
        if source is not None:
            root, files, state = _project_of(source)
            _check_size(root, files)
            _copy(files, root, temporary / "project")
            place = code / "project" / source.resolve().relative_to(root)
            facts = {"project": str(place), "root": str(root), **state}
        write_json(temporary / "snapshot.json", facts)
        os.rename(temporary, code)
        fsync_folder(code.parent)
    except OSError as error:
        raise unwritable(code, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _project_of(source: Path) -> tuple[Path, list[Path], dict[str, Any]]:
    """(root, files, commit and whether it was changed): the git checkout around it, else its own folder."""
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    top = read_output(["git", "-C", str(folder), "rev-parse", "--show-toplevel"])
    if top is None:
        return folder, _walk(folder), {"commit": None, "changed": None}
    root = Path(top)
    listed = read_output(["git", "-C", top, "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    if listed is None:
        raise ConfigError(f"git cannot list the files of {root} that are to be copied: try `git ls-files` there.")
    files = [root / name for name in listed.split("\0") if name]
    commit = read_output(["git", "-C", top, "rev-parse", "HEAD"])
    changed = bool(read_output(["git", "-C", top, "status", "--porcelain"]))
    return root, [path for path in files if path.is_file()], {"commit": commit, "changed": changed}


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        found += [Path(parent) / name for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _check_size(root: Path, files: list[Path]) -> None:
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total <= _MOST_MIB * 2**20:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:_LARGEST_SHOWN]
    shown = ", ".join(f"{path.relative_to(root)} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
    raise ConfigError(
        f"the project {root} has {total / 2**20:.0f} MiB of files that would be copied for the job, but at most "
        f"{_MOST_MIB} MiB are. The largest: {shown}. Have git ignore what is no code, or move it."
    )


def _copy(files: list[Path], root: Path, target: Path) -> None:
    for path in files:
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
