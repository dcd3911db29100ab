"""dist-train scale: a recipe's training timed at several sizes, in turn and interleaved, and what more ranks bring."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dist_train import config_io
from dist_train.config import RunConfig
from dist_train.errors import BusyError, ConfigError, Preempted, ToolkitError
from dist_train.events import read_lines
from dist_train.hardware import Hardware, detect_hardware
from dist_train.rundir import RunDir, read_json, write_json
from dist_train.scaling import Repeat, Size, fit, summarise
from dist_train.track_study import track_study
from launcher import scale_report
from launcher.allocated import check_in_allocation, in_foreign_allocation
from launcher.start import git_state, run_for_a_check
from launcher.study import study_folder

_PROFILED_STEPS = 3
# What happens once is over by then: the measurement of memory, in the third step, and the profile, from the fifth.
_LEAST_WARM_UP = 8
_COMPARED_STEPS = 10


@dataclass(frozen=True)
class Asked:
    """A study as it was typed."""

    recipe: str
    settings: tuple[str, ...]
    sizes: tuple[Size, ...]
    mode: str
    """strong: the global batch stays; weak: each rank's share of it stays."""
    steps: int
    warm_up: int
    repeats: int
    price_per_hour: float | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": list(self.settings), "sizes": [size.name for size in self.sizes]}


def parse_sizes(gpus_per_node: str, nodes: str, strategies: str, known: Sequence[str]) -> tuple[Size, ...]:
    """Every combination, the fewest ranks first. ConfigError for a word that is no number or strategy."""
    counts = [_numbers("--gpus-per-node", gpus_per_node), _numbers("--nodes", nodes)]
    names = strategies.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigError(f"--strategy is {strategies}, but {wrong[0]!r} is none of {', '.join(known)}.")
    sizes = {Size(name, many, each) for name, many, each in itertools.product(names, counts[1], counts[0])}
    return tuple(sorted(sizes, key=lambda size: (names.index(size.strategy), size.ranks, size.nodes)))


def scale(asked: Asked, is_resumed: bool) -> int:
    """Time what is missing, then table, page and files. Returns the exit code: that of the first failure, else 0."""
    config = config_io.load(asked.recipe, list(asked.settings)).config
    hardware = detect_hardware()
    _check(asked, config, hardware)
    folder = study_folder(config, asked.recipe, "scale")
    _begin(folder, asked, is_resumed)
    failed = _measure_all(asked, folder, config, hardware)
    measured = {size: _repeats_of(asked, folder, size) for size in asked.sizes}
    if not any(measured.values()):
        return next(iter(failed.values())).exit_code
    cores = 0 if hardware.gpus else hardware.cores
    entries = summarise(measured, asked.mode, asked.price_per_hour, cores)
    ahead = [2 * asked.sizes[-1].ranks, 4 * asked.sizes[-1].ranks]
    fits = {
        name: found
        for name in dict.fromkeys(size.strategy for size in asked.sizes)
        if (found := fit([entry for entry in entries if entry["strategy"] == name], asked.mode, ahead)) is not None
    }
    study = {
        "name": folder.name,
        "asked": asked.to_json(),
        "git": git_state(),
        "hardware": {"host": hardware.host, "cpu": hardware.cpu, "cores": hardware.cores}
        | {"gpus": [gpu.name for gpu in hardware.gpus]},
        "threads_per_rank": int(_variables(asked, hardware).get("OMP_NUM_THREADS", 1)),
        "global_batch_size": config.train.global_batch_size,
        "sizes": entries,
        "fits": fits,
        "failed": {name: f"{error.title}: {error}" for name, error in failed.items()},
    }
    scale_report.write(folder, study)
    by_name = {size.name: found for size, found in measured.items()}
    sync = track_study(folder, study, by_name, config)
    if sync is not None:
        print(f"W&B            offline; upload with: {sync}")
    return next(iter(failed.values())).exit_code if failed else 0


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise ConfigError(
            f"{option} is {text}, but must be whole numbers from 1 with commas between, for example 1,2,4."
        )
    return found


