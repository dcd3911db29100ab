"""Generated images of brushed metal, some with micro-scratches: any size and number, the same for a seed and version.

What tells a scratch: a thin coherent line across the brushing. Strong strokes of the brush are as thin and as dark or
light, but run with the grain; dust is as dark or light, but round or short; lighting and roughness differ by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from dist_train.data import derive_seed, mix64
from recipes.defect_detection.config import SyntheticConfig
from recipes.defect_detection.scratches import draw_scratch

# Changes whenever the same seed gives other images.
VERSION = 1

# Domain of derive_seed: no other use of one seed shares these random numbers.
_DOMAIN = 0x5C7A7C4
_SURFACE, _DEFECT, _CHOICE = range(3)

# Parts lie in a fixture: the grain runs within so many radians of the x axis, and scratches at least so many across it.
_GRAIN, _ACROSS = 0.4, 0.26
# Lowest and highest of each part's own: standard deviations of lines and speckle and the strength of strokes, as shares
# of the full range; radius in pixels and contrast of dust.
_LINES, _STROKES, _SPECKLE = (0.02, 0.06), (0.1, 0.3), (0.01, 0.025)
_DUST_RADIUS, _DUST_CONTRAST = (0.8, 3.0), (0.2, 0.5)
_DUST_HALF_LENGTH = 3.5  # of the longest small speck, without its round ends: well below a scratch
_SEVERAL = (0.7, 0.9)  # below the first: one scratch; below the second: two; else three


def generate(
    config: SyntheticConfig, height: int, width: int, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Images start … stop-1 as (uint8 [height, width], mask uint8 [height, width] with 1 in a scratch, type).

    type: "" for a good part, else "scratch". Image i depends on the config, the size and i alone.
    """
    indices = np.arange(start, stop, dtype=np.uint64)
    surfaces, defects, choices = (
        mix64(mix64(indices) ^ np.uint64(derive_seed(_DOMAIN, VERSION, config.seed, stream)))
        for stream in (_SURFACE, _DEFECT, _CHOICE)
    )
    defective = (choices >> np.uint64(11)) * 2.0**-53 < config.defective_share
    for surface_seed, defect_seed, is_defective in zip(surfaces, defects, defective, strict=True):
        image, grain = _render_surface(config, height, width, np.random.Generator(np.random.PCG64(int(surface_seed))))
        mask = np.zeros((height, width), dtype=np.uint8)
        if is_defective:
            image, mask = _scratch(config, image, grain, np.random.Generator(np.random.PCG64(int(defect_seed))))
        yield (image * 255 + 0.5).astype(np.uint8), mask, "scratch" if is_defective else ""


