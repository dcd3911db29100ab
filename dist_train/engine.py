"""The only file that imports accelerate and deepspeed: ranks, devices, precision, strategies, the step, collectives."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.blocks import checkpoint_activations, compile_blocks
from dist_train.config import OptimConfig
from dist_train.errors import ConfigError
from dist_train.held import non_persistent_buffers, state_buffers
from dist_train.optim import make_optimizer
from dist_train.parameter_groups import Layers
from dist_train.plan import LaunchPlan
from dist_train.scaler import LossScaler
from dist_train.strategy_fsdp import Fsdp
from dist_train.strategy_replicated import Replicated
from dist_train.strategy_zero import Zero
from dist_train.task import Batch

Strategy = Replicated | Fsdp | Zero
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """One rank's part of the training: what differs between one process and many lies behind these methods.

    The process group is never destroyed, it ends with its process. Gloo's destructor holds the interpreter lock while
    it joins its threads, and one of them may wait for that lock to drop the last collective's tensors (torch 2.13):
    seen as a hang in one of some twenty runs.
    """

    def __init__(self, plan: LaunchPlan, timeout_s: int, deepspeed: dict[str, Any] | None = None) -> None:
        """deepspeed: the complete DeepSpeed config for zero1, zero2 and zero3."""
        self.plan = plan
        # torch's and DeepSpeed's own calls of names that torch is about to rename, one warning a collective.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        self.accelerator = _accelerator(plan, timeout_s, deepspeed)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.scaler = LossScaler(self.device) if plan.precision == "fp16" else None
        self._autocast = _AUTOCAST[plan.precision]
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
        if plan.deterministic:
            torch.use_deterministic_algorithms(True)

    def prepare(self, model: nn.Module, config: OptimConfig, layers: Layers) -> None:
        """Wrap the model and make its optimizer over what is trainable. `self.module` is the bare model: its names do
        not depend on the strategy, and what touches its weights goes through `self.strategy`."""
        plan = self.plan
        if plan.activation_checkpointing and checkpoint_activations(model) == 0:
            raise _no_blocks("train.activation_checkpointing")
        if plan.compile and compile_blocks(model) == 0:
            raise _no_blocks("train.compile")

        def optimizer(named: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
            return make_optimizer(named, config, layers)

        bf16 = plan.communication == "bf16"
        self.clip_norm = config.clip_norm
        self.strategy: Strategy
        if plan.strategy.startswith("zero"):
            self.strategy = self._prepare_zero(model, optimizer)
        elif plan.strategy == "fsdp":
            self.strategy = Fsdp(model, self.device, self.world_size, optimizer, bf16)
        else:
            model.to(self.device)
            # Every rank has made them alike: nothing to broadcast before each forward pass.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, non_persistent_buffers(model))
            self.strategy = Replicated(model, self.accelerator.prepare_model(model), optimizer, bf16)
        self.module = self.strategy.module
        self._buffers = list(state_buffers(self.module).values())
        self._floating_buffers = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self.begin_step()

    def _prepare_zero(self, model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> Zero:
        from deepspeed.utils import safe_get_full_grad

        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        wrapped, _ = self.accelerator.prepare(model, optimizer(trained))
        return Zero(wrapped, int(self.plan.strategy[-1]), self.rank, safe_get_full_grad)

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def seed(self, value: int) -> None:
        """Seed the generators that a forward pass may draw from. torch.manual_seed would also ask those of devices that
        are not there, which takes it a millisecond."""
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def forward(self, batch: Batch) -> Any:
        """The module's answer under the plan's precision. Under zero3 and fsdp every rank must call it as often."""
        if isinstance(self.strategy, Zero):
            return self.strategy.forward(batch)  # DeepSpeed has its own switch for autocast
        if self._autocast is None:
            return self.strategy.forward(batch)
        cache = self.strategy.autocast_caches
        with torch.autocast(self.device.type, self._autocast, True, cache):
            return self.strategy.forward(batch)

    def backward(self, batch: Batch, total_weight: float, last: bool) -> Tensor:
        """Add the gradient of loss_sum / total_weight of this micro-batch. Returns the loss sum, detached.

        total_weight is that of the whole step over all ranks; every strategy averages over the ranks, which the factor
        undoes. `last`: of the step.
        """
        with self.strategy.micro_batch(last):
            loss_sum = self.forward(batch)
            scaled = loss_sum * (self.world_size / total_weight)
            if self.scaler is not None:
                scaled = scaled * self.scaler.scale
            self.strategy.backward(scaled)
        return loss_sum.detach()

    def warm_up(self, batch: Batch) -> None:
        """What must run once, and be thrown away, before the first step is like all others."""

        def run() -> None:
            with self.buffers_kept():
                self.backward(batch, 1.0, last=True)
                self.strategy.zero_grad()

        self.strategy.warm_up(run)

    def probe(self, batches: list[Batch]) -> None:
        """A whole step that changes nothing: its gradient is NaN by its divisor, and such a step is skipped."""
        scale = None if self.scaler is None else self.scaler.state_dict()
        with self.buffers_kept():
            for index, batch in enumerate(batches):
                self.backward(batch, float("nan"), last=index == len(batches) - 1)
            self.step(torch.zeros(1, dtype=torch.float64, device=self.device)).read()
        if self.scaler is not None and scale is not None:
            self.scaler.load_state_dict(scale)

    @contextlib.contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """What forward passes within change in the buffers is undone at the end."""
        buffers = [buffer.clone() for buffer in self._buffers]
        yield
        for buffer, before in zip(self._buffers, buffers, strict=True):
            buffer.copy_(before)

    def begin_step(self) -> None:
        """Remember the buffers that a forward pass changes: the statistics of a BatchNorm must not keep what is not
        finite either."""
        self._before = [buffer.clone() for buffer in self._floating_buffers]

    def step(self, wishes: Tensor) -> StepOutcome:
        """Sum `wishes` [n] (float64) over the ranks, clip by the true global norm, and update the weights unless a
        gradient was not finite: decided on the device and alike on all ranks, without waiting for it."""
        scale = None if self.scaler is None else self.scaler.scale
        if isinstance(self.strategy, Zero):
            sums = self._all_reduce(wishes)
            norm, nonfinite = self.strategy.step(scale)
        else:
            sums, norm, nonfinite = self._clip_and_step(wishes, scale)
        for buffer, before in zip(self._floating_buffers, self._before, strict=True):
            buffer.copy_(torch.where(nonfinite > 0, before, buffer))
        at_bottom = torch.ones_like(norm) if self.scaler is None else self.scaler.at_bottom()
        if self.scaler is not None:
            self.scaler.update(nonfinite)
        return StepOutcome(torch.cat([sums, torch.stack([norm, nonfinite, at_bottom])]))

    def _clip_and_step(self, wishes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        strategy, optimizer = self.strategy, self.strategy.optimizer
        assert not isinstance(strategy, Zero)
        strategy.collect_gradients()
        gradients = [leaf.grad for leaf in strategy.leaves if leaf.grad is not None]
        square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if isinstance(strategy, Replicated):
            square = square / self.world_size  # every rank has the same, and adds its share
        sums = self._all_reduce(torch.cat([wishes, square[None]]))
        norm = sums[-1].sqrt() if scale is None else sums[-1].sqrt() / scale
        nonfinite = (~torch.isfinite(norm)).double()
        # The fused optimizers divide by grad_scale and skip where found_inf is set, all on the device.
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        factor = ((norm + 1e-6) / limit).clamp(min=1.0)
        optimizer.grad_scale = (factor if scale is None else factor * scale).float()  # type: ignore[attr-defined]
        optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
        optimizer.step()
        strategy.zero_grad()
        return sums[:-1], norm, nonfinite

    def _all_reduce(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, array: np.ndarray) -> np.ndarray:
        """Concatenate the ranks' arrays along the first axis, on every rank."""
        if self.world_size == 1:
            return array
        sizes = [int(size) for size in self.gather_objects(len(array))]
        padded = torch.zeros((max(sizes), *array.shape[1:]), dtype=torch.from_numpy(array[:0]).dtype)
        padded[: len(array)] = torch.from_numpy(array)
        parts = [torch.empty_like(padded, device=self.device) for _ in sizes]
        dist.all_gather(parts, padded.to(self.device))
        return np.concatenate([part[:size].cpu().numpy() for part, size in zip(parts, sizes, strict=True)])

    def gather_objects(self, value: Any) -> list[Any]:
        """One small Python value of each rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's small Python value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class StepOutcome:
    """What a step came to, on its way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[float], float, bool, bool]:
        """(sums of the wishes, gradient norm, whether it was finite, whether the loss scale can fall no further).

        Waits until the step has run; a step later it has.
        """
        if self._event is not None:
            self._event.synchronize()
        *sums, norm, nonfinite, at_bottom = self._host.tolist()
        return sums, norm, nonfinite == 0.0, at_bottom > 0.0


