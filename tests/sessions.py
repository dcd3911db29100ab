"""A small log of events with an item table, as files, for the tests of recommendation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

WORDS = ("bolt", "nut", "drill", "saw", "glue", "tape", "lamp", "wire")
SETTINGS = (
    "data.path=events.csv",
    "data.items_path=items.csv",
    "data.text_columns=[title]",
    "data.category_columns=[kind]",
    "data.number_columns=[price]",
    "data.text_dims=8",
    "data.cache_dir=prepared",
    "model.width=16",
    "model.layers=2",
    "model.feedforward=16",
    "model.dropout=0",
    "model.id_dropout=0",
    "train.global_batch_size=8",
    "track.wandb=disabled",
    "eval.bootstrap_samples=100",
)
"""The recipe on these files with a tiny model, in their folder."""


def write_log(folder: Path, users: int = 40, items: int = 60, seed: int = 0) -> None:
    """events.csv and items.csv: an item is most often followed by the next one of its kind; the last tenth of the items
    comes only towards the end."""
    generator = np.random.default_rng(seed)
    kinds = len(WORDS)
    rows = []
    for user in range(users):
        item, moment = int(generator.integers(items * 9 // 10)), int(generator.integers(0, 40 * 86_400))
        for _ in range(int(generator.integers(3, 12))):
            rows.append((f"user{user}", f"item{item}", moment))
            moment += int(generator.integers(3600, 5 * 86_400))
            reach = items if moment > 40 * 86_400 else items * 9 // 10
            item = (item + kinds) % reach if generator.random() < 0.7 else int(generator.integers(reach))
    write_rows(folder / "events.csv", ("user_id", "item_id", "timestamp"), rows)
    table = [
        (f"item{item}", f"{WORDS[item % kinds]} size {item // kinds}", f"kind{item % kinds}", 1 + item % 7)
        for item in range(items)
    ]
    write_rows(folder / "items.csv", ("item_id", "title", "kind", "price"), table)


def write_rows(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