def _scratch(
    config: SyntheticConfig, image: np.ndarray, grain: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask) with one to three scratches across the grain."""
    drawn, mask = image[None], np.zeros(image.shape, dtype=np.uint8)
    for _ in range(1 + int(np.searchsorted(_SEVERAL, generator.random(), side="right"))):
        aside = _ACROSS + (np.pi - 2 * _ACROSS) * generator.random()
        length = config.scratch_length_px * (0.5 + generator.random())
        drawn, scratch = draw_scratch(
            drawn, generator, config.scratch_width_px, length, config.scratch_contrast, grain + aside
        )
        mask |= scratch
    return drawn[0], mask


def _render_surface(
    config: SyntheticConfig, height: int, width: int, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """(float32 [height, width] in 0..1, direction of the grain in radians) of a good part."""
    grain = _between((-_GRAIN, _GRAIN), generator.random())
    base = 0.38 + 0.24 * generator.random()
    image = _brush(height, width, grain, generator)
    image += np.float32(base)
    image += _light(height, width, generator) * np.float32(config.lighting)
    _dust(image, generator.poisson(config.dust_per_image), generator)
    return np.clip(image, 0.0, 1.0, out=image), grain


def _brush(height: int, width: int, grain: float, generator: np.random.Generator) -> np.ndarray:
    """Brushing about 0: fine lines in the direction of the grain, a few strong strokes, and the grain of the metal."""
    roughness, coarse, strokes, speckle = generator.random(4)
    noise = generator.standard_normal((height, width), dtype=np.float32)
    seeds = np.where(np.abs(noise) > 3.0, noise, np.float32(0.0))
    along, across = _frequencies(height, width, grain)
    lines = _smoothing(along, 6 + 14 * coarse, across, 0.5 + 0.5 * coarse)
    long_lines = _smoothing(along, 5 + 5 * generator.random(), across, 0.6)
    spectrum = np.fft.rfft2(noise)
    fine = _to_deviation(np.fft.irfft2(spectrum * lines, s=(height, width)), _between(_LINES, roughness))
    marks = np.fft.irfft2(np.fft.rfft2(seeds) * long_lines, s=(height, width))
    # The middle of a stroke is as strong as a scratch is.
    fine += marks * np.float32(_between(_STROKES, strokes) / (3.3 * max(float(long_lines.mean()), 1e-6)))
    fine += noise * np.float32(_between(_SPECKLE, speckle))
    return fine.astype(np.float32)


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _smoothing(along: np.ndarray, length: float, across: np.ndarray, thickness: float) -> np.ndarray:
    """Transfer function of a Gaussian of these standard deviations in pixels."""
    return np.exp(np.float32(-0.5 * length**2) * along - np.float32(0.5 * thickness**2) * across)


def _to_deviation(field: np.ndarray, deviation: float) -> np.ndarray:
    return field * np.float32(deviation / max(float(field.std()), 1e-6))


@lru_cache(maxsize=4)
def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Angular frequencies of rfft2: float32 [height, 1] and [1, width // 2 + 1]."""
    vertical = np.fft.fftfreq(height)[:, None] * 2 * np.pi
    horizontal = np.fft.rfftfreq(width)[None, :] * 2 * np.pi
    return vertical.astype(np.float32), horizontal.astype(np.float32)


def _frequencies(height: int, width: int, grain: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared angular frequencies along and across the grain."""
    vertical, horizontal = _axes(height, width)
    sine, cosine = np.float32(np.sin(grain)), np.float32(np.cos(grain))
    return (cosine * horizontal + sine * vertical) ** 2, (cosine * vertical - sine * horizontal) ** 2


def _light(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Slow change of brightness: float32 [height, width] of range 1 about 0, a slope with a bright or dark region."""
    slope_y, slope_x, centre_y, centre_x, bulge = (generator.random(5) * 2 - 1).astype(np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    field = (slope_y * y + bulge * (y - centre_y) ** 2) + (slope_x * x + bulge * (x - centre_x) ** 2)
    low, high = field.min(), field.max()
    return (field - (low + high) / 2) / max(high - low, np.float32(1e-6))


def _dust(image: np.ndarray, count: int, generator: np.random.Generator) -> None:
    """Specks, round or like grains of rice, darker or lighter, drawn into the image."""
    height, width = image.shape
    for y, x, size, shape, direction, depth in generator.random((count, 6)):
        y, x, radius = y * (height - 1), x * (width - 1), _between(_DUST_RADIUS, size**2)
        half = _DUST_HALF_LENGTH * shape if size < 0.5 else 0.0
        rows = slice(max(0, int(y - half - radius - 1)), int(y + half + radius + 3))
        columns = slice(max(0, int(x - half - radius - 1)), int(x + half + radius + 3))
        window = image[rows, columns]
        dy = np.arange(rows.start, rows.start + window.shape[0], dtype=np.float32)[:, None] - np.float32(y)
        dx = np.arange(columns.start, columns.start + window.shape[1], dtype=np.float32)[None, :] - np.float32(x)
        sine, cosine = np.float32(np.sin(direction * np.pi)), np.float32(np.cos(direction * np.pi))
        beyond = np.maximum(np.abs(cosine * dx + sine * dy) - np.float32(half), 0)
        distance = np.hypot(beyond, cosine * dy - sine * dx)
        signed = _between(_DUST_CONTRAST, abs(2 * depth - 1)) * (1 if depth < 0.5 else -1)
        window -= np.float32(signed) * np.clip(np.float32(radius + 0.5) - distance, 0.0, 1.0)
