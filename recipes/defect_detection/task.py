"""Defect detection as a task: images from the prepared folder, the network of the config, answers for new images."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dist_train.errors import DataError
from dist_train.model_folder import write_state
from dist_train.prepared import load_facts
from dist_train.task import Batch, ListedRows
from recipes.defect_detection import augment, decisions, losses
from recipes.defect_detection.config import Config
from recipes.defect_detection.corruptions import CORRUPTIONS, corrupt
from recipes.defect_detection.data import check_mode
from recipes.defect_detection.defects import DefectShares, add_defect
from recipes.defect_detection.images import Frame, read_frame
from recipes.defect_detection.model import DefectClassifier, DefectNetwork, TextureHead, Tiles
from recipes.defect_detection.networks import build_backbone
from recipes.defect_detection.predictions import DEFECTIVE, make_table, read_header
from recipes.defect_detection.pretrained import PretrainedBackbone, build_pretrained, save_config
from recipes.defect_detection.sampling import (
    class_counts,
    is_one_class,
    logit_adjustment,
    prior_correction,
    repeated_rows,
    wanted_counts,
)
from recipes.defect_detection.stored import Damaged, StoredImages
from recipes.defect_detection.texture import texture_features

# Keeps the random numbers of a blend apart from those of a defect with the same seed.
_BLEND = 1
# Which defects good parts get in one-class mode, unless `augment` says so itself.
_ONE_CLASS = DefectShares(scratches=0.25, patches=0.25)


class Example(NamedTuple):
    """An image as it is collated."""

    image: np.ndarray
    """uint8 [channels, height, width]"""
    target: np.ndarray
    """float32 [labels]"""
    readable: bool = True
    trains: bool = False
    texture: np.ndarray | None = None
    """float32 [features], under model.texture."""
    place: tuple[int, ...] | None = None
    """Of a new image, see `Frame.place`."""


def make_task(config: Config, prepared: Path) -> DefectTask:
    check_mode(config, load_facts(prepared))
    return DefectTask(config, prepared)


class DefectTask:
    def __init__(self, config: Config, prepared: Path) -> None:
        self.config = config
        self.prepared = prepared
        self.facts = load_facts(prepared)
        self.labels: list[str] = self.facts["labels"]
        self._counts = class_counts(config, self.facts).astype(np.float64)
        self.is_one_class = is_one_class(config, self.facts)
        self.header = read_header(self.facts, self.is_one_class)
        asked = DefectShares(config.augment.scratches, config.augment.paste)
        self._defect_shares = _ONE_CLASS if self.is_one_class and not asked.total else asked
        self._damaged: set[int] = set()

    def build_model(self) -> DefectClassifier:
        task, texture = self.config.task, None
        if self.config.model.texture:
            texture = TextureHead(self.facts["texture_mean"], self.facts["texture_std"], len(self.labels))
        shares, own = self._sampled_shares(), self._counts / max(self._counts.sum(), 1)
        loss = losses.cross_entropy
        if task.loss == "focal":
            loss = functools.partial(losses.focal, gamma=task.focal_gamma)
        return DefectClassifier(
            [self._network() for _ in range(self.config.model.members)],
            loss,
            task.label_smoothing,
            logit_adjustment(shares, task.logit_adjustment).tolist(),
            None if self.is_one_class else prior_correction(shares, own, task.logit_adjustment).tolist(),
            self.is_one_class,
            texture,
        )

    def _network(self) -> DefectNetwork:
        model = self.config.model
        if model.kind == "pretrained":
            backbone: Any = build_pretrained(self.config, self.prepared, self.facts)
        else:
            backbone = build_backbone(
                model.kind, self.facts["channels"], model.widths, model.depths, model.stem_stride, model.drop_path
            )
        return DefectNetwork(
            backbone,
            len(self.labels),
            self.header.good,
            self.facts["mean"],
            self.facts["std"],
            model.dropout,
            model.top_share,
            None if model.tile_px is None else Tiles(model.tile_px, model.tile_overlap, model.tile_top),
            model.standardise,
        )

    def is_head(self, name: str) -> bool:
        return ".head." in name or name.startswith("texture.")

    def rows(self, split: str) -> ImageRows:
        return ImageRows(self, split)

    def conditions(self) -> tuple[str, ...]:
        return CORRUPTIONS if self.config.task.corruptions else ()

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        examples = [self._changed(row, int(seed)) for row, seed in zip(rows, seeds, strict=True)]
        batch = {
            "image": torch.from_numpy(np.stack([example.image for example in examples])),
            "target": torch.from_numpy(np.stack([example.target for example in examples])),
            "readable": torch.tensor([float(example.readable) for example in examples]),
        }
        if examples[0].trains:
            height, width = examples[0].image.shape[1:]
            batch |= augment.draw_parameters(seeds, self.config.augment, height == width)
        if self.config.model.texture:
            batch["texture"] = torch.from_numpy(np.stack([self._texture(example) for example in examples]))
        if examples[0].place is not None:
            batch["place"] = torch.tensor([example.place for example in examples], dtype=torch.float32)
        return batch

    def example_batch(self, rows: int, length: int) -> Batch:
        image = np.zeros((self.facts["channels"], *self.facts["size"]), dtype=np.uint8)
        target = np.eye(len(self.labels), dtype=np.float32)[0]
        texture = None
        if self.config.model.texture:
            texture = np.zeros(len(self.facts["texture_mean"]), dtype=np.float32)
        examples = [Example(image, target, trains=True, texture=texture)] * rows
        return self.collate(examples, np.arange(rows, dtype=np.uint64))

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        rows = self._stored.rows(split.partition("/")[0])
        masks = None
        if self.facts["has_masks"]:
            masks = [self._stored.mask(int(row)) for row in rows]
        return make_table(self._stored.table.take(rows), outputs, self.header, masks)

    @property
    def file_columns(self) -> tuple[str, ...]:
        """What names an image in a new row, in this order."""
        return tuple(dict.fromkeys((self.config.data.file_column, "image", "path")))

    @property
    def row_bytes(self) -> int:
        return self._pixels * int(self.facts["channels"])

    def encode(self, records: list[dict[str, Any]]) -> ListedRows:
        """records: with the config's file column, `image` or `path`: the name of an image file, the bytes of one, or an
        array [height, width] or [height, width, channels]."""
        target = np.zeros(len(self.labels), dtype=np.float32)
        examples = []
        for record in records:
            source = next((record[key] for key in self.file_columns if record.get(key) is not None), None)
            if source is None and not any(key in record for key in self.file_columns):
                raise KeyError(self.config.data.file_column)
            if source is None or (isinstance(source, str) and not source.strip()):
                raise DataError(f"a row to predict names no image: {record}.")
            frame: Frame = read_frame(source, self.config.data, self.facts["bits"])
            examples.append(Example(frame.image, target, place=frame.place))
        return ListedRows(examples, np.full(len(examples), self._pixels))

    def answers(self, outputs: dict[str, np.ndarray], decision: Mapping[str, Any]) -> pa.Table:
        probability = decisions.calibrated(outputs["probability"], outputs.get("feature"), decision)
        place, peak = outputs["place"], outputs["peak"]
        corner, extent, size = place[:, :2], place[:, 2:4], place[:, 4:]
        # A peak in the border around the image belongs to the image's edge.
        where = np.clip((peak * np.array(self.facts["size"]) - corner) / extent, 0, 1) * size
        predicted = decisions.predicted(probability, decision)
        columns: dict[str, Any] = {
            "predicted": pa.array([self.labels[index] for index in predicted.tolist()]),
            "decision": pa.array(decisions.decisions_of(probability, decision)),
            "peak_y": pa.array(where[:, 0].astype(np.float32)),
            "peak_x": pa.array(where[:, 1].astype(np.float32)),
        }
        if self.header.is_binary:
            columns["probability"] = pa.array(decisions.as_deployed(probability[:, DEFECTIVE], decision))
        else:
            columns |= {f"probability/{name}": pa.array(probability[:, i]) for i, name in enumerate(self.labels)}
        return pa.table(columns)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """The state, and of a pretrained backbone the config that it is built from."""
        assert isinstance(model, DefectClassifier)
        write_state(folder, model)
        backbone = cast(DefectNetwork, model.networks[0]).backbone
        if isinstance(backbone, PretrainedBackbone):
            save_config(backbone, folder)

    def read(self, row: int) -> tuple[np.ndarray, bool]:
        """A stored image, and whether it is what was stored. One that is not counts nothing in training, on whichever
        rank its turn comes; more of them than data.most_unreadable end the run."""
        try:
            return self._stored.image(row), True
        except Damaged as damage:
            if row not in self._damaged:
                self._damaged.add(row)
                print(f"warning: {damage}; left out", flush=True)
            if len(self._damaged) > self.config.data.most_unreadable:
                raise DataError(
                    f"{len(self._damaged)} images of the prepared data are damaged, and data.most_unreadable is "
                    f"{self.config.data.most_unreadable}: {damage}\nDelete {self.prepared}, and it is made again."
                ) from damage
            return self._stored.image_or_blank(row), False

    def texture_of(self, row: int) -> np.ndarray | None:
        """The stored texture features of an image, where the model takes them."""
        return np.array(self._stored.textures[row]) if self.config.model.texture else None

    @functools.cached_property
    def _stored(self) -> StoredImages:
        return StoredImages(self.prepared)

    @property
    def _pixels(self) -> int:
        return int(np.prod(self.facts["size"]))

    @functools.cached_property
    def _train_rows(self) -> np.ndarray:
        """Those that the model learns from."""
        rows = self._stored.rows("train")
        return rows[self._stored.labels[rows] == self.header.good] if self.is_one_class else rows

    @functools.cached_property
    def _good_rows(self) -> np.ndarray:
        return self._train_rows[self._stored.labels[self._train_rows] == self.header.good]

    @functools.cached_property
    def _masked_rows(self) -> np.ndarray:
        rows = self._stored.rows("train")
        return rows[self._stored.table["defect_px"].to_numpy()[rows] > 0]

    def _sampled_shares(self) -> np.ndarray:
        """Of each class, in the images as the model sees them in training."""
        counts = wanted_counts(self._counts, self.config.task.balanced_share).astype(np.float64)
        if self.header.is_binary:
            made = self._defect_shares.total * counts[0]
            counts += np.array([-made, made])
        return counts / max(counts.sum(), 1)

    def _texture(self, example: Example) -> np.ndarray:
        return texture_features(example.image) if example.texture is None else example.texture

    def _changed(self, example: Example, seed: int) -> Example:
        """A training image with what its seed draws: a defect, and then a blend with another image."""
        if not example.trains:
            return example
        if self._defect_shares.total and self.header.is_binary and example.target[0] == 1:
            example = self._with_defect(example, seed)
        return self._blended(example, seed) if self.config.augment.mixup else example

    def _blended(self, example: Example, seed: int) -> Example:
        """With another training image, which the seed alone picks (Zhang et al. 2018, "mixup")."""
        generator = np.random.default_rng([seed, _BLEND])
        share = generator.beta(self.config.augment.mixup, self.config.augment.mixup)
        row = int(self._train_rows[generator.integers(len(self._train_rows))])
        other, readable = self.read(row)
        if not readable:
            return example
        image = share * example.image.astype(np.float32) + (1 - share) * other
        target = share * example.target + (1 - share) * self._stored.targets[row]
        # Features of a blend are not the blend of features, but cheap, and what lies between both.
        texture = example.texture
        if texture is not None:
            texture = (share * texture + (1 - share) * self._stored.textures[row]).astype(np.float32)
        blended = example._replace(image=np.rint(image).astype(np.uint8), texture=texture)
        return blended._replace(target=target.astype(np.float32))

    def _with_defect(self, example: Example, seed: int) -> Example:
        """A good part may get a defect, and is then a defective one."""

        def defect(drawn: float) -> tuple[np.ndarray, np.ndarray]:
            row = int(self._masked_rows[int(drawn * len(self._masked_rows))])
            mask = self._stored.mask(row)
            assert mask is not None
            return self.read(row)[0], mask

        def other(drawn: float) -> np.ndarray:
            return self.read(int(self._good_rows[int(drawn * len(self._good_rows))]))[0]

        image = add_defect(example.image, seed, self._defect_shares, defect, other, self.config.augment.flips)
        if image is None:
            return example
        texture = texture_features(image) if example.texture is not None else None
        return example._replace(image=image, texture=texture, target=np.eye(2, dtype=np.float32)[DEFECTIVE])


class ImageRows:
    """One split; "test/NAME" is the test split under a corruption."""

    def __init__(self, task: DefectTask, split: str) -> None:
        name, _, self._corruption = split.partition("/")
        self._task, self._trains = task, name == "train"
        self._rows = self.ids = task._train_rows if self._trains else task._stored.rows(name)
        if self._trains:
            share = task.config.task.balanced_share
            self._rows, self.ids = repeated_rows(self._rows, task._stored.labels[self._rows], share)
        self.lengths = np.full(len(self.ids), task._pixels, dtype=np.int64)
        self.weights = np.ones(len(self.ids))

    def take(self, indices: np.ndarray) -> list[Example]:
        examples = []
        for row in self._rows[indices].tolist():
            image, readable = self._task.read(row)
            texture = self._task.texture_of(row)
            if self._corruption:
                image, texture = corrupt(image, self._corruption, row), None
            examples.append(Example(image, self._task._stored.targets[row], readable, self._trains, texture))
        return examples
