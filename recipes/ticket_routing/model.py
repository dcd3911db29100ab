"""The module of ticket routing: the loss sum in training, probabilities in evaluation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.task import Batch, weighted_sum


class TicketClassifier(nn.Module):
    """An encoder that gives logits [rows, labels], with the loss around it."""

    def __init__(self, encoder: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """batch: token_ids [rows, tokens] int64, token_mask [rows, tokens] bool, label [rows], weight [rows]."""
        logits = self.encoder(batch["token_ids"], batch["token_mask"]).float()
        if self.training:
            losses = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=self.label_smoothing)
            return weighted_sum(losses, batch["weight"])
        return {"probability": logits.softmax(-1)}
