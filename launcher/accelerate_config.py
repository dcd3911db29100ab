"""LaunchPlan to a complete Accelerate config, the command line that starts the ranks, and their environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.hardware import Hardware, find_gpu
from dist_train.rank_environment import is_foreign, strategy_environment
from dist_train.rundir import LAUNCHER_PID, RunDir

WORKER = "dist_train.worker"
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", None: "no"}
# Blocks of at least so many parameters become one FSDP group, in a model that Transformers does not know.
_FSDP_MIN_NUM_PARAMS = 1_000_000


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of several nodes meet, as one node sees it."""

    node_rank: int
    host: str
    """A name or address of node 0."""
    port: int
    interface: str | None
    """This node's network interface towards the others; None leaves the choice to the libraries."""


class Ranks(Protocol):
    """What a launch must say about its ranks: a LaunchPlan, or a ScriptPlan of a user's own script."""

    @property
    def device(self) -> str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def precision(self) -> str | None: ...
    @property
    def offload(self) -> str | None: ...
    @property
    def nodes(self) -> int: ...
    @property
    def processes_per_node(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def threads_per_process(self) -> int: ...
    @property
    def gpu_ids(self) -> tuple[str, ...]: ...
    @property
    def activation_checkpointing(self) -> bool: ...
    @property
    def deterministic(self) -> bool: ...


def accelerate_config(ranks: Ranks, deepspeed_file: Path, zero3_init: bool = False) -> dict[str, Any]:
    """Every key that Accelerate would otherwise take from the user's global default file.

    zero3_init: have a script's model built in shards under zero3.
    """
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": distributed_type(ranks),
        "downcast_bf16": "no",
        "dynamo_config": {"dynamo_backend": "NO"},
        "enable_cpu_affinity": False,
        "gpu_ids": "all",  # CUDA_VISIBLE_DEVICES of worker_environment has chosen already
        "machine_rank": 0,
        # 0: Accelerate takes a free port, so several runs share a machine.
        "main_process_port": 0,
        "main_training_function": "main",
        "num_machines": ranks.nodes,
        "num_processes": ranks.world_size,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": ranks.device == "cpu",
    }
    if config["distributed_type"] == "DEEPSPEED":
        # Beside a DeepSpeed file Accelerate refuses mixed_precision and every key that the file has too.
        config["deepspeed_config"] = {
            "deepspeed_config_file": str(deepspeed_file),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": zero3_init and ranks.strategy == "zero3",
        }
    else:
        config["mixed_precision"] = _MIXED_PRECISION[ranks.precision]
    if config["distributed_type"] == "FSDP":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
            "fsdp_min_num_params": _FSDP_MIN_NUM_PARAMS,
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": False,
            "fsdp_activation_checkpointing": ranks.activation_checkpointing,
        }
    return config


def distributed_type(ranks: Ranks) -> str:
    """Accelerate's word for the strategy."""
    if ranks.strategy.startswith("zero"):
        return "DEEPSPEED"
    if ranks.strategy == "fsdp":
        return "FSDP"
    if ranks.world_size == 1:
        return "NO"
    return "MULTI_GPU" if ranks.device == "cuda" else "MULTI_CPU"


def launch_command(
    ranks: Ranks,
    run: RunDir,
    arguments: Sequence[str] = (),
    module: str = WORKER,
    rendezvous: Rendezvous | None = None,
) -> list[str]:
    """The argv that starts all ranks of this machine, each of which runs `module` with the run and `arguments`.

    GPUs: accelerate launch. CPU ranks: torchrun, since accelerate launch starts one process there unless MPI is
    installed. One CPU rank that needs no process group: the module itself.
    """
    worker = ["-m", module, str(run.path), *arguments]
    if ranks.device == "cuda":
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(run.accelerate_config)]
        if rendezvous is not None:
            # On the command line, since all nodes share the file.
            launch += ["--machine_rank", str(rendezvous.node_rank), "--main_process_ip", rendezvous.host]
            launch += ["--main_process_port", str(rendezvous.port)]
        return [sys.executable, "-P", *launch, *worker]
    if ranks.world_size > 1 or ranks.strategy not in ("single", "ddp"):
        torchrun = ["-m", "torch.distributed.run"]
        if rendezvous is None:
            torchrun += ["--standalone", "--local-addr=127.0.0.1"]
        else:
            torchrun += [f"--nnodes={ranks.nodes}", f"--node-rank={rendezvous.node_rank}"]
            torchrun += [f"--master-addr={rendezvous.host}", f"--master-port={rendezvous.port}"]
        return [sys.executable, "-P", *torchrun, f"--nproc-per-node={ranks.processes_per_node}", *worker]
    return [sys.executable, "-P", "-u", *worker]


def worker_environment(ranks: Ranks, hardware: Hardware, rendezvous: Rendezvous | None = None) -> dict[str, str]:
    """The environment of the ranks: ours, without what would override the plan."""
    environment = {
        name: value
        for name, value in os.environ.items()
        # A variable left by another launcher must not change what was planned.
        if not is_foreign(name)
        and not name.startswith("TORCHELASTIC_")
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    # The working directory may hold packages named like ours (slurm/, recipes/).
    environment["PYTHONSAFEPATH"] = "1"
    environment[LAUNCHER_PID] = str(os.getpid())
    if rendezvous is not None and rendezvous.interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, rendezvous.interface)
    environment.setdefault("OMP_NUM_THREADS", str(ranks.threads_per_process))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment |= strategy_environment(ranks.device, ranks.strategy, ranks.deterministic)
    if ranks.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if ranks.nodes == 1:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        words = ranks.gpu_ids or tuple(gpu.uuid for gpu in hardware.gpus)
        chosen = [find_gpu(hardware.gpus, word) for word in words]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in chosen[: ranks.processes_per_node] if gpu)
    return environment


def script_environment(ranks: Ranks, run: RunDir) -> dict[str, str]:
    """On CPU, what `accelerate launch` would have set for a user's own script: there torchrun starts the ranks.

    DeepSpeed is only chosen where Accelerate is not told to use the CPU (accelerate 1.15, state.py); the device is
    the CPU all the same, since no GPU is visible.
    """
    if ranks.device != "cpu":
        return {}
    environment = {
        "ACCELERATE_MIXED_PRECISION": _MIXED_PRECISION[ranks.precision],
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }
    if not ranks.strategy.startswith("zero"):
        return {**environment, "ACCELERATE_USE_CPU": "True"}
    return {
        **environment,
        "ACCELERATE_MIXED_PRECISION": "no",  # the DeepSpeed file holds it
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(run.deepspeed_config),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(ranks.strategy == "zero3").lower(),
    }
