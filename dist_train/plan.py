"""make_plan: config and hardware to the numbers of a launch. Pure arithmetic and refusals; torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_train.config import RunConfig
from dist_train.data import num_micro_batches
from dist_train.errors import ConfigError
from dist_train.fit import (
    CPU_SHARE,
    Fit,
    ModelFacts,
    Need,
    budget_bytes,
    candidates,
    fit,
    gib,
    smallest_accumulation,
    too_large,
)
from dist_train.hardware import Hardware

# On a CPU small micro-batches win: rows of one length need no padding, and no kernel is starved by few rows.
_CPU_ROWS = 8


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch decides, as a value that can be printed, saved and compared before anything runs."""

    device: str
    strategy: str
    precision: str
    nodes: int
    processes_per_node: int
    threads_per_process: int
    gpu_ids: tuple[str, ...]
    global_batch_size: int
    micro_batch_size: int
    """Most rows of one micro-batch."""
    micro_batches: int
    """Micro-batches of each rank in a full step."""
    rows: int
    steps_per_epoch: int
    steps: int
    """Optimizer steps of the whole schedule."""
    offload: str | None = None
    communication: str = "fp32"
    """Precision in which gradients are summed over the ranks."""
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    memory_budget: int | None = None
    """Bytes that one rank may hold; None where the model was not measured before the plan was made."""
    fits: tuple[Fit, ...] = ()
    """What was looked at, one for each strategy; the plan's own is the one of its strategy."""
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def equation(self) -> str:
        """How the global batch is made, for people."""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        parts = self.world_size * self.micro_batches
        mean = self.global_batch_size / parts
        batches = f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}"
        size = f"{mean:g}" if mean == int(mean) else f"{mean:.2f} on average"
        return (
            f"{self.global_batch_size} samples a step = {ranks} x {batches} x {size} (at most {self.micro_batch_size})"
        )

    @property
    def dtypes(self) -> dict[str, str]:
        """In which precision what is computed, kept and sent: one meaning under every strategy."""
        sent = self.communication if self.world_size > 1 else "none: one rank"
        return {"compute": self.precision, "parameters": "fp32", "optimizer": "fp32", "communication": sent}

    def to_json(self) -> dict[str, Any]:
        epochs = round(self.steps / self.steps_per_epoch, 3)
        return {
            **asdict(self),
            "world_size": self.world_size,
            "equation": self.equation,
            "dtypes": self.dtypes,
            "epochs": epochs,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> LaunchPlan:
        fields = {name: value[name] for name in LaunchPlan.__dataclass_fields__ if name in value}
        fields["fits"] = tuple(Fit.from_json(entry) for entry in fields.get("fits", ()))
        return LaunchPlan(**{**fields, "gpu_ids": tuple(fields["gpu_ids"]), "notes": tuple(fields["notes"])})


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    train_rows: int,
    world_size: int | None = None,
    facts: ModelFacts | None = None,
) -> LaunchPlan:
    """The launch of `config` on `hardware`. ConfigError for what cannot run, with the key to change.

    `world_size` is given where somebody else has started the ranks already (a bare `accelerate launch`). `facts` of
    model and data let the plan choose by memory; without them it takes the least sharding and refuses nothing for it.
    """
    notes: list[str] = []
    device = "cuda" if hardware.gpus else "cpu"
    processes = _processes_per_node(config, hardware, world_size)
    world = config.parallel.nodes * processes
    asked = config.parallel.strategy
    if asked == "single" and world > 1:
        raise ConfigError(
            f"parallel.strategy is single, but {world} ranks were asked for: "
            "set parallel.strategy to ddp or auto, or parallel.processes_per_node to 1."
        )
    if asked not in ("single", "auto") and world == 1:
        notes.append(f"parallel.strategy {asked} on one rank shards nothing")
    train = config.train
    if train.global_batch_size < world:
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, but {world} ranks need at least one sample each: "
            f"raise it to {world} or more, or lower parallel.processes_per_node."
        )
    if train.global_batch_size % world:
        notes.append(f"{train.global_batch_size} samples do not divide by {world} ranks: the ranks' shares are uneven")
    precision = planned_precision(config, device)
    if precision == "fp16" and device == "cpu":
        raise ConfigError("train.precision is fp16, which needs a GPU: set it to fp32 or bf16 (or auto).")
    least = asked if asked != "auto" else "ddp" if world > 1 else "single"
    chosen = _Way(least, *_micro_batches(config, device, world))
    budget: int | None = None
    fits: list[Fit] = []
    if facts is not None:
        budget = budget_bytes(hardware, processes)
        need = need_of(config, device, world)
        if hardware.gpus and hardware.memory_gib:
            need = replace(need, host_bytes=int(CPU_SHARE * hardware.memory_gib * 2**30 / processes))
        chosen, fits = _fitting(need, facts, asked, chosen, config.train.micro_batch_size == "auto", budget)
        notes.append(_why(chosen, fits, asked, budget))
    steps_per_epoch = -(-train_rows // train.global_batch_size)
    if train.steps is None and train.epochs is None:
        raise ConfigError("train.steps and train.epochs are both null: give one of them, for example train.epochs=3.")
    steps = train.steps or (train.epochs or 0) * steps_per_epoch
    if train.global_batch_size > train_rows:
        notes.append(f"train.global_batch_size is above the {train_rows} training rows: every step trains all of them")
    return LaunchPlan(
        device=device,
        strategy=chosen.strategy,
        precision=precision,
        nodes=config.parallel.nodes,
        processes_per_node=processes,
        threads_per_process=max(1, hardware.cores // processes),
        gpu_ids=tuple(config.parallel.gpu_ids or ()),
        global_batch_size=train.global_batch_size,
        micro_batch_size=chosen.micro_batch_size,
        micro_batches=chosen.micro_batches,
        rows=train_rows,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        offload=config.parallel.offload,
        communication=config.parallel.communication,
        activation_checkpointing=train.activation_checkpointing,
        compile=train.compile,
        deterministic=train.deterministic,
        memory_budget=budget,
        fits=tuple(fits),
        notes=tuple(notes),
    )


def planned_precision(config: RunConfig, device: str) -> str:
    if config.train.precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return config.train.precision


@dataclass(frozen=True)
class _Way:
    strategy: str
    micro_batch_size: int
    micro_batches: int


def need_of(config: RunConfig, device: str, world: int) -> Need:
    return Need(
        world_size=world,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        evaluation_rows=config.eval.batch_size,
        optimizer_states=2 if config.optim.name == "adamw" else 1,
        ema=config.train.ema_decay is not None,
        offload=config.parallel.offload,
        bf16_communication=config.parallel.communication == "bf16",
        overlaps=device == "cuda",
        checkpointing=config.train.activation_checkpointing,
        optim=config.optim,
        compiles=config.train.compile,
    )


def _fitting(
    need: Need, facts: ModelFacts, asked: str, wanted: _Way, free: bool, budget: int
) -> tuple[_Way, list[Fit]]:
    """The first strategy that fits, with the fewest micro-batches where their number is the plan's to choose (`free`);
    and what was looked at: every strategy, for the table. ConfigError when what was asked for does not fit."""

    def look(strategy: str) -> Fit:
        if free:
            return smallest_accumulation(need, facts, strategy, wanted.micro_batches, budget)
        return fit(need, facts, strategy, wanted.micro_batches, wanted.micro_batch_size, budget)

    allowed = candidates(need, asked)
    others = () if need.offload is not None else candidates(need, "auto")
    seen = {strategy: look(strategy) for strategy in dict.fromkeys((*others, *allowed))}
    for strategy in allowed:
        found = seen[strategy]
        if found.fits:
            return _Way(strategy, found.micro_batch_size, found.micro_batches), list(seen.values())
    raise too_large(need, facts, [seen[strategy] for strategy in allowed], budget, free)


def _why(chosen: _Way, fits: list[Fit], asked: str, budget: int) -> str:
    peak = next(entry.estimate.peak for entry in fits if entry.strategy == chosen.strategy)
    text = f"{chosen.strategy} needs {gib(peak)} of {gib(budget)} a rank"
    if asked != "auto":
        return text
    less = [entry.strategy for entry in fits if not entry.fits]
    before = f"; {', '.join(less)} would not fit" if less else ""
    return f"auto chose the least sharding that fits: {text}{before}"


def _processes_per_node(config: RunConfig, hardware: Hardware, world_size: int | None) -> int:
    parallel = config.parallel
    if world_size is not None:
        asked = parallel.processes_per_node
        if asked is not None and asked * parallel.nodes != world_size:
            raise ConfigError(
                f"parallel.processes_per_node x parallel.nodes is {asked * parallel.nodes}, but the launcher started "
                f"{world_size} ranks: set parallel.processes_per_node to null, or start as many ranks."
            )
        return world_size // parallel.nodes
    available = len(parallel.gpu_ids or hardware.gpus)
    count = parallel.processes_per_node or available or 1
    if hardware.gpus and parallel.nodes == 1 and count > available:
        raise ConfigError(
            f"parallel.processes_per_node is {count}, but {available} GPUs are chosen: lower it, or look at "
            "CUDA_VISIBLE_DEVICES and parallel.gpu_ids."
        )
    return count


def _micro_batches(config: RunConfig, device: str, world_size: int) -> tuple[int, int]:
    """(cap in rows, number of micro-batches of each rank)."""
    size = config.train.global_batch_size
    per_rank = -(-size // world_size)
    given = config.train.micro_batch_size
    if given != "auto":
        return min(given, per_rank), num_micro_batches(size, world_size, min(given, per_rank))
    if device == "cuda":
        return per_rank, 1
    return per_rank, max(1, round(per_rank / _CPU_ROWS))
