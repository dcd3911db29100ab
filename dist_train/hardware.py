"""What this machine offers: cores, memory, GPUs. Torch-free, so that a plan needs no torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import psutil

from dist_train.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    memory_gib: float


@dataclass(frozen=True)
class Hardware:
    host: str
    cpu: str
    cores: int
    """Cores that this process may use."""
    memory_gib: float
    gpus: tuple[Gpu, ...] = ()
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order."""


def detect_hardware() -> Hardware:
    return Hardware(
        host=platform.node(),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=visible_gpus(_all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
    )


def machine_id() -> str:
    """The same for all that runs on one machine, whatever name it has there; another one after each boot."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return platform.node()


def visible_gpus(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Filter and order by CUDA_VISIBLE_DEVICES: indices or (prefixes of) UUIDs; as in CUDA, the first unknown
    entry hides itself and all that follow."""
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    first = visible.split(",")[0].strip()
    if gpus and first not in ("", "-1", "none", "NoDevFiles") and find_gpu(gpus, first) is None:
        known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES is {visible}, but the GPUs here are {known}: name some of them (parts of a GPU, "
            "MIG, are not supported), or leave it empty to train on the CPU."
        )
    for word in visible.split(","):
        found = find_gpu(gpus, word.strip())
        if found is None:
            break
        chosen.append(found)
    return tuple(chosen)


def find_gpu(gpus: tuple[Gpu, ...], word: str) -> Gpu | None:
    """The GPU of an index or of a UUID's beginning."""
    for gpu in gpus:
        if word == str(gpu.index) or (word.startswith("GPU-") and gpu.uuid.startswith(word)):
            return gpu
    return None


def _all_gpus() -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(pynvml: object, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    return Gpu(
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),  # type: ignore[attr-defined]
        name=str(pynvml.nvmlDeviceGetName(handle)),  # type: ignore[attr-defined]
        memory_gib=round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),  # type: ignore[attr-defined]
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # other systems than Linux have no such file
    return platform.processor() or platform.machine()
