"""accelerate_script.py as a recipe: a small classifier on generated rows.

dist-train run docs/examples/ported_accelerate/recipe.yaml parallel.processes_per_node=2
"""

import torch
from torch import nn

from dist_train.config import RunConfig as Config  # noqa: F401 - the recipe has no keys of its own
from dist_train.task import ListedRows, weighted_sum

FEATURES, CLASSES, ROWS = 32, 4, 2048


def rows(split: str) -> ListedRows:
    torch.manual_seed(0)
    rows = torch.randn(ROWS, FEATURES)
    labels = (rows @ torch.randn(FEATURES, CLASSES)).argmax(dim=1)
    first, last = {"train": (0, 1600), "validation": (1600, 1824), "test": (1824, ROWS)}[split]
    return ListedRows([{"features": rows[i], "label": labels[i]} for i in range(first, last)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, CLASSES))

    def forward(self, batch):
        logits = self.layers(batch["features"])
        if self.training:
            losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
            return weighted_sum(losses, batch["weight"])
        return {"right": logits.argmax(1) == batch["label"]}


def build_model() -> nn.Module:
    return Model()


METRIC = "accuracy"


def measure(table):
    right = table["right"].to_numpy()
    return lambda weights: {"accuracy": weights @ right / weights.sum()}
