"""Layers have rates, first steps and a place in the optimizer's groups, and what a model has not is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dist_train.config import OptimConfig
from dist_train.errors import ConfigError
from dist_train.layers import find_layers, prepare_layers
from dist_train.optim import lr_at, make_optimizer, set_lr
from dist_train.parameter_groups import Layers, describe_groups
from tests.fakes import TinyTask

TASK = TinyTask(model="transformer")


def _settled(**settings: Any) -> tuple[nn.Module, Layers, OptimConfig]:
    config, model = OptimConfig(lr=1.0, weight_decay=0.1, **settings), TASK.build_model()
    return model, prepare_layers(model, TASK.is_head, config), config


def _rates(step: int, **settings: Any) -> dict[str, float]:
    """The learning rate of each parameter that is trained, at a step of a constant schedule."""
    model, layers, config = _settled(schedule="constant", warmup_share=0.0, **settings)
    named = [(name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad]
    optimizer = make_optimizer(named, config, layers)
    set_lr(optimizer, lr_at(step, 100, config), step)
    rate_of = {id(leaf): group["lr"] for group in optimizer.param_groups for leaf in group["params"]}
    return {name: rate_of[id(leaf)] for name, leaf in named}


def _lines(steps: int = 100, **settings: Any) -> list[str]:
    model, layers, config = _settled(**settings)
    named = [(name, tuple(leaf.shape), leaf.requires_grad) for name, leaf in model.named_parameters()]
    return describe_groups(named, layers, config, steps)


def test_without_keys_of_its_own_there_are_matrices_and_vectors_in_the_models_order() -> None:
    model, layers, config = _settled()
    first, second = make_optimizer(model.named_parameters(), config, layers).param_groups
    assert [id(leaf) for leaf in first["params"]] == [id(leaf) for leaf in model.parameters() if leaf.ndim >= 2]
    assert [id(leaf) for leaf in second["params"]] == [id(leaf) for leaf in model.parameters() if leaf.ndim < 2]
    assert _lines() == []


def test_each_block_below_the_head_learns_more_slowly_by_the_decay() -> None:
    rates = _rates(0, layer_decay=0.5, head_lr=3.0)
    assert rates["body.token.weight"] == 0.25
    assert rates["body.layers.0.linear1.bias"] == 0.5
    assert rates["body.layers.1.linear1.weight"] == rates["body.mix.weight"] == 1.0
    assert rates["body.head.weight"] == rates["body.head.bias"] == 3.0


def test_gradual_unfreezing_goes_down_from_the_head_a_block_at_a_time() -> None:
    first_steps = {"body.head.bias": 0, "body.mix.weight": 5, "body.layers.1.linear1.weight": 5}
    first_steps |= {"body.layers.0.norm1.weight": 10, "body.token.weight": 15}
    for step in (0, 4, 5, 9, 10, 14, 15, 50):
        rates = _rates(step, unfreeze_every_steps=5)
        assert {name: rates[name] > 0 for name in first_steps} == {name: step >= n for name, n in first_steps.items()}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [(0, {"layers.0", "layers.1", "mix", "head"}), (1, {"layers.1", "mix", "head"}), ("backbone", {"head"})],
)
def test_frozen_layers_are_out_of_the_optimizer(freeze: Any, trained: set[str]) -> None:
    names = [name.removeprefix("body.") for name in _rates(0, freeze=freeze)]
    assert {name for name in names if not any(name.startswith(f"{part}.") for part in trained)} == set()
    assert all(any(name.startswith(f"{part}.") for name in names) for part in trained)


def test_embedding_tables_and_what_stands_before_the_blocks_are_the_lowest_layer() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(4, 4)
            self.layer = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(3))
            self.relative_positions = nn.Embedding(5, 4)  # made after the blocks, as DeBERTa's are
            self.final_norm = nn.LayerNorm(4)

    depth = find_layers(Encoder(), None).depth
    assert [depth[f"{name}.weight"] for name in ("projection", "relative_positions", "final_norm")] == [0, 0, 3]
    assert depth["layer.2.linear1.weight"] == 3


def test_the_groups_are_told_in_one_line_each() -> None:
    assert _lines(20, layer_decay=0.5, head_lr=3.0, freeze=0, unfreeze_every_steps=10) == [
        "optimizer      block 0: 4 parameters of 49,152 elements, peak lr 0.5, weight decay 0.1, "
        "learns from step 21, which is after the last one (20)",
        "optimizer      block 0: 8 parameters of 832 elements, peak lr 0.5, weight decay 0, "
        "learns from step 21, which is after the last one (20)",
        "optimizer      block 1: 5 parameters of 51,712 elements, peak lr 1, weight decay 0.1, learns from step 11",
        "optimizer      block 1: 8 parameters of 832 elements, peak lr 1, weight decay 0, learns from step 11",
        "optimizer      head: 1 parameter of 120 elements, peak lr 3, weight decay 0.1, learns from step 1",
        "optimizer      head: 1 parameter of 3 elements, peak lr 3, weight decay 0, learns from step 1",
        "optimizer      embeddings: 1 parameter of 2,560 elements, frozen",
    ]
    assert _lines(freeze="backbone")[-1].startswith("optimizer      embeddings, blocks 0 to 1: 26 parameters of")


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"freeze": 3}, "transformer", "optim.freeze is 3, but this model has 2 blocks: set it to 2 or less"),
        ({"layer_decay": 0.9}, "lstm", "optim.layer_decay is 0.9, but this model has no repeated blocks"),
        ({"unfreeze_every_steps": 5}, "lstm", "optim.unfreeze_every_steps is 5, but this model has no repeated"),
    ],
)
def test_what_the_model_does_not_have_is_refused(settings: dict[str, Any], model: str, message: str) -> None:
    task = TinyTask(model=model)
    with pytest.raises(ConfigError, match=message):
        prepare_layers(task.build_model(), task.is_head, OptimConfig(**settings))


@pytest.mark.parametrize(
    "settings", [{"head_lr": 1.0}, {"layer_decay": 0.9}, {"freeze": "backbone"}, {"unfreeze_every_steps": 5}]
)
def test_every_key_of_fine_tuning_needs_a_task_that_names_its_head(settings: dict[str, Any]) -> None:
    key, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=rf"optim.{key} is {value}, but .* a method is_head\(name\)"):
        prepare_layers(TASK.build_model(), None, OptimConfig(**settings))


@pytest.mark.parametrize("settings", [{"layer_decay": 0.9}, {"unfreeze_every_steps": 5}])
def test_rates_of_a_frozen_backbone_are_refused(settings: dict[str, Any]) -> None:
    key, value = next(iter(settings.items()))
    with pytest.raises(ValidationError, match=rf"optim.{key} is {value}, but optim.freeze is backbone.* to null"):
        OptimConfig(freeze="backbone", **settings)


def test_an_lstm_can_have_a_head_of_its_own_rate_and_a_frozen_backbone() -> None:
    task = TinyTask(model="lstm")
    model = task.build_model()
    layers = prepare_layers(model, task.is_head, OptimConfig(freeze="backbone", head_lr=1.0))
    assert {name for name, leaf in model.named_parameters() if leaf.requires_grad} == {
        "body.head.weight",
        "body.head.bias",
    }
    assert torch.unique(torch.tensor(list(layers.depth.values()))).tolist() == [0, 1]
