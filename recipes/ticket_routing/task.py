"""Ticket routing as a task: rows from the prepared folder, the model of the config, and the model folder."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dist_train.calibration import sharpen
from dist_train.errors import DataError
from dist_train.init_from import Taken, take_weights
from dist_train.prepared import load_facts
from dist_train.pretrained import pretrained_folder
from dist_train.records import check_record
from dist_train.table_files import as_text
from dist_train.task import Batch, ListedRows
from recipes.ticket_routing import score
from recipes.ticket_routing.chunks import join_text
from recipes.ticket_routing.config import Config, ModelConfig
from recipes.ticket_routing.earlier import earlier_model
from recipes.ticket_routing.encoder import build_encoder
from recipes.ticket_routing.model import TicketClassifier
from recipes.ticket_routing.pretrained import PretrainedEncoder, label_parameters, load_pretrained, make_pretrained
from recipes.ticket_routing.stored import StoredSplit

MODEL_TYPE = "dist_train_ticket_routing"


def make_task(config: Config, prepared: Path) -> TicketTask:
    return TicketTask(config, prepared)


class TicketRows:
    """One split, its token ids read from the memory maps."""

    def __init__(self, stored: StoredSplit, class_weight: np.ndarray) -> None:
        self._stored = stored
        self.ids = stored.rows
        self.labels = stored.labels
        self.lengths = stored.lengths
        self.weights = class_weight[stored.labels]

    def take(self, indices: np.ndarray) -> list[tuple[np.ndarray, int]]:
        return [(self._stored.tokens(int(index)), int(self.labels[index])) for index in indices]


class TicketTask:
    def __init__(self, config: Config, prepared: Path) -> None:
        self.config = config
        self.prepared = prepared
        self.facts = facts = load_facts(prepared)
        self.labels: list[str] = facts["labels"]
        self.vocabulary: int = facts["vocabulary"]
        counts = np.array([facts["splits"]["train"]["labels"].get(name, 0) for name in self.labels], dtype=np.float64)
        balanced = counts.sum() / (len(counts) * np.maximum(counts, 1))
        self._class_weight = balanced if config.task.class_weights == "balanced" else np.ones(len(counts))
        self._head: tuple[str, ...] = ("encoder.head.",)

    def build_model(self) -> TicketClassifier:
        return TicketClassifier(self._build_encoder(), self.config.task.label_smoothing)

    def take_over(self, model: nn.Module) -> Taken | None:
        earlier = earlier_model(self.config)
        if earlier is None:
            return None
        assert isinstance(model, TicketClassifier)
        try:
            weights = self.load_model(earlier.folder).state_dict()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DataError(f"model.init_from: the weights in {earlier.folder} cannot be read: {error}") from error
        by_label = [f"encoder.{name}" for name in label_parameters(model.encoder)]
        return take_weights(model, weights, earlier.labels, self.labels, by_label, earlier.folder)

    def _build_encoder(self) -> nn.Module:
        model, data = self.config.model, self.config.data
        if model.kind == "pretrained":
            folder = pretrained_folder(self.config, self.prepared, self.facts)
            encoder = make_pretrained(folder, model, self.labels, data.max_tokens)
            self._head = tuple(f"encoder.{prefix}" for prefix in encoder.head_prefixes())
            return encoder
        return build_encoder(model, self.vocabulary, data.max_tokens, len(self.labels))

    def is_head(self, name: str) -> bool:
        """Of a parameter of the model that was built last."""
        return name.startswith(self._head)

    def rows(self, split: str) -> TicketRows:
        return TicketRows(StoredSplit(self.prepared, split), self._class_weight)

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        longest = max(len(tokens) for tokens, _ in rows)
        token_ids = np.zeros((len(rows), longest), dtype=np.int64)
        token_mask = np.zeros((len(rows), longest), dtype=bool)
        for index, (tokens, _) in enumerate(rows):
            token_ids[index, : len(tokens)] = tokens
            token_mask[index, : len(tokens)] = True
        labels = np.array([label for _, label in rows], dtype=np.int64)
        return {
            "token_ids": torch.from_numpy(token_ids),
            "token_mask": torch.from_numpy(token_mask),
            "label": torch.from_numpy(labels),
        }

    def example_batch(self, rows: int, length: int) -> Batch:
        return self.collate([(np.ones(length, dtype=np.int64), 0)] * rows, np.zeros(rows, dtype=np.uint64))

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        return score.prediction_table(StoredSplit(self.prepared, split).table(), outputs["probability"], self.labels)

    def encode(self, records: list[dict[str, Any]]) -> ListedRows:
        names = self.config.data.text_columns
        for record in records:
            check_record(record, names)
        encoded = self._tokenizer().encode_batch_fast(
            [join_text(as_text(record[name]) for name in names) for record in records]
        )
        tokens = [np.array(encoding.ids or [1], dtype=np.int64) for encoding in encoded]
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        return ListedRows([(row, 0) for row in tokens], lengths)

    def answers(self, outputs: dict[str, np.ndarray], decision: Mapping[str, Any]) -> pa.Table:
        probability = sharpen(outputs["probability"], decision["temperature"])
        columns = {
            "predicted": pa.array([self.labels[index] for index in probability.argmax(1)]),
            "confidence": pa.array(probability.max(1)),
            "decision": pa.array(score.decisions(probability, decision["threshold"])),
        }
        columns |= {f"probability/{name}": pa.array(probability[:, index]) for index, name in enumerate(self.labels)}
        return pa.table(columns)

    @functools.cache  # noqa: B019 - one task a process
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        # In a model folder it lies at the top, where Hugging Face looks for it.
        places = [self.prepared / "tokenizer" / "tokenizer.json", self.prepared / "tokenizer.json"]
        return Tokenizer.from_file(str(next(place for place in places if place.is_file())))

    def save_model(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, TicketClassifier)
        shutil.copytree(self.prepared / "tokenizer", folder, dirs_exist_ok=True)
        if isinstance(model.encoder, PretrainedEncoder):
            model.encoder.save(folder)
            revision = self.facts.get("pretrained", {}).get("revision")
            source = {"pretrained": self.config.model.pretrained, "revision": revision}
            (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            return
        described = {
            "model_type": MODEL_TYPE,
            "architectures": [type(model.encoder).__name__],
            "id2label": {str(index): name for index, name in enumerate(self.labels)},
            "label2id": {name: index for index, name in enumerate(self.labels)},
            "vocab_size": self.vocabulary,
            "max_tokens": self.config.data.max_tokens,
            "model": self.config.model.model_dump(exclude={"init_from"}),
        }
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in model.encoder.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def load_model(self, folder: Path) -> TicketClassifier:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels = [described["id2label"][str(index)] for index in range(len(described["id2label"]))]
        if described["model_type"] != MODEL_TYPE:
            return TicketClassifier(PretrainedEncoder(load_pretrained(str(folder), labels, None)))
        config = ModelConfig.model_validate(described["model"])
        encoder = build_encoder(config, described["vocab_size"], described["max_tokens"], len(labels))
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
        return TicketClassifier(encoder)
