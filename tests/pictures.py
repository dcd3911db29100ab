"""Real image files for tests: made with Pillow, each from a seed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_train.prepared import load_facts, prepare
from dist_train.recipe import Recipe, recipes_folder
from recipes.defect_detection.config import Config
from recipes.defect_detection.stored import StoredImages

RECIPE = Recipe("defect_detection", "recipes.defect_detection", recipes_folder() / "defect_detection")


def pixels(seed: int, height: int = 24, width: int = 24, channels: int = 1) -> np.ndarray:
    """uint8 [height, width] or [height, width, channels], smooth enough for JPEG."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, channels)).astype(np.uint8)
    image = Image.fromarray(coarse[:, :, 0] if channels == 1 else coarse)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def write_image(path: Path, seed: int, height: int = 24, width: int = 24, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path, **options)
    return path


def write_mask(path: Path, boxes: list[tuple[int, int, int, int]], height: int = 24, width: int = 24) -> Path:
    """1-bit, with boxes (top, left, bottom, right)."""
    mask = np.zeros((height, width), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def write_classes(folder: Path, counts: dict[str, int], first_seed: int = 0) -> Path:
    """So many images in a folder of each class."""
    seed = first_seed
    for name, count in counts.items():
        for index in range(count):
            write_image(folder / name / f"{index:03d}.png", seed)
            seed += 1
    return folder


def config_of(cache: Path, sections: dict[str, Any] | None = None, **data: Any) -> Config:
    """sections: those beside `data`."""
    paths = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
    values = {"size_px": 24, "cache_dir": cache, **paths}
    return Config(recipe="defect_detection", data=values, **(sections or {}))


def prepare_images(cache: Path, said: list[str] | None = None, **data: Any) -> tuple[StoredImages, dict[str, Any]]:
    """The prepared images, and their facts."""
    folder = prepare(config_of(cache, **data), RECIPE, (said if said is not None else []).append)
    return StoredImages(folder), load_facts(folder)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
