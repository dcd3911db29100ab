"""The seam between toolkit and recipe."""

from __future__ import annotations

import torch

from dist_train.task import weighted_sum


def test_a_row_of_weight_zero_adds_nothing_even_if_its_loss_is_nan() -> None:
    loss = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    total = weighted_sum(loss, torch.tensor([2.0, 0.0, 1.0]))
    total.backward()
    assert total.item() == 5.0
    assert loss.grad is not None
    assert loss.grad[0] == 2.0
