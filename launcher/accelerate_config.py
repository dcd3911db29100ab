"""LaunchPlan to a complete Accelerate config, the command line that starts the ranks, and their environment."""

from __future__ import annotations

import os
import sys
from typing import Any

from dist_train.hardware import Hardware, find_gpu
from dist_train.plan import LaunchPlan
from dist_train.rundir import LAUNCHER_PID, RunDir

WORKER = "dist_train.worker"
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def accelerate_config(plan: LaunchPlan) -> dict[str, Any]:
    """Every key that Accelerate would otherwise take from the user's global default file."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": ("MULTI_GPU" if plan.device == "cuda" else "MULTI_CPU") if plan.world_size > 1 else "NO",
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "gpu_ids": "all",  # CUDA_VISIBLE_DEVICES of worker_environment has chosen already
        "machine_rank": 0,
        # 0: Accelerate takes a free port, so several runs share a machine.
        "main_process_port": 0,
        "main_training_function": "main",
        "mixed_precision": _MIXED_PRECISION[plan.precision],
        "num_machines": plan.nodes,
        "num_processes": plan.world_size,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": plan.device == "cpu",
    }


def launch_command(plan: LaunchPlan, run: RunDir, arguments: tuple[str, ...] = ()) -> list[str]:
    """The argv that starts all ranks of this machine.

    GPUs: accelerate launch. CPU ranks: torchrun, since accelerate launch starts one process there unless MPI is
    installed. One CPU rank: the worker itself.
    """
    worker = ["-m", WORKER, str(run.path), *arguments]
    if plan.device == "cuda":
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(run.accelerate_config)]
        return [sys.executable, "-P", *launch, *worker]
    if plan.world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        return [sys.executable, "-P", *torchrun, f"--nproc-per-node={plan.processes_per_node}", *worker]
    return [sys.executable, "-P", "-u", *worker]


def worker_environment(plan: LaunchPlan, hardware: Hardware) -> dict[str, str]:
    """The environment of the ranks: ours, without what would override the plan."""
    environment = {
        name: value
        for name, value in os.environ.items()
        # A variable left by another launcher must not change what was planned.
        if not name.startswith(("ACCELERATE_", "TORCHELASTIC_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    # The working directory may hold packages named like ours (slurm/, recipes/).
    environment["PYTHONSAFEPATH"] = "1"
    environment[LAUNCHER_PID] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(plan.threads_per_process))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if plan.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if plan.nodes == 1:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        words = plan.gpu_ids or tuple(gpu.uuid for gpu in hardware.gpus)
        chosen = [find_gpu(hardware.gpus, word) for word in words]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in chosen[: plan.processes_per_node] if gpu)
    return environment
