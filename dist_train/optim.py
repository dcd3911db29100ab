"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dist_train.config import OptimConfig
from dist_train.held import allocate_state
from dist_train.parameter_groups import Layers, group_parameters


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `total_steps`.

    Linear warm-up, then a cosine (Loshchilov and Hutter 2017), a line, or a constant. The first step's rate is above 0.
    """
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * shape)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """The rate of optimizer step `step` (from 0) in each group that learns by then, and 0 in the others."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if step >= group["first_step"] else 0.0


def make_optimizer(named: Iterable[tuple[str, Tensor]], config: OptimConfig, layers: Layers) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum, over parameters or the shards of them that a rank holds,
    by their names.

    Always fused: one kernel for many tensors, which also unscales, clips and skips (engine.step).
    """
    leaves = dict(named)
    groups: list[dict[str, object]] = [
        {
            "params": [leaves[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_scale": group.lr_scale,
            "first_step": group.first_step,
        }
        for group in group_parameters([(name, leaf.ndim) for name, leaf in leaves.items()], layers, config)
    ]
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        if config.momentum:
            # Made empty by torch at the first step, and left so when that step is skipped.
            allocate_state(optimizer, leaves.values(), ["momentum_buffer"])
        return optimizer
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
