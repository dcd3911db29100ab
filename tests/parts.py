"""A user's folder of part images: good ones and scratched ones, with masks beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from recipes.defect_detection.config import SyntheticConfig
from recipes.defect_detection.synthetic import generate

SIDE = 48
# Scratches that a tiny network learns in seconds.
_EASY = SyntheticConfig(
    defective_share=0.35, scratch_width_px=3, scratch_length_px=24, scratch_contrast=0.6, dust_per_image=0.5
)
STEPS = 60
SETTINGS = [
    "data.path=parts/images",
    "data.mask_path=parts/masks",
    f"data.size_px={SIDE}",
    "data.cache_dir=prepared",
    f"train.steps={STEPS}",
    "train.global_batch_size=15",
    "model.widths=[8,16]",
    "model.depths=[1,1]",
    "eval.every_steps=20",
    "eval.bootstrap_samples=100",
    "checkpoint.every_steps=10",
    "track.log_every_steps=1",
]


def write_parts(folder: Path, count: int = 240) -> Path:
    """images/good, images/scratch and masks/scratch below the folder."""
    for index, (image, mask, kind) in enumerate(generate(_EASY, SIDE, SIDE, 0, count)):
        place = folder / "images" / (kind or "good")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"part{index:04d}.png")
        if kind:
            (folder / "masks" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask * np.uint8(255)).save(folder / "masks" / kind / f"part{index:04d}.png")
    return folder


def run_parts(name: str, *more: str, ranks: int = 2) -> list[str]:
    """The command that trains a small network on the images of `write_parts`."""
    return ["run", "defect_detection", f"name={name}", *SETTINGS, f"parallel.processes_per_node={ranks}", *more]
