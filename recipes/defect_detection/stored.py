"""Read a prepared folder: images and masks as views of memory maps, checked as they are taken. Torch-free."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np

from dist_train.prepared import read_split
from recipes.defect_detection.listing import SPLITS


class Damaged(Exception):  # noqa: N818 - says what the image is
    """An image of the prepared folder is not what was stored; the message names it."""


class StoredImages:
    """All images, in the order of the source; what is known of each is a line of `table`."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self.table = read_split(folder, "rows").combine_chunks()
        """row, id, item, label, target, type, mask, defect_px, smallest_px, split and file of each image."""
        self.labels = self.table["label"].to_numpy()
        """[n] int32."""
        count = len(self.labels)
        self.targets = self.table["target"].combine_chunks().values.to_numpy().reshape(count, -1)
        """[n, labels] float32."""
        self._splits, self._masks_of = self.table["split"].to_numpy(), self.table["mask"].to_numpy()
        self._images = np.load(self._folder / "images.npy", mmap_mode="r")
        self._checks = np.load(self._folder / "checks.npy")
        self._masks = np.load(self._folder / "masks.npy", mmap_mode="r") if (self._masks_of >= 0).any() else None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, split: str) -> np.ndarray:
        """Indices of the images of "train", "validation" or "test": [k] int64, rising."""
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def image(self, index: int) -> np.ndarray:
        """uint8 [channels, height, width], a view that must not be written to. Damaged."""
        image = np.asarray(self._images[index])
        if zlib.crc32(image.data) != self._checks[index]:
            raise Damaged(f"image {self.table['id'][index].as_py()} (row {index} of {self._folder}) is damaged")
        return image

    @functools.cached_property
    def textures(self) -> np.ndarray:
        """[n, features] float32, where the folder was prepared with model.texture."""
        return np.load(self._folder / "texture.npy", mmap_mode="r")

    def image_or_blank(self, index: int) -> np.ndarray:
        """The image, or a black one where it is damaged."""
        try:
            return self.image(index)
        except Damaged:
            return np.zeros(self._images.shape[1:], dtype=np.uint8)

    def mask(self, index: int) -> np.ndarray | None:
        """uint8 [height, width], 1 in the defect; None for an image without one."""
        mask = int(self._masks_of[index])
        return None if mask < 0 or self._masks is None else np.asarray(self._masks[mask])


@functools.lru_cache(maxsize=1)
def open_images(folder: Path) -> StoredImages:
    """The images of a folder, kept open in this process: a worker gets many jobs of one folder."""
    return StoredImages(folder)
