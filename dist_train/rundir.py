"""The run directory: where each file of a run lies, who may use it, and how its files are written whole.

Torch-free, so that the launcher and the worker share it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.errors import BusyError, ConfigError, StorageError, UnsafeInputError

# Names the launcher's process to its ranks, which do not outlive it.
LAUNCHER_PID = "DIST_TRAIN_LAUNCHER_PID"
ATTEMPT = "DIST_TRAIN_ATTEMPT"
"""The attempt that ranks belong to: another machine may not see yet what was written of it."""
CODE = "DIST_TRAIN_CODE"
"""The folder whose modules a user's `-m` command is to find, where it is not the working directory."""
MODEL_RECORD = "dist_train.json"
"""What a model folder says of its model; no other folder has it."""

_LOOK_AGAIN_S = 0.5


class RunDir:
    """The paths of one run below `<output_dir>/<name>/`."""

    def __init__(self, path: str | Path, node_rank: int = 0) -> None:
        """node_rank: whose own files are meant. Node 0 has the run's; each other node has some of its own, since
        appending to one file from several machines loses lines on a network file system."""
        self.path = Path(path).absolute()
        self.node_rank = node_rank
        self.config = self.path / "config.yaml"
        self.plan = self.path / "plan.json"
        self.commands = self.path / "commands.sh"
        self.environment = self.path / "environment.json"
        self.data_facts = self.path / "data.json"
        self.init_from = self.path / "init_from.json"
        self.metrics = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.events = self.path / "events.jsonl" if node_rank == 0 else self.logs / f"events-node{node_rank}.jsonl"
        self.launcher_log = self.logs / ("launcher.log" if node_rank == 0 else f"launcher-node{node_rank}.log")
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions"
        self.bandwidth = self.path / "bandwidth.json"
        self.latency = self.path / "latency.json"
        self.profile = self.path / "profile"
        self.parity = self.path / "parity"
        self.best = self.path / "best"
        self.model_record = self.best / MODEL_RECORD
        self.report_json = self.path / "report.json"
        self.report_md = self.path / "report.md"
        self.report_html = self.path / "report.html"
        self.accelerate_config = self.path / "accelerate.yaml"
        self.deepspeed_config = self.path / "deepspeed.json"
        self.heartbeats = self.path / ".heartbeats"
        self.wandb_id = self.path / "wandb_id"
        self.code = self.path / "code"
        self.job = self.path / "job.json"
        self.planned = self.path / "planned.json"
        self.job_script = self.path / "job.sh"
        self.head = self.path / ".head.json"
        self.absent = self.path / ".absent.json"
        self.head_pid = self.path / ".head.pid"
        self._lock_file = self.path / ".lock"

    @property
    def name(self) -> str:
        return self.path.name

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def evaluation(self, step: int) -> RunDir:
        """Where predictions and report of a checkpoint lie that is not the best one."""
        return RunDir(self.path / "evaluations" / f"step-{step:08d}")

    def prediction_file(self, split: str) -> Path:
        """split: train, validation or test; or test/NAME, the test split under another condition."""
        return self.predictions / f"{split.replace('/', '-')}.parquet"

    def conditions(self) -> dict[str, Path]:
        """The predictions of the test split under other conditions, by their names."""
        return {path.stem.removeprefix("test-"): path for path in sorted(self.predictions.glob("test-*.parquet"))}

    def forget_conditions(self) -> None:
        """Those of an earlier evaluation may be of other conditions."""
        for path in self.conditions().values():
            path.unlink()

    def create(self, files: Mapping[str, str] | None = None) -> None:
        """Make the directory with these files (name: text) in it, whole or not at all, so that whatever kills us leaves
        either a run that can be resumed or a free name.

        BusyError when the name exists, StorageError when the place cannot be written.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / self.logs.name).mkdir(parents=True)
            for name, text in (files or {}).items():
                write_atomic(temporary / name, text)
            os.rename(temporary, self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and self.path.parent.is_dir():
                raise name_taken(self.path) from error
            raise unwritable(self.path, error) from error
        except StorageError as error:
            if isinstance(error.__cause__, OSError):
                raise unwritable(self.path, error.__cause__) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def locked(self, patience_s: float = 0.0) -> Iterator[None]:
        """Hold the directory for one live run. BusyError when another process holds it for longer than patience_s.

        A POSIX record lock: it works across hosts where the file system's locks do, and ends with its process.
        """
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            deadline = time.monotonic() + patience_s
            while self.is_locked() and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN_S)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = self._lock_file.read_text(errors="replace").strip() or "another process"
                raise BusyError(
                    f"{self.path} is in use by a live run ({holder}); nothing was touched.\n"
                    "Wait for it to end, or stop it (Ctrl-C saves first), then resume."
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> tuple[int, str] | None:
        """Process and host that hold the directory, or held it last."""
        try:
            _, pid, _, host = self._lock_file.read_text(errors="replace").split()
            return int(pid), host
        except (OSError, ValueError):
            return None

    def is_locked(self) -> bool:
        """Whether a live run of another process holds the directory; takes no lock itself."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR)
        except OSError:
            return False
        try:
            os.lockf(descriptor, os.F_TEST, 0)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    @staticmethod
    def any_kind(path: str | Path) -> RunDir:
        """The run at `path`, of a recipe or of a user's own script. ConfigError when it is neither."""
        run = RunDir(path)
        return run if run.plan.is_file() else RunDir.existing(path)

    @staticmethod
    def existing(path: str | Path) -> RunDir:
        """The run at `path`. ConfigError when that is no run directory."""
        run = RunDir(path)
        if not run.config.is_file():
            raise ConfigError(
                f"{run.path} is not a run directory: it has no config.yaml.\n"
                "`dist-train runs` lists the runs below output_dir."
            )
        return run


