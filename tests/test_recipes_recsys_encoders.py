"""No state of a session knows what comes after it."""

from __future__ import annotations

import pytest
import torch

from recipes.recsys.config import ModelConfig
from recipes.recsys.encoders import build_encoder


@pytest.mark.parametrize("kind", ["transformer", "gru", "lstm", "last"])
def test_what_comes_later_changes_no_state_before_it(kind: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(kind=kind, width=16), 8).eval()  # type: ignore[arg-type]
    states, gaps = torch.randn(3, 6, 16), torch.randint(0, 9, (3, 6))
    before = encoder(states, gaps)
    states[:, 4:], gaps[:, 4:] = 9.0, 1
    after = encoder(states, gaps)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize(("kind", "reads"), [("transformer", True), ("gru", True), ("lstm", True), ("last", False)])
def test_only_what_reads_sessions_looks_back(kind: str, reads: bool) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(kind=kind, width=16), 8).eval()  # type: ignore[arg-type]
    states, gaps = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.long)
    before = encoder(states, gaps)
    states[:, 0] = 9.0
    assert torch.allclose(before[:, 5], encoder(states, gaps)[:, 5]) != reads
