"""The only file that imports accelerate: ranks, devices, precision, wrapping, backward, clipping and collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from dist_train.task import Batch

# Accelerate's words for the precisions.
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine:
    """One rank's part of the training: what differs between one process and many lies behind these methods.

    The process group is never destroyed, it ends with its process. Gloo's destructor holds the interpreter lock while
    it joins its threads, and one of them may wait for that lock to drop the last collective's tensors (torch 2.13):
    seen as a hang in one of some twenty runs.
    """

    def __init__(self, device: str, precision: str, timeout_s: int) -> None:
        """device: "cpu" or "cuda"; precision: "fp32", "bf16" or "fp16", each over fp32 parameters."""
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=_MIXED_PRECISION[precision],
            gradient_accumulation_steps=1,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            ],
        )
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32

    def prepare(self, model: nn.Module) -> None:
        """Move and wrap the model. `self.module` is the bare one: its names do not depend on the wrapper."""
        self.module = model
        model.to(self.device)
        self.wrapped = self.accelerator.prepare_model(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def backward(self, batch: Batch, total_weight: float, last: bool) -> Tensor:
        """Add the gradient of loss_sum / total_weight of this micro-batch. Returns the loss sum, detached.

        total_weight is that of the whole step over all ranks; DDP averages over the ranks, which the factor undoes.
        The gradients travel with the `last` micro-batch of the step.
        """
        with self._synchronised(last):
            loss_sum = self.wrapped(batch)
            scaled = loss_sum * (self.world_size / total_weight)
            if self.scaler is not None:
                scaled = self.scaler.scale(scaled)
            scaled.backward()
        return loss_sum.detach()

    def warm_up(self, batch: Batch) -> None:
        """One backward whose result is thrown away. DDP lays out its buckets anew after the first one; without this the
        first step after a resume would sum in another order than the same step of an uninterrupted run."""
        if self.world_size == 1:
            return
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        self.backward(batch, 1.0, last=True)
        self.zero_grad()
        for buffer, before in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def clip(self, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> float:
        """Clip by the true global norm and return it; inf or NaN means that the step must be skipped."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        limit = float("inf") if clip_norm is None else clip_norm
        return float(nn.utils.clip_grad_norm_(self.parameters, limit))

    def step(self, optimizer: torch.optim.Optimizer, finite: bool) -> None:
        """Update the weights if the gradients are finite, and drop the gradients in either case."""
        if self.scaler is not None:
            # The scaler skips by itself, and learns from it.
            self.scaler.step(optimizer)
            self.scaler.update()
        elif finite:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Elementwise sum over the ranks in one collective, in double precision."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

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

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if last or self.world_size == 1:
            yield
        else:
            with self.wrapped.no_sync():
                yield