def _check(asked: Asked, config: RunConfig, hardware: Hardware) -> None:
    if asked.warm_up < _LEAST_WARM_UP:
        raise ConfigError(f"--warm-up is {asked.warm_up}, but the first {_LEAST_WARM_UP} steps are not like the rest.")
    most = max(size.ranks for size in asked.sizes)
    several = [size for size in asked.sizes if size.nodes > 1]
    if not in_foreign_allocation():
        if several:
            raise ConfigError(
                f"--nodes asks for {several[-1].nodes} machines, but this is one: ranks of one machine are no nodes. "
                f"Type it inside an allocation: salloc -N{several[-1].nodes} dist-train scale ..."
            )
        there = len(hardware.gpus) or hardware.cores
        if most > there:
            what = "GPUs" if hardware.gpus else "cores"
            raise ConfigError(f"--gpus-per-node asks for {most} ranks, but there are {there} {what}: ranks that share "
                              "one tell nothing about scaling.")  # fmt: skip
    if config.train.global_batch_size < most and asked.mode == "strong":
        raise ConfigError(
            f"train.global_batch_size is {config.train.global_batch_size}, fewer than the {most} ranks of the largest "
            "size: raise it, or ask for --mode weak."
        )


def _begin(folder: Path, asked: Asked, is_resumed: bool) -> None:
    known = folder / "asked.json"
    if known.is_file():
        before = read_json(known)
        if not is_resumed:
            raise BusyError(f"{folder} has a study already. Go on with it: --resume. Or give another one: name=...")
        if before["asked"] != asked.to_json():
            changed = [key for key in before["asked"] if before["asked"][key] != asked.to_json()[key]]
            raise ConfigError(f"{folder} was asked for otherwise ({', '.join(changed)}): type the same, or name=...")
    elif is_resumed:
        raise ConfigError(f"--resume: {folder} has no study yet.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, {"asked": asked.to_json()})


def _measure_all(asked: Asked, folder: Path, config: RunConfig, hardware: Hardware) -> dict[str, ToolkitError]:
    """Every repeat of every size that is missing. Repeats are the outer loop and go to and fro, so that what changes on
    the machine meanwhile meets all sizes alike. Returns what failed, by its run's name."""
    failed: dict[str, ToolkitError] = {}
    for repeat in range(asked.repeats):
        for size in asked.sizes if repeat % 2 == 0 else asked.sizes[::-1]:
            run = _run_of(folder, size, repeat)
            if _result(run).is_file():
                continue
            print(f"\n== {size.name}, repeat {repeat + 1} of {asked.repeats} ==", flush=True)
            shutil.rmtree(run.path, ignore_errors=True)
            state = {"load": os.getloadavg()[0], "clock_mhz": _clock_mhz()}
            try:
                with _environment(_variables(asked, hardware)):
                    words = [f"train.profile={_PROFILED_STEPS}"] if repeat == 0 else []
                    _time(asked.recipe, [*_settings_of(asked, config, size, run), *words])
                    measured = _read(run, asked, state)
                    if _has_dropout(config):
                        loss = _loss_without_dropout(asked, config, size, folder) if repeat == 0 else None
                        measured = replace(measured, loss=loss)
                write_json(_result(run), {**asdict(measured), "size": size.name})
            except (Preempted, BusyError):
                print(f"\nGo on with the study {folder}: the same command with --resume", file=sys.stderr)
                raise
            except ToolkitError as error:
                failed[run.name] = error
                print(f"{error.title}: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(run.checkpoints, ignore_errors=True)
    return failed


def _time(recipe: str, words: list[str]) -> None:
    """Train without a report: here, or on the nodes of the allocation that this is typed in."""
    (check_in_allocation if in_foreign_allocation() else run_for_a_check)(recipe, words, "--speed")


def _has_dropout(config: RunConfig) -> bool:
    return bool(getattr(config.model, "dropout", 0))


def _loss_without_dropout(asked: Asked, config: RunConfig, size: Size, folder: Path) -> float:
    """The last loss of a short training, the same at every size: dropout draws other masks on each rank."""
    few = replace(asked, warm_up=0, steps=_COMPARED_STEPS)
    run = RunDir(folder / f"{size.name}-loss")
    shutil.rmtree(run.path, ignore_errors=True)
    _time(asked.recipe, [*_settings_of(few, config, size, run), "model.dropout=0"])
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    last = max((line for line in read_lines(run.metrics) if line["split"] == "train"), key=lambda line: line["step"])
    return float(last["loss"])


def _settings_of(asked: Asked, config: RunConfig, size: Size, run: RunDir) -> list[str]:
    """What a size changes, and what has no place in a measured training."""
    batch = config.train.global_batch_size
    if asked.mode == "weak":
        batch = batch * size.ranks // min(other.ranks for other in asked.sizes)
    # What is logged of a step is read one step later.
    last = asked.warm_up + asked.steps + 1
    return [
        *asked.settings,
        f"name={run.name}",
        f"output_dir={run.path.parent}",
        f"parallel.strategy={size.strategy if size.ranks > 1 or size.strategy != 'ddp' else 'single'}",
        f"parallel.nodes={size.nodes}",
        f"parallel.processes_per_node={size.per_node}",
        f"train.global_batch_size={batch}",
        f"train.stop_after_steps={last}",
        f"eval.every_steps={last + 1}",
        *("checkpoint.every_steps=null", "checkpoint.every_minutes=null"),
        *("track.log_every_steps=1", "track.wandb=disabled"),
    ]


def _variables(asked: Asked, hardware: Hardware) -> dict[str, str]:
    """On a CPU a rank is a part of the machine that is the same at every size."""
    if hardware.gpus or "OMP_NUM_THREADS" in os.environ:
        return {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    return {"OMP_NUM_THREADS": str(max(1, hardware.cores // max(size.per_node for size in asked.sizes)))}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _run_of(folder: Path, size: Size, repeat: int) -> RunDir:
    return RunDir(folder / f"{size.name}-r{repeat}")


def _result(run: RunDir) -> Path:
    return run.path / "speed.json"


def _repeats_of(asked: Asked, folder: Path, size: Size) -> list[Repeat]:
    files = [_result(_run_of(folder, size, repeat)) for repeat in range(asked.repeats)]
    found = [read_json(path) for path in files if path.is_file()]
    names = Repeat.__dataclass_fields__
    return [Repeat(**{**{name: record[name] for name in names}, "step_s": tuple(record["step_s"])}) for record in found]


def _read(run: RunDir, asked: Asked, state: dict[str, Any]) -> Repeat:
    """From the lines of the measured steps."""
    lines = [
        line
        for line in read_lines(run.metrics)
        if line["split"] == "train" and asked.warm_up <= line["step"] <= asked.warm_up + asked.steps
    ]
    before, lines = lines[:1], lines[1:]
    if len(lines) < asked.steps:
        raise ConfigError(
            f"only {len(lines)} of {asked.steps} steps were there to be measured: train.steps or train.epochs is too "
            f"small for --steps {asked.steps} after --warm-up {asked.warm_up}."
        )
    samples = np.diff([line["samples"] for line in (*before, *lines)])
    step_s = samples / np.array([line["samples_per_s"] for line in lines])
    memory = read_json(run.path / "memory.json") if (run.path / "memory.json").is_file() else None
    files = [run.events, *run.logs.glob("events-node*.jsonl")]
    started = [record for file in files for record in read_lines(file) if record["event"] == "rank_started"]
    return Repeat(
        step_s=tuple(step_s.tolist()),
        samples=int(samples.sum()),
        tokens=round(float(step_s @ [line["tokens_per_s"] for line in lines])),
        input_wait_share=float(step_s @ [line["input_wait_share"] for line in lines] / step_s.sum()),
        padding_share=sum(line["padding_share"] for line in lines) / len(lines),
        loss=lines[-1]["loss"],
        memory_gib=lines[-1]["memory_gib"] if memory is None else memory["measured"] / 2**30,
        predicted_gib=None if memory is None else memory["predicted"]["peak"] / 2**30,
        split=_split(run),
        shares_one_host=len({record["machine"] for record in started}) == 1,
        **state,
    )


def _split(run: RunDir) -> dict[str, float] | None:
    """Shares of a profiled step, means over the ranks; None where this repeat was not profiled."""
    ranks = [read_json(path) for path in sorted(run.profile.glob("rank*.json"))]
    if not ranks:
        return None
    parts = [{**rank["phases_s"], "exposed communication": rank["exposed_communication_s"]} for rank in ranks]
    shares = {name: sum(part[name] / rank["seconds"] for part, rank in zip(parts, ranks, strict=True)) / len(ranks)
              for name in parts[0]}  # fmt: skip
    return {**shares, "rest": 1.0 - sum(shares.values())}


def _clock_mhz() -> float | None:
    found = psutil.cpu_freq()
    return round(found.current, 1) if found else None
