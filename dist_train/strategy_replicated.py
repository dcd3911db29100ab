"""single and ddp: every rank holds the whole model; gradients are summed over the ranks (Li et al. 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.held import Held, allocate_state, whole
from dist_train.task import Batch


class Replicated:
    """The module as it is, or inside DDP when there is more than one rank."""

    autocast_caches = True

    def __init__(
        self, module: nn.Module, wrapped: nn.Module, make_optimizer: Callable[..., torch.optim.Optimizer], bf16: bool
    ) -> None:
        """bf16: sum the gradients over the ranks in bf16."""
        self.module = module
        self._wrapped = wrapped
        self._ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        if self._ddp is not None and bf16:
            self._ddp.register_comm_hook(None, lambda _, bucket: _averaged_in_bf16(bucket))
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.leaves = [parameter for _, parameter in trained]
        self.optimizer = make_optimizer(trained)

    def forward(self, batch: Batch) -> Any:
        return self._wrapped(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """The gradients travel with the last micro-batch of the step."""
        with contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync():
            yield

    def collect_gradients(self) -> None:
        """They are where the optimizer looks for them."""

    def zero_grad(self) -> None:
        for parameter in self.leaves:
            parameter.grad = None

    def warm_up(self, run: Callable[[], None]) -> None:
        """DDP lays out its buckets anew after the first backward; without this one the first step after a resume would
        sum in another order than the same step of an uninterrupted run."""
        if self._ddp is not None:
            run()

    def weights(self) -> list[Held]:
        return [whole(name, parameter) for name, parameter in self.module.named_parameters()]

    @contextlib.contextmanager
    def changing_weights(self, for_good: bool) -> Iterator[list[Held]]:
        yield self.weights()

    def optimizer_state(self) -> list[Held]:
        state = self.optimizer.state
        return [
            whole(f"{kind}/{name}", value)
            for name, parameter in self.module.named_parameters()
            # Sorted: a loaded state has its kinds in another order than one that grew; the files shall be the same.
            for kind, value in sorted(state.get(parameter, {}).items())
            if isinstance(value, Tensor)
        ]

    def allocate_optimizer_state(self, kinds: Iterable[str]) -> None:
        allocate_state(self.optimizer, self.leaves, kinds)

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}


def _averaged_in_bf16(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's own hook for this refuses gloo."""
    sent = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))
