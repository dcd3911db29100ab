"""What cameras and lamps do to images in a factory, in three strengths, to test how far a model can be relied on.

After the common corruptions of Hendrycks and Dietterich (2019), with those that a fixed camera can meet.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage, signal


def corrupt(image: np.ndarray, name: str, seed: int) -> np.ndarray:
    """The image under corruption `name` of CORRUPTIONS: uint8 [channels, height, width], a new array.

    seed: of the noise; the other corruptions need none.
    """
    kind, severity = name.rsplit("-", 1)
    apply, strengths = _KINDS[kind]
    changed = apply(image.astype(np.float32), strengths[int(severity) - 1], seed)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, deviation_px: float, seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(image, (0, deviation_px, deviation_px), mode="nearest")


def _defocus(image: np.ndarray, radius_px: float, seed: int) -> np.ndarray:
    """Mean over a disk, as a lens out of focus gives."""
    reach = int(np.ceil(radius_px))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius_px + 0.5 - np.hypot(y, x), 0.0, 1.0).astype(np.float32)
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    return signal.oaconvolve(padded, (disk / disk.sum())[None], mode="valid", axes=(1, 2))


def _noise(image: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return image + np.float32(255 * deviation) * generator.standard_normal(image.shape, dtype=np.float32)


def _dark(image: np.ndarray, factor: float, seed: int) -> np.ndarray:
    return image * np.float32(factor)


def _bright(image: np.ndarray, added: float, seed: int) -> np.ndarray:
    return image + np.float32(255 * added)


def _contrast(image: np.ndarray, factor: float, seed: int) -> np.ndarray:
    mean = image.mean(axis=(1, 2), keepdims=True)
    return mean + (image - mean) * np.float32(factor)


def _jpeg(image: np.ndarray, quality: float, seed: int) -> np.ndarray:
    pixels = image.astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)).save(
        stream, "JPEG", quality=int(quality)
    )
    with Image.open(stream) as read:
        decoded = np.asarray(read)
    return decoded[None] if decoded.ndim == 2 else np.moveaxis(decoded, -1, 0)


# Strengths in pixels, in shares of the full range, or as the quality of JPEG.
_KINDS: dict[str, tuple[Callable[[np.ndarray, float, int], np.ndarray], tuple[float, float, float]]] = {
    "blur": (_blur, (0.7, 1.2, 2.0)),
    "defocus": (_defocus, (1.0, 2.0, 3.5)),
    "noise": (_noise, (0.03, 0.07, 0.14)),
    "dark": (_dark, (0.75, 0.5, 0.3)),
    "bright": (_bright, (0.1, 0.2, 0.35)),
    "contrast": (_contrast, (0.7, 0.5, 0.3)),
    "jpeg": (_jpeg, (50, 25, 10)),
}

CORRUPTIONS: tuple[str, ...] = tuple(f"{kind}-{severity}" for kind in _KINDS for severity in (1, 2, 3))
