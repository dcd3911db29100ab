"""A plain Hugging Face Trainer script that knows nothing of dist-train: a tiny BERT, made from its config.

python docs/examples/trainer_script.py
dist-train launch --gpus-per-node 2 docs/examples/trainer_script.py -- --max_steps 20
"""

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

VOCABULARY, CLASSES, LENGTH = 100, 3, 12


class SumOfTokens(Dataset):
    """Rows whose class is the sum of their tokens modulo CLASSES."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.sum() % CLASSES}


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
    )
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=SumOfTokens(512))
    result = trainer.train()
    if trainer.is_world_process_zero():
        kind = trainer.accelerator.distributed_type.value
        print(f"{arguments.world_size} ranks, {kind}, {result.global_step} steps, loss {result.training_loss:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        quick = f"--output_dir {folder} --max_steps 12 --logging_steps 4 --report_to none --save_strategy no"
        sys.argv[1:1] = [*quick.split(), "--average_tokens_across_devices", "false"]
        main()
