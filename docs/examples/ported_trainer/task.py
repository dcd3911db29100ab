"""trainer_script.py as a recipe: a tiny BERT, made from its config.

dist-train run docs/examples/ported_trainer/recipe.yaml parallel.processes_per_node=2
"""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

from dist_train.config import RunConfig as Config  # noqa: F401 - the recipe has no keys of its own
from dist_train.task import ListedRows, weighted_sum

VOCABULARY, CLASSES, LENGTH = 100, 3, 12


class SumOfTokens(Dataset):
    """Rows whose class is the sum of their tokens modulo CLASSES."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.sum() % CLASSES}


def rows(split: str) -> ListedRows:
    count, seed = {"train": (512, 0), "validation": (128, 1), "test": (128, 2)}[split]
    return ListedRows(SumOfTokens(count, seed))


class Model(BertForSequenceClassification):
    def forward(self, batch):
        logits = super().forward(batch["input_ids"], batch["attention_mask"]).logits
        if self.training:
            losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
            return weighted_sum(losses, batch["weight"])
        return {"right": logits.argmax(1) == batch["labels"]}


def build_model() -> torch.nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
    )
    return Model(config)


METRIC = "accuracy"


def measure(table):
    right = table["right"].to_numpy()
    return lambda weights: {"accuracy": weights @ right / weights.sum()}
