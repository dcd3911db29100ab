"""dist-train submit --seeds N, --folds N or --ladder: several runs of a recipe as one Slurm array, below one folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from dist_train import config_io
from dist_train.errors import BusyError, ConfigError
from dist_train.rundir import RunDir, write_atomic, write_json
from launcher.ablate import Study
from launcher.handed_in import MEMBERS, lives, signals_held
from launcher.snapshot import snapshot
from launcher.study import Member, study_folder
from launcher.submit import Wish, dependency_on, make_run, script_of, wish_of
from slurm import client


def submit_seeds(recipe: str, settings: list[str], seeds: int, is_dry: bool, after: str | None) -> Path | None:
    """The recipe with so many seeds, from its own on. Returns the folder of the runs."""
    config = config_io.load(recipe, settings).config
    folder = study_folder(config, recipe, "seeds")
    members = [
        Member(index, f"seed {seed}", recipe, (*settings, f"seed={seed}"), RunDir(folder / f"seed-{seed}"))
        for index, seed in enumerate(range(config.seed, config.seed + seeds))
    ]
    return _submit(folder, members, wish_of(config, is_dry), is_dry, after)


def submit_folds(recipe: str, settings: list[str], folds: int, is_dry: bool, after: str | None) -> Path | None:
    """The recipe on each of so many folds of its data as the test split. Returns the folder of the runs."""
    words = [*settings, f"data.folds={folds}"]
    config = config_io.load(recipe, words).config
    folder = study_folder(config, recipe, "folds")
    members = [
        Member(fold, f"fold {fold}", recipe, (*words, f"data.fold={fold}"), RunDir(folder / f"fold-{fold}"))
        for fold in range(folds)
    ]
    return _submit(folder, members, wish_of(config, is_dry), is_dry, after)


def submit_ladder(recipe: str, settings: list[str], seeds: int, is_dry: bool, after: str | None) -> Path | None:
    """The runs of `dist-train ablate`; that command then makes the table of them. Returns their folder."""
    config = config_io.load(recipe, settings).config
    study = Study(recipe, settings, seeds)
    return _submit(study.folder, study.members, wish_of(config, is_dry), is_dry, after)


def _submit(folder: Path, members: Sequence[Member], wish: Wish, is_dry: bool, after: str | None) -> Path | None:
    dependency = None if after is None else dependency_on(after)
    array = RunDir(folder)
    indices = f"0-{len(members) - 1}"
    if is_dry:
        print(script_of(array, wish, dependency, array=indices), end="")
        return None
    most = client.most_in_an_array()
    if len(members) > most:
        raise ConfigError(f"an array of {len(members)} runs is asked for, but this cluster has at most {most} in one.")
    if lives(array):
        raise BusyError(f"the array of {folder} waits or runs: nothing was touched.")
    for member in members:
        if lives(member.run):
            raise BusyError(f"{member.run.path} waits or runs in a job of its own: wait, or dist-train cancel it.")
    for member in members:
        if member.run.config.is_file() and not member.has_its_settings():
            raise ConfigError(
                f"{member.run.path} is a run of other settings: give the array another name=..., or delete that run."
            )
    missing = [member for member in members if not member.run.config.is_file() or not member.is_done]
    if not missing:
        print(f"array          all {len(members)} runs of {folder} are done")
        return folder
    job = _hand_in(array, members, missing, wish, dependency)
    print(f"array          {job}: {len(missing)} runs, {len(members) - len(missing)} were done before")
    print(f"follow them    dist-train runs --output-dir {folder}, dist-train status {missing[0].run.path}")
    return folder


def _hand_in(
    array: RunDir, members: Sequence[Member], missing: Sequence[Member], wish: Wish, dependency: str | None
) -> str:
    """Make the runs that are not there, and submit those that are missing. Returns the array's job."""
    is_new = not array.path.exists()
    made: list[RunDir] = []
    try:
        for member in missing:
            if not member.run.config.is_file():
                made.append(member.run)
                make_run(member.recipe, list(member.words), wish)
            elif not member.run.code.is_dir():
                snapshot(member.run.code, None)  # it was begun on this machine
        array.logs.mkdir(parents=True, exist_ok=True)
        write_json(array.path / MEMBERS, {"runs": [member.run.name for member in members]})
        indices = ",".join(str(member.index) for member in missing)
        write_atomic(array.job_script, script_of(array, wish, dependency, array=indices, code=missing[0].run.code))
        with signals_held():
            job = client.submit(array.job_script)
            record = {"submitted": round(time.time(), 3), "script": str(array.job_script)}
            write_json(array.job, {**record, "jobs": [job]})
            for member in missing:
                log = array.logs / f"slurm-{job}_{member.index}.log"
                write_json(member.run.job, {**record, "jobs": [f"{job}_{member.index}"], "log": str(log)})
    except client.NoAnswerError:
        raise
    except BaseException:
        for path in [array.path] if is_new else [run.path for run in made]:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return job
