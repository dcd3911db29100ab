"""Models that are small, and large enough that every strategy that shards really does: for TinyTask's batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.task import Batch, weighted_sum

CLASSES, VOCABULARY, LONGEST = 3, 40, 20


class Classifier(nn.Module):
    """Logits of `body(tokens, mask)`, with the loss around it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("data", torch.ones(3), persistent=False)

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        logits = self.body(batch["tokens"], batch["mask"], batch["poison"])
        if self.training:
            self.calls += 1
            losses = F.cross_entropy(logits, batch["label"], reduction="none")
            return weighted_sum(losses, batch["weight"])
        return {"probability": logits.softmax(-1)}


class TransformerBody(nn.Module):
    """Without kinks (gelu, not relu): a unit that rounding turns on or off would make its gradient jump."""

    def __init__(self, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.token.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.mix = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.mix.weight = self.token.weight
        self.head = nn.Linear(VOCABULARY, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor, poison: Tensor) -> Tensor:
        states = self.token(tokens)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~mask)
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True) + poison[:, None]
        return self.head(torch.tanh(self.mix(pooled)))


class LstmBody(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor, poison: Tensor) -> Tensor:
        lengths = mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.token(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.head(last[-1] + poison[:, None])


class CnnBody(nn.Module):
    """The tokens as an image of one channel: position by token."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        widths = [1, 24, 48, 64]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), norm(b), nn.GELU()) for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor, poison: Tensor) -> Tensor:
        padded = F.pad(tokens, (0, LONGEST - tokens.shape[1]))
        image = F.one_hot(padded, VOCABULARY)[:, None].float() + poison[:, None, None, None]
        for stage in self.stages:
            image = stage(image)
        return self.head(image.mean((2, 3)))


class UnusedLayer(TransformerBody):
    def __init__(self) -> None:
        super().__init__(width=32)
        self.unused = nn.Linear(8, 8)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: Classifier(TransformerBody()),
    "tied transformer": lambda: Classifier(TransformerBody(tied=True)),
    "unused layer": lambda: Classifier(UnusedLayer()),
    "lstm": lambda: Classifier(LstmBody()),
    "cnn": lambda: Classifier(CnnBody(lambda width: nn.GroupNorm(4, width))),
    "cnn with BatchNorm": lambda: Classifier(CnnBody(nn.BatchNorm2d)),
}
