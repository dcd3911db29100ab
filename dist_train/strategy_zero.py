"""zero1, zero2, zero3: DeepSpeed's ZeRO (Rajbhandari et al. 2020), and where each rank's part of the state lies in it.

Works on the DeepSpeed engine that engine.py makes; imports neither deepspeed nor accelerate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.held import Held, allocate_state, whole
from dist_train.task import Batch


class Zero:
    """Optimizer state sharded (stage 1), gradients too (2), parameters too (3)."""

    def __init__(self, engine: Any, stage: int, rank: int, full_gradient: Callable[[nn.Parameter], Tensor]) -> None:
        """engine: what deepspeed.initialize returned."""
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = stage
        self._rank = rank
        self._full_gradient = full_gradient
        self.module: nn.Module = engine.module
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        # DeepSpeed would scale the loss of fp16 a second time, by a scaler that it makes for itself.
        self._zero.torch_autocast_gradscaler = None
        self._clip_norm = float(self._zero.clip_grad)
        self._order = _FixedOrder(self._zero, [p for p in self.module.parameters() if p.requires_grad])

    def forward(self, batch: Batch) -> Any:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        # The engine's own division by the number of micro-batches is left out: the loss is divided already.
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Stage 1 reduces at the boundary; stages 2 and 3 reduce each micro-batch and keep their part."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._order.begin()
        yield

    def step(self, loss_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Clip, update and drop the gradients. Returns (norm of the whole gradient, 1.0 if it was not finite).

        DeepSpeed looks at its norm on the host in each step and skips by itself.
        """
        if loss_scale is not None:
            # Its norm is of scaled gradients; the fused optimizer takes the scale out.
            self._zero.clip_grad = self._clip_norm * float(loss_scale)
            self.optimizer.grad_scale = loss_scale  # type: ignore[attr-defined]
        self._engine.step()
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float64, device=self._engine.device)
        if loss_scale is not None:
            norm = norm / loss_scale
        return norm, (~torch.isfinite(norm)).double()

    def zero_grad(self) -> None:
        self._zero.zero_grad()

    def warm_up(self, run: Callable[[], None]) -> None:
        """The buckets follow the order of the backward pass from the first step on."""

    def weights(self) -> list[Held]:
        named = self.module.named_parameters()
        if self._stage < 3:
            return [whole(name, parameter) for name, parameter in named]
        return [self._part(name, parameter, parameter.ds_tensor) for name, parameter in named]  # type: ignore[attr-defined]

    def _part(self, name: str, parameter: Any, flat: Tensor) -> Held:
        """Stage 3: this rank's slice of ceil(numel / world) elements, without the padding at its end."""
        size = parameter.ds_tensor.ds_numel
        start = min(self._rank * size, parameter.ds_numel)
        length = min(size, parameter.ds_numel - start)
        return Held(name, tuple(parameter.ds_shape), start, flat.detach().view(-1)[:length], False)

    @contextlib.contextmanager
    def changing_weights(self, for_good: bool) -> Iterator[list[Held]]:
        """Whole copies that are gathered are let go before, and the fp32 partitions follow after, if it is for good."""
        if self._stage == 3:
            self._zero._partition_all_parameters()
        yield self.weights()
        if for_good:
            self._zero.refresh_fp32_params()
        if self._stage == 3 and self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def optimizer_state(self) -> list[Held]:
        held: list[Held] = []
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                held.extend(self._state_of(name, parameter))
        return held

    def _state_of(self, name: str, parameter: Any) -> Iterator[Held]:
        for kind, value in sorted(self._flat_state(parameter).items()):
            if not isinstance(value, Tensor):
                continue
            if value.ndim == 0:
                yield Held(f"{kind}/{name}", (), 0, value.view(-1), True)
            elif self._stage == 3:
                _, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
                yield self._part(f"{kind}/{name}", parameter, value.narrow(0, offset, numel))
            elif parameter._hp_mapping is not None:
                place, target = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                part = value.narrow(0, target.start, target.numel)
                yield Held(f"{kind}/{name}", tuple(parameter.shape), place.start, part, False)

    def _flat_state(self, parameter: Any) -> dict[str, Any]:
        """The optimizer state of the flat fp32 partition that holds (part of) the parameter."""
        if self._stage == 3:
            group = self._zero.grad_position[self._zero.get_param_id(parameter)][0]
            flat = self._zero.fp32_partitioned_groups_flat[group]
        else:
            flat = self._zero.single_partition_of_fp32_groups[self._group_of[id(parameter)]]
        return self.optimizer.state.get(flat, {})

    @property
    def _group_of(self) -> dict[int, int]:
        return {id(p): index for index, group in enumerate(self._zero.bit16_groups) for p in group}

    def allocate_optimizer_state(self, kinds: Iterable[str]) -> None:
        if self._stage == 3:
            allocate_state(self.optimizer, self._zero.fp32_partitioned_groups_flat, kinds)
        else:
            allocate_state(self.optimizer, self._zero.single_partition_of_fp32_groups, kinds)
            self._zero._lazy_init_hp_params_optimizer_state()

    def full_gradients(self) -> dict[str, Tensor]:
        """A collective for each."""
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return {name: self._full_gradient(parameter) for name, parameter in named}


class _FixedOrder:
    """Hands gradients to DeepSpeed in one order on all ranks, whatever order the backward pass makes them in.

    DeepSpeed (0.19) lays gradients into its buckets as they come and sums the buckets over the ranks by position. The
    order can differ by rank: an LSTM over packed rows has another graph where the rows have other lengths. Then the
    gradients of different parameters are added up, without a word (seen under stage 2 at 4 ranks).
    """

    def __init__(self, zero: Any, parameters: list[nn.Parameter]) -> None:
        self._reduce = zero.reduce_ready_partitions_and_remove_grads
        self._finish = zero.overlapping_partition_gradients_reduce_epilogue
        zero.reduce_ready_partitions_and_remove_grads = self._arrived
        zero.overlapping_partition_gradients_reduce_epilogue = self._ended
        # About the order of a backward pass, so that few have to wait.
        self._order = [id(parameter) for parameter in reversed(parameters)]
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._next = 0

    def begin(self) -> None:
        """A micro-batch begins."""
        self._next = 0

    def _arrived(self, parameter: nn.Parameter, *group: int) -> None:
        self._waiting[id(parameter)] = (parameter, *group)
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._reduce(*self._waiting.pop(self._order[self._next]))
            self._next += 1

    def _ended(self) -> None:
        """The backward pass is over: what waited for a parameter without a gradient goes now."""
        for key in self._order:
            if key in self._waiting:
                self._reduce(*self._waiting.pop(key))
        self._finish()
