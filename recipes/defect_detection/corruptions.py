"""What may happen to a camera's picture: corruptions of stated severity, to see how far answers hold. Torch-free.

After Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions", with severities
for fine defects.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

_LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.6, 1.0, 1.6),  # standard deviation in pixels
    "defocus": (1.0, 1.6, 2.4),  # radius in pixels
    "noise": (0.02, 0.05, 0.1),  # standard deviation, as a share of the full range
    "dark": (0.85, 0.7, 0.5),  # factor
    "bright": (1.1, 1.25, 1.5),
    "contrast": (0.8, 0.6, 0.4),  # factor on the distance from the mean
    "jpeg": (60, 30, 12),  # quality
}
CORRUPTIONS = tuple(f"{name}-{level + 1}" for name, levels in _LEVELS.items() for level in range(len(levels)))


def corrupt(image: np.ndarray, name: str, seed: int) -> np.ndarray:
    """The image, uint8 [channels, height, width], under one of CORRUPTIONS; the noise is a function of the seed."""
    kind, _, level = name.partition("-")
    strength = _LEVELS[kind][int(level) - 1]
    if kind == "jpeg":
        return _jpeg(image, int(strength))
    return np.clip(np.rint(_CHANGES[kind](image.astype(np.float32), strength, seed)), 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(image, (0, deviation, deviation), mode="nearest")


def _defocus(image: np.ndarray, radius: float, seed: int) -> np.ndarray:
    """The mean over a disc, its edge anti-aliased."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)
    return ndimage.convolve(image, (disc / disc.sum())[None], mode="nearest")


def _noise(image: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    return image + 255 * deviation * np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32)


def _contrast(image: np.ndarray, factor: float, seed: int) -> np.ndarray:
    mean = image.mean()
    return mean + factor * (image - mean)


def _scaled(image: np.ndarray, factor: float, seed: int) -> np.ndarray:
    return image * factor


_CHANGES: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "blur": _blur,
    "defocus": _defocus,
    "noise": _noise,
    "dark": _scaled,
    "bright": _scaled,
    "contrast": _contrast,
}


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=quality)
    pixels = np.asarray(Image.open(stream))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
