"""The learning rate is a pure function of the step, and decay is for matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config import OptimConfig
from dist_train.layers import find_layers
from dist_train.optim import lr_at, make_optimizer


def _rates(total: int = 100, **settings: Any) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)
    return [lr_at(step, total, config) for step in range(total)]


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    rates = _rates(warmup_share=0.1)
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_line_and_a_constant_do_what_they_are_called() -> None:
    assert _rates(schedule="linear", warmup_share=0.0)[50] == pytest.approx(0.5)
    assert set(_rates(schedule="constant", warmup_share=0.0)) == {1.0}
    assert _rates(schedule="linear", warmup_share=0.0, final_lr_share=0.2)[-1] == pytest.approx(0.208)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_schedules_train_too(total: int) -> None:
    assert all(rate > 0 for rate in _rates(total, warmup_share=0.5))


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight.requires_grad = False
    trained = [(name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad]
    groups = make_optimizer(trained, OptimConfig(weight_decay=0.1), find_layers(model, None)).param_groups
    decayed, plain = groups
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert [tuple(parameter.shape) for parameter in plain["params"]] == [(3,)] * 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_one_step_is_that_of_the_formula(name: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.9)
    model.weight.grad = torch.full_like(model.weight, 2.0)
    make_optimizer(model.named_parameters(), config, find_layers(model, None)).step()
    # AdamW: decay 1 - lr * wd, then the first step's size is lr. SGD: lr * (gradient + wd * weight).
    expected = 1 - 0.1 * 0.5 - 0.1 if name == "adamw" else 1 - 0.1 * (2.0 + 0.5)
    assert model.weight.item() == pytest.approx(expected, abs=1e-6)