def find_model_folder(path: str | Path) -> Path:
    """The model folder at `path`, or best/ of the run there. ConfigError when there is none, UnsafeInputError
    when code lies in it."""
    given = Path(path).expanduser()
    for folder in (given, given / "best"):
        if (folder / MODEL_RECORD).is_file():
            _refuse_code(folder)
            return folder
    if (given / "config.yaml").is_file():
        raise ConfigError(
            f"the run {given} has no model folder yet: train it to its end with dist-train resume {given}"
        )
    raise ConfigError(f"{given} is neither a run directory nor a model folder: it has no {MODEL_RECORD} and no best/.")


def _refuse_code(folder: Path) -> None:
    """A recipe.yaml could name its own folder as the recipe, whose modules would then be run."""
    code = next(folder.rglob("*.py"), None)
    if code is not None:
        raise UnsafeInputError(
            f"{folder} holds Python code, {code.name}: a model folder is data, and nothing in it is run. Remove the "
            "file; a recipe of your own lies elsewhere, or is installed."
        )


def name_taken(path: Path) -> BusyError:
    return BusyError(
        f"the run {path} exists already; nothing in it was touched.\n"
        f"To go on with it:   dist-train resume {path}\n"
        "To start another:   give it another name=..., or a script of your own another --name"
    )


def unwritable(path: Path, error: OSError, key: str = "output_dir") -> StorageError:
    """The StorageError for a place that cannot be written, before there is a run to go on with. key: what chooses it, a
    key of the config or a word of the command."""
    is_of_config = key == "output_dir" or "." in key
    of_config = f"folder with {key}=... (the site file can set it once for all runs)"
    return StorageError(
        f"{path} cannot be written: {_cause(error)}.\nChoose another {of_config if is_of_config else key}."
    )


def default_run_name(recipe: str, now: float) -> str:
    """Recipe and local time, for example `ticket_routing-20260131-174502`."""
    return f"{Path(recipe).name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that `path` holds the whole of it or what it held before, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json_text(value))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. StorageError when the file is missing or damaged."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is missing or damaged: {error}. The run cannot be used without it.") from error
    return value


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def fsync_folder(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError for a write to `path` that failed with `error`."""
    return StorageError(
        f"{path} could not be written: {_cause(error)}.\n"
        f"Mend that, then go on with `dist-train resume`. What was committed before is kept. Device: {path.parent}"
    )


def _cause(error: OSError) -> str:
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
