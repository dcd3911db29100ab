"""dist-train doctor: what this machine has and lacks, each lack with its fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train import config_io
from dist_train.errors import ToolkitError
from dist_train.hardware import Hardware, detect_hardware
from dist_train.yaml_data import read_file
from slurm.allocation import read_allocation

_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "safetensors", "scikit-learn", "wandb")
_LEAST_SHM_MIB = 256
_LEAST_DISK_GIB = 2

Check = tuple[str, str, str]
"""(ok | note | bad, what was found, the fix)"""


def print_checks() -> bool:
    """Print each check. Returns whether nothing is bad."""
    good = True
    hardware = detect_hardware()
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python, _packages, lambda: _devices(hardware), _network, _space, _site, _tracking, _slurm,
    )  # fmt: skip
    for check in checks:
        for level, found, fix in check():
            print(f"{level:5s} {found}")
            if level != "ok":
                print(f"      fix: {fix}")
            good = good and level != "bad"
    print("\nready." if good else "\nnot ready: mend what is marked bad.")
    return good


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    level = "ok" if sys.version_info >= (3, 11) else "bad"
    yield level, f"Python {version} at {sys.executable}", "use Python 3.11 or newer"


def _packages() -> Iterator[Check]:
    for name in _PACKAGES:
        try:
            yield "ok", f"{name} {importlib.metadata.version(name)}", ""
        except importlib.metadata.PackageNotFoundError:
            yield "bad", f"{name} is not installed", f"pip install {name}"


def _devices(hardware: Hardware) -> Iterator[Check]:
    yield "ok", f"{hardware.cpu}: {hardware.cores} cores to use, {hardware.memory_gib} GiB", ""
    for gpu in hardware.gpus:
        yield "ok", f"GPU {gpu.index}: {gpu.name}, {gpu.memory_gib} GiB, {gpu.uuid}", ""
    if not hardware.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        fix = "unset the variable" if visible is not None else "where there is a GPU, install its driver"
        yield "note", f"no GPU is visible{why}: training runs on the CPU", fix
    elif importlib.util.find_spec("torch") and "+cpu" in importlib.metadata.version("torch"):
        yield (
            "bad",
            "there are GPUs, but this torch is built for the CPU",
            "install its CUDA build (README: set-up)",
        )


def _network() -> Iterator[Check]:
    host = socket.gethostname()
    try:
        yield "ok", f"{host} resolves to {socket.gethostbyname(host)}", ""
    except OSError:
        yield "note", f"the name {host} does not resolve", "add it to /etc/hosts; needed for several machines only"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield "ok", f"a local port can be opened ({probe.getsockname()[1]})", ""


def _space() -> Iterator[Check]:
    for what, place in (("working folder", Path.cwd()), ("home", Path.home())):
        free = shutil.disk_usage(place).free / 2**30
        level = "ok" if free >= _LEAST_DISK_GIB else "note"
        yield level, f"{what} {place}: {free:.1f} GiB free", "free some space, or set output_dir and data.cache_dir"
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / 2**20
        level = "ok" if free >= _LEAST_SHM_MIB else "note"
        yield (
            level,
            f"/dev/shm: {free:.0f} MiB free",
            "give the container more (--shm-size=1g): NCCL uses it",
        )


def _site() -> Iterator[Check]:
    path = config_io.site_file()
    if not path.is_file():
        yield "ok", f"no site file ({path} would set defaults for all runs)", ""
        return
    try:
        read_file(path, str(path))
        yield "ok", f"site file {path}", ""
    except ToolkitError as error:
        yield "bad", f"site file: {error}", "mend the line that is named"


def _tracking() -> Iterator[Check]:
    mode = os.environ.get("WANDB_MODE")
    key = "with a key" if os.environ.get("WANDB_API_KEY") else "no WANDB_API_KEY"
    yield "ok", f"W&B: {f'WANDB_MODE={mode}' if mode else key}", ""


def _slurm() -> Iterator[Check]:
    job = read_allocation()
    if job is not None:
        found = f"Slurm job {job.job_id}: node {job.node_rank + 1} of {job.nodes} ({job.node_names})"
        yield "ok", f"{found}, {job.cpus_on_node} CPUs and {job.gpus_on_node or 0} GPUs here", ""
    elif shutil.which("sbatch"):
        yield "ok", "Slurm: sbatch is here", ""
    else:
        yield "ok", "no Slurm on this machine", ""
