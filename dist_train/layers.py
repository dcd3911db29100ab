"""The layers of a model, from the embeddings to the head: how deep each parameter lies, and freezing what is to be."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dist_train.blocks import repeated_blocks
from dist_train.config import OptimConfig
from dist_train.errors import ConfigError
from dist_train.parameter_groups import Layers


def prepare_layers(model: nn.Module, is_head: Callable[[str], bool] | None, config: OptimConfig) -> Layers:
    """Find the layers and freeze what `config` says; ConfigError where the model has not what its keys need.

    Before the model is wrapped: DDP and ZeRO lay out the gradients once, of what is trainable then. So gradual
    unfreezing is no freezing, but a learning rate of 0 (see `group_parameters`): the gradients are there from the first
    step on, and count in the gradient norm and in Adam's moments.

    is_head: whether a parameter, by its name, is of the head; None where the task does not say.
    """
    layers = find_layers(model, is_head)
    _check(layers, config)
    if config.freeze is not None:
        highest = layers.num_blocks if config.freeze == "backbone" else config.freeze
        for name, parameter in model.named_parameters():
            if layers.depth[name] <= highest:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"optim.freeze is {config.freeze}, which leaves nothing to train in this model: set it to null."
            )
    return layers


def find_layers(model: nn.Module, is_head: Callable[[str], bool] | None) -> Layers:
    """Outside of the repeated blocks, what comes before the last of them and every embedding table is depth 0; what
    follows it (a final norm, a pooler) learns as the last block does."""
    blocks = repeated_blocks(model)
    block_of = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = list(model.named_parameters())
    last = max((place for place, (_, p) in enumerate(named) if id(p) in block_of), default=-1)
    depth = {}
    for place, (name, parameter) in enumerate(named):
        if is_head is not None and is_head(name):
            depth[name] = len(blocks) + 1
        elif id(parameter) in block_of:
            depth[name] = block_of[id(parameter)] + 1
        else:
            depth[name] = 0 if place < last or id(parameter) in tables else len(blocks)
    return Layers(depth, len(blocks))


def _check(layers: Layers, config: OptimConfig) -> None:
    keys = ("head_lr", "layer_decay", "freeze", "unfreeze_every_steps")
    given = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    for key, value in given.items():
        stated = f"optim.{key} is {value}, but"
        if layers.num_blocks + 1 not in layers.depth.values():
            raise ConfigError(
                f"{stated} this recipe does not say which parameters of the model are its head: give its task a method "
                f"is_head(name), or set optim.{key} to null."
            )
        if layers.num_blocks == 0 and key != "head_lr" and value != "backbone":
            raise ConfigError(
                f"{stated} this model has no repeated blocks to count (two or more layers of one class in a ModuleList "
                f"or Sequential): set optim.{key} to null."
            )
    if isinstance(config.freeze, int) and config.freeze > layers.num_blocks:
        raise ConfigError(
            f"optim.freeze is {config.freeze}, but this model has {layers.num_blocks} blocks: set it to "
            f"{layers.num_blocks} or less, or to backbone."
        )
