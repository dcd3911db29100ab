"""The typed run configuration: one frozen model per section, each field explained under itself. Torch-free.

A recipe subclasses RunConfig and narrows `data`, `model` and `task` to its own section types.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _flag(value: Any) -> Any:
    # YAML 1.1 reads `on`, `yes` and `off` as booleans; here only the two words that everybody reads alike count.
    if isinstance(value, bool) or value in ("true", "false"):
        return value in (True, "true")
    raise ValueError("write true or false")


Flag = Annotated[bool, BeforeValidator(_flag)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

# What `slurm` holds goes into #SBATCH lines and into one shell script: each kind of value allows only what can mean
# nothing else there.
# One word that sbatch, bash and squeue all read as it is; no leading dash, no blank, no quote, no $ and no backtick.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@%+=/\[\]-]*$", max_length=512)]
# Constraints also have operators.
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,:@+=*&|()\[\]-]*$", max_length=512)]
_TIME = r"^(\d+-)?\d{1,4}(:\d{1,2}){0,2}$"


def _time_limit(value: Any) -> Any:
    if isinstance(value, str) and not re.match(_TIME, value):
        raise ValueError(f"slurm.time is {value}, but must be minutes, HH:MM:SS or D-HH:MM:SS")
    return value


Time = Annotated[str, BeforeValidator(_time_limit), Field(pattern=_TIME)]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
# A line of the script as the site wants it: any characters but a line end or another control character.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=2000)]
# The same as the first word of a command or as the value of an option.
NoOption = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*$", max_length=2000)]
SbatchLine = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[^\x00-\x1f\x7f]*)?$", max_length=2000)]


def path_field(default: Any, hub_name: bool = False, **options: Any) -> Any:
    """A field that holds one or several local paths: `~` and `$VARS` expand, and a relative path is taken
    from the folder of the file that set it (from the working directory when the command line did).

    hub_name: what is no path that exists may be the name of a model on a hub.
    """
    return Field(default, json_schema_extra={"format": "path", "hub_name": hub_name}, **options)


class Section(BaseModel):
    """A config section: immutable, unknown keys refused, each field documented by the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class CachedData(Section):
    """The keys of `data` that say where prepared data lies and may be looked for: a recipe's own data section builds on
    it. None of them changes what the data is: `model_dump(exclude=set(CachedData.model_fields))` leaves them out."""

    cache_dir: Path = path_field(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dist-train")
    """Folder of prepared data and hub downloads, keyed by content; by default below XDG_CACHE_HOME, else ~/.cache."""
    stage_to: Path | None = path_field(None)
    """Node-local disk: one rank of each node copies the prepared data there and all read that; null: no copy."""
    offline: Flag = False
    """Ask nothing of the hub: what was not downloaded before is named. HF_HUB_OFFLINE=1 does the same."""

    @model_validator(mode="after")
    def _staged_elsewhere(self) -> Self:
        if self.stage_to is not None and self.stage_to.absolute() == self.cache_dir.absolute():
            raise ValueError(
                f"data.stage_to is {self.stage_to}, which is data.cache_dir itself: name a folder on the node's own "
                "disk, or set data.stage_to to null"
            )
        return self


class TrainConfig(Section):
    global_batch_size: Positive = 64
    """Samples of one optimizer step over all ranks; the result depends on this number, never on the hardware."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Most samples that one rank runs in one forward pass. auto: the most that fits, by the plan."""
    steps: Positive | None = None
    """Optimizer steps to train; null when `epochs` is given."""
    epochs: Positive | None = None
    """Passes over the training split; null when `steps` is given."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; parameters stay fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    stop_after_steps: Positive | None = None
    """Stop early at this step with the schedule of the full length unchanged (staged runs); null trains to the end."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the weights, used for evaluation; lower in the first steps,
    so that short trainings have one too. null turns it off."""
    activation_checkpointing: Flag = False
    """Keep only the inputs of each block and compute the rest again in the backward pass: less memory, more time."""
    compile: Flag = False
    """Compile each block with torch.compile, for any row length; the first steps then take longer."""
    deterministic: Flag = False
    """Deterministic GPU kernels: the same bits on every run of the same hardware, at the price of speed."""
    profile: Positive | None = None
    """Profile so many steps of each start on every rank, into the run's folder `profile`; null profiles none."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps and self.epochs:
            raise ValueError("train.steps and train.epochs are both set: keep one and set the other to null")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay of matrices; biases and norms are never decayed."""
    beta1: Share = 0.9
    """AdamW: decay of the first moment."""
    beta2: Share = 0.999
    """AdamW: decay of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW: added to the denominator."""
    momentum: Share = 0.9
    """SGD: momentum."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_share: Share = 0.06
    """Share of all steps over which the learning rate rises linearly from 0."""
    final_lr_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the last step as a share of `lr` (cosine and linear)."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest global gradient norm; null turns clipping off."""
    head_lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the head, which the task adds to a pretrained model; null takes `lr`."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Factor on the learning rate of a layer for each block that lies above it; null gives all layers one rate."""
    freeze: Literal["backbone"] | Annotated[int, Field(ge=0)] | None = None
    """Never train the embeddings and so many blocks, or the whole backbone (all but the head); null trains all."""
    unfreeze_every_steps: Positive | None = None
    """Train the head alone at first, then one block more, from the top, each so many steps; null trains all at once."""

    @model_validator(mode="after")
    def _what_is_frozen_has_no_rates(self) -> Self:
        for key, value, off in (
            ("layer_decay", self.layer_decay, (None, 1.0)),
            ("unfreeze_every_steps", self.unfreeze_every_steps, (None,)),
        ):
            if self.freeze == "backbone" and value not in off:
                raise ValueError(
                    f"optim.{key} is {value}, but optim.freeze is backbone, which trains the head alone: set "
                    f"optim.{key} to null, or optim.freeze to null or a number of blocks"
                )
        return self


class ParallelConfig(Section):
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp"] = "auto"
    """How training is spread over the ranks; the result is the same. auto: the least sharding that fits."""
    offload: Literal["optimizer", "parameters"] | None = None
    """Keep the optimizer's state (zero1 to zero3), or parameters too (zero3), in the CPU's memory; null: neither."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """In what precision gradients are summed over the ranks; bf16 halves the bytes and changes the result a little."""
    deepspeed_config: Path | None = path_field(None)
    """Your own DeepSpeed JSON to build on (zero1, zero2, zero3); what contradicts the recipe is refused."""
    accelerate_config: Path | None = path_field(None)
    """Your own Accelerate YAML to build on; what contradicts the recipe is refused."""
    nodes: Positive = 1
    """Number of machines."""
    processes_per_node: Positive | None = None
    """Ranks on each machine: GPUs, or CPU processes where there is no GPU. null: every visible GPU, else 1."""
    gpu_ids: list[str] | None = None
    """GPUs to use, as indices or UUIDs; null uses CUDA_VISIBLE_DEVICES, or every GPU."""
    timeout_s: Positive = 600
    """Longest wait for the other ranks in one collective before the run ends and names the missing rank."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        allowed = {"optimizer": ("zero1", "zero2", "zero3"), "parameters": ("zero3",), None: (self.strategy,)}
        if self.strategy not in allowed[self.offload]:
            raise ValueError(
                f"parallel.offload is {self.offload}, which goes with parallel.strategy "
                f"{' or '.join(allowed[self.offload])}, not with {self.strategy}: set parallel.strategy to "
                f"{allowed[self.offload][-1]}, or parallel.offload to null"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_config_needs_zero(self) -> Self:
        if self.deepspeed_config is not None and not self.strategy.startswith("zero"):
            raise ValueError(
                f"parallel.deepspeed_config is given, but parallel.strategy is {self.strategy}: set it to zero1, zero2 "
                "or zero3, or parallel.deepspeed_config to null"
            )
        return self


class CheckpointConfig(Section):
    every_steps: Positive | None = None
    """Save each time so many steps are done; null leaves it to `every_minutes` and the end of training."""
    every_minutes: Annotated[float, Field(gt=0.0)] | None = 10.0
    """Save when so many minutes have passed since the last save; null turns it off."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that are kept; the best one is kept beside them."""
    asynchronous: Flag = True
    """Write from a copy in the background: training stops for the copy alone; false: it stops for the whole save."""


class EvalConfig(Section):
    every_steps: Positive | None = None
    """Evaluate the validation split each time so many steps are done; null evaluates at the end of each epoch."""
    metric: str | None = None
    """Validation metric that picks the best checkpoint; null takes the recipe's own choice."""
    patience: Positive | None = None
    """Stop after so many evaluations without a better metric; null never stops early."""
    batch_size: Positive = 256
    """Rows of one forward pass in evaluation, on each rank."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap samples behind each 95 % interval."""


class TrackConfig(Section):
    log_every_steps: Positive = 10
    """Write a line of training metrics each time so many steps are done."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode. auto: WANDB_MODE if set, online with a key, else offline."""
    project: str | None = None
    """W&B project; null takes WANDB_PROJECT, else dist-train."""
    entity: str | None = None
    """W&B team or user; null takes WANDB_ENTITY, else the account's default."""
    group: str | None = None
    """W&B group, for runs that belong together; null takes WANDB_RUN_GROUP, else none."""
    job_type: str | None = None
    """W&B job type; null takes WANDB_JOB_TYPE, else train."""
    tags: list[str] = []
    """W&B tags; [] takes WANDB_TAGS, else none."""
    upload: Literal["metrics", "tables", "all"] = "metrics"
    """What leaves the machine: metrics alone, also per-class tables, or also the report."""


class SlurmConfig(Section):
    account: Word | None = None
    """Account that is charged."""
    partition: Word | None = None
    """Partition; null takes the cluster's default."""
    qos: Word | None = None
    """Quality of service."""
    time: Time | None = None
    """Time limit as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS; null takes the partition's own."""
    constraint: Constraint | None = None
    """Features that every node must have, for example `a100&nvlink`."""
    memory: Memory | None = None
    """Memory of each node, for example 64G; 0 is all of it; null takes the partition's own."""
    cpus_per_node: Positive | None = None
    """CPU cores of each node for all its ranks; null takes the partition's own."""
    nodelist: Word | None = None
    """Nodes to use, for example n[01-04]."""
    exclude: Word | None = None
    """Nodes not to use."""
    exclusive: Flag = False
    """Share the nodes with no other job."""
    reservation: Word | None = None
    """Reservation."""
    mail_user: Word | None = None
    """Address that is told of begin, end and failure."""
    dependency: Word | None = None
    """Jobs to wait for, as sbatch writes them, for example afterok:1234."""
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for. none: a cluster of CPUs, where ranks are processes."""
    gpu_type: Word | None = None
    """Type of GPU to ask for, for example a100."""
    gpu_memory: str | None = Field(default=None, pattern=r"^\d+(\.\d+)?(GiB|GB|G)$")
    """Memory of one GPU there, for example 80GiB: what the plan is made for; null plans as for this machine."""
    extra: list[SbatchLine] = []
    """More options of sbatch, each as `--name=value`; one that the script has already is replaced."""
    modules: list[Word] = []
    """Environment modules to load."""
    setup: list[Line] = []
    """Lines of shell that run on the first node before anything else, for example `source ~/env/bin/activate`."""
    environment: dict[str, Line] = {}
    """Variables for the ranks."""
    python: NoOption | None = None
    """Python of the nodes; null takes the one that submits."""
    container_image: NoOption | None = None
    """Container to run in: an image file or address."""
    container: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the container."""
    container_mounts: list[Line] = []
    """Folders that the container sees beside the run's own, as FROM:TO."""
    stop_early_s: Annotated[int, Field(ge=10, le=3600)] = 120
    """So long before the time limit the step under way is ended and saved, and the job requeues itself."""
    requeues: Annotated[int, Field(ge=0, le=1000)] = 50
    """How often a job may start itself again, after a time limit or a lost node; Slurm's own requeues come on top."""
    restarts: Annotated[int, Field(ge=0, le=100)] = 3
    """How often ranks that crashed or hang are started again within the job without a checkpoint in between."""

    @model_validator(mode="after")
    def _variables_have_names(self) -> Self:
        for name in self.environment:
            if not name.isidentifier() or not name.isascii():
                raise ValueError(f"slurm.environment names {name!r}: a variable has letters, digits and _ alone")
        return self

    @model_validator(mode="after")
    def _type_needs_a_form(self) -> Self:
        if self.gpu_type is not None and self.gpus == "none":
            raise ValueError("slurm.gpu_type is given, but slurm.gpus is none: set it to gres or gpus-per-node")
        return self


class RunConfig(Section):
    recipe: str
    """The recipe package that reads the data, builds the model and scores it."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Name of the run and of its directory below `output_dir`; null makes one of recipe and time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, sample order, augmentation and dropout."""
    output_dir: Path = path_field(Path("runs"))
    """Folder that holds the run directories."""
    ladder: list[str] | None = None
    """Rungs that `dist-train ablate` compares, each `NAME: key=value key=value` on top of those before; null: none."""
    data: CachedData = CachedData()
    """Where the data comes from and how it is split (the recipe's own keys)."""
    model: Section = Section()
    """The model (the recipe's own keys)."""
    task: Section = Section()
    """The loss and what the task needs beside data and model (the recipe's own keys)."""
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _compile_needs_whole_blocks(self) -> Self:
        if self.train.compile and self.parallel.strategy == "zero3":
            raise ValueError(
                "train.compile is true, but under parallel.strategy zero3 DeepSpeed's hooks fetch the weights inside "
                "each block, which torch.compile cannot trace: set train.compile to false, or parallel.strategy to fsdp"
            )
        return self
