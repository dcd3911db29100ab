"""The texture features of prepared images, computed by as many processes as there are cores. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.worker_pool import map_in_workers
from recipes.defect_detection.progress import Progress
from recipes.defect_detection.stored import open_images
from recipes.defect_detection.texture import texture_features

FILE = "texture.npy"
_ROWS_A_JOB = 64


def compute_textures(prepared: Path, rows: np.ndarray, say: Callable[[str], None]) -> np.ndarray:
    """[n, features] float32 of these images of a prepared folder; those that it keeps are not computed again."""
    if (prepared / FILE).is_file():
        return np.array(np.load(prepared / FILE, mmap_mode="r")[rows])
    cuts = range(_ROWS_A_JOB, len(rows), _ROWS_A_JOB)
    jobs: Iterator[tuple[Any, ...]] = ((prepared, part) for part in np.split(rows, cuts))
    parts = []
    try:
        with Progress(say, "texture features", len(rows)) as progress:
            for features in map_in_workers(features_of, jobs):
                parts.append(features)
                progress.advance(len(features))
    finally:
        open_images.cache_clear()  # this process may have done some of the jobs itself, and lives on
    return np.concatenate(parts)


def features_of(prepared: Path, rows: np.ndarray) -> np.ndarray:
    """The features of a few images, in a worker's process."""
    stored = open_images(prepared)
    return np.stack([texture_features(stored.image_or_blank(int(row))) for row in rows])


def write_textures(folder: Path, train: np.ndarray, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Keep the features of all images in the folder. Returns mean and standard deviation of each over the training
    images (bool [n])."""
    features = compute_textures(folder, np.arange(len(train)), say)
    np.save(folder / FILE, features)
    own = features[train].astype(np.float64)
    return {"texture_mean": own.mean(0).tolist(), "texture_std": np.maximum(own.std(0), 1e-6).tolist()}