def _accelerator(plan: LaunchPlan, timeout_s: int, deepspeed: dict[str, Any] | None) -> Any:
    """The Accelerator of the plan. Its own mixed precision stays off: one autocast serves every strategy alike."""
    if plan.strategy != "single" and "RANK" not in os.environ:
        _make_world_of_one()
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
    cpu = plan.device == "cpu"
    if plan.strategy.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            # Without this first, Accelerate believes in a world of one on CPU ranks and DeepSpeed refuses the batch.
            PartialState(cpu=True, timeout=timeout.timeout)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed)
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=[timeout])
        # Accelerate has told transformers of it through this object, and under stage 3 from_pretrained would then make
        # shards before there is an engine. Models are built whole here, and sharded in `prepare`.
        plugin.dschf = None
        return accelerator
    reduction = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[reduction, timeout])


def join_cpu_ranks() -> None:
    """For a user's own script under ZeRO on CPU ranks, which makes a bare Accelerator() later: see `_accelerator`."""
    from accelerate import PartialState

    PartialState(cpu=True)


def _no_blocks(key: str) -> ConfigError:
    return ConfigError(
        f"{key} is true, but this model has no repeated blocks for it (two or more layers of one class in a ModuleList "
        f"or Sequential): set {key} to false."
    )


def _make_world_of_one() -> None:
    """Sharding needs a process group, also when this process was started by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(names, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
