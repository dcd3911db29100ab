"""The softmax in blocks is the full one, and the sampled one is nearly so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipes.recsys import losses
from recipes.recsys.losses import full_softmax, sampled_softmax


@pytest.mark.parametrize("items", [1, 255, 10_000])
def test_the_softmax_in_blocks_equals_the_full_one(items: int) -> None:
    torch.manual_seed(0)
    queries, table = torch.randn(300, 64) * 0.3, torch.randn(items, 64)
    targets = torch.randint(0, items, (300,))
    weight = torch.rand(300)
    gradients = []
    values = []
    for loss in (
        lambda q, w, t: full_softmax(q, w, t, None, None),
        lambda q, w, t: F.cross_entropy(q @ w.T, t, reduction="none"),
    ):
        leaves = queries.clone().requires_grad_(), table.clone().requires_grad_()
        value = loss(*leaves, targets)
        (value * weight).sum().backward()
        values.append(value.detach())
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_a_block_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.Tensor.exp_

    def watched(value: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, value.numel())
        return plain(value)

    monkeypatch.setattr(torch.Tensor, "exp_", watched)
    queries = torch.randn(512, 8, requires_grad=True)
    table = torch.randn(50_000, 8, requires_grad=True)
    full_softmax(queries, table, torch.zeros(512, dtype=torch.long), None, None).sum().backward()
    assert 0 < largest <= losses._CPU_LOGITS


def test_drawn_items_estimate_the_softmax_over_all() -> None:
    torch.manual_seed(0)
    queries, table = torch.randn(50, 16) * 0.5, torch.randn(400, 16)
    targets = torch.randint(0, 400, (50,))
    share = torch.rand(400) + 0.1
    share /= share.sum()
    drawn = torch.multinomial(share, 200_000, replacement=True)
    expected = torch.log(share[drawn] * len(drawn))
    estimate = sampled_softmax(queries, table[targets], targets, table[drawn], drawn, expected)
    exact = F.cross_entropy(queries @ table.T, targets, reduction="none")
    torch.testing.assert_close(estimate, exact, rtol=0.02, atol=0.02)


def test_a_target_is_no_negative_of_its_own() -> None:
    queries, table = torch.ones(1, 2), torch.ones(3, 2)
    drawn = torch.tensor([1, 1, 1])
    loss = sampled_softmax(queries, table[[1]], torch.tensor([1]), table[drawn], drawn, torch.zeros(3))
    assert loss.item() == 0.0


def test_items_out_of_reach_are_not_held_against_a_query() -> None:
    torch.manual_seed(0)
    items, order = 3000, torch.randperm(3000).int()
    reach = torch.randint(1, items, (20,)).int()
    targets = torch.stack([torch.nonzero(order < each)[0, 0] for each in reach])
    leaves = torch.randn(20, 8, requires_grad=True), torch.randn(items, 8, requires_grad=True)
    value = full_softmax(*leaves, targets, order, reach)
    hidden = order >= reach[:, None]
    plain = F.cross_entropy((leaves[0] @ leaves[1].T).masked_fill(hidden, -torch.inf), targets, reduction="none")
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(value.sum(), leaves)
    for mine, theirs in zip(ours, torch.autograd.grad(plain.sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
