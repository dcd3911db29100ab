"""fsdp: parameters, gradients and optimizer state sharded along the first axis by torch's fully_shard (FSDP2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_train.blocks import repeated_blocks
from dist_train.errors import ConfigError
from dist_train.held import Held, allocate_state
from dist_train.task import Batch


class Fsdp:
    """Each repeated block is gathered when it runs and dropped after it; what lies outside the blocks makes one more
    group. The optimizer works on the plain local shards: nothing of it needs to know of DTensors."""

    # A cached cast would keep the gathered weights of every block alive until the forward pass ends.
    autocast_caches = False

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        world_size: int,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        bf16: bool,
    ) -> None:
        """bf16: sum the gradients over the ranks in bf16."""
        scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
        if scalars:
            raise ConfigError(
                f"parallel.strategy is fsdp, which cannot shard {scalars[0]}, a parameter without a dimension: give it "
                "the shape (1,), or set parallel.strategy to zero3."
            )
        mesh = init_device_mesh(device.type, (world_size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16 else None)
        for block in repeated_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        self.module = module
        self._names: list[str] = []
        self._sharded: list[DTensor] = []
        self._locals: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor)
            self._names.append(name)
            self._sharded.append(parameter)
            self._locals.append(nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad))
        named = zip(self._names, self._locals, strict=True)
        trained = [(name, local) for name, local in named if local.requires_grad]
        self.leaves = [local for _, local in trained]
        self.optimizer = make_optimizer(trained)

    def forward(self, batch: Batch) -> Any:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Every micro-batch's gradients are reduced at once: to wait would keep them whole on each rank."""
        yield

    def collect_gradients(self) -> None:
        for sharded, local in zip(self._sharded, self._locals, strict=True):
            gradient = sharded.grad
            assert gradient is None or isinstance(gradient, DTensor)
            local.grad = None if gradient is None else gradient.to_local()

    def zero_grad(self) -> None:
        for sharded, local in zip(self._sharded, self._locals, strict=True):
            sharded.grad = local.grad = None

    def warm_up(self, run: Callable[[], None]) -> None:
        """The groups are fixed from the start."""

    def weights(self) -> list[Held]:
        return [self._held(index, self._names[index], local) for index, local in enumerate(self._locals)]

    @contextlib.contextmanager
    def changing_weights(self, for_good: bool) -> Iterator[list[Held]]:
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # what is still gathered would hide the change
        yield self.weights()

    def optimizer_state(self) -> list[Held]:
        held = []
        for index, local in enumerate(self._locals):
            for kind, value in sorted(self.optimizer.state.get(local, {}).items()):
                if isinstance(value, Tensor):
                    held.append(self._held(index, f"{kind}/{self._names[index]}", value))
        return held

    def _held(self, index: int, name: str, tensor: Tensor) -> Held:
        sharded = self._sharded[index]
        if tensor.ndim == 0:
            return Held(name, (), 0, tensor.detach().view(-1), True)
        _, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        start = min(offset[0], sharded.shape[0]) * math.prod(sharded.shape[1:])
        return Held(name, tuple(sharded.shape), start, tensor.detach().view(-1), False)

    def allocate_optimizer_state(self, kinds: Iterable[str]) -> None:
        allocate_state(self.optimizer, self.leaves, kinds)

    def full_gradients(self) -> dict[str, Tensor]:
        """A collective for each."""
        gradients = {name: sharded.grad for name, sharded in zip(self._names, self._sharded, strict=True)}
        return {name: gradient.full_tensor() for name, gradient in gradients.items() if isinstance(gradient, DTensor)}
