"""Classical texture features of an image: what the own networks have to beat.

Grey-level and edge statistics over a pyramid, line filters in eight directions, local binary patterns, each also as the
most unusual cell of a grid, so that a defect that is small beside the image still counts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

# Changes whenever the same image would have other features.
VERSION = 1

_QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
_LEVELS = 3
_CELL_PX = 16
_DIRECTIONS = 8
# Standard deviations in pixels of a line filter, along and across, as in the bank of Leung and Malik (2001).
_LINE_ALONG, _LINE_ACROSS = 5.0, 1.0


def texture_features(image: np.ndarray) -> np.ndarray:
    """Features float32 [d] of an image uint8 [channels, height, width]; d does not depend on the size."""
    grey = image.astype(np.float32).mean(axis=0) / np.float32(255.0)
    parts = [_line_statistics(grey), _binary_patterns(grey)]
    for index in range(_LEVELS):
        parts += [_grey_statistics(grey), _edge_statistics(grey, max(2, _CELL_PX >> index))]
        grey = ndimage.gaussian_filter(grey, 1.0, mode="nearest", truncate=3.0)[::2, ::2]
    return np.concatenate(parts).astype(np.float32)


def _grey_statistics(level: np.ndarray) -> np.ndarray:
    """Mean, deviation, skewness, kurtosis and quantiles of the deviation from the mean."""
    mean, deviation = float(level.mean()), max(float(level.std()), 1e-6)
    scaled = (level - np.float32(mean)) / np.float32(deviation)
    square = scaled * scaled
    return np.array([mean, deviation, (square * scaled).mean(), (square * square).mean(), *_quantiles(scaled)])


def _quantiles(values: np.ndarray) -> np.ndarray:
    """The values at these ranks (np.quantile, which interpolates, takes several times as long)."""
    return np.sort(values, axis=None)[[int(quantile * (values.size - 1)) for quantile in _QUANTILES]]


def _edge_statistics(level: np.ndarray, cell_px: int) -> np.ndarray:
    """Energy of gradient and Laplacian and how far one direction prevails; over the image and over its cells."""
    padded = np.pad(level, 1, mode="edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    laplacian = padded[1:-1, 2:] + padded[1:-1, :-2] + padded[2:, 1:-1] + padded[:-2, 1:-1] - 4 * level
    fields = np.stack([across * across, down * down, across * down, laplacian * laplacian, level])
    xx, yy, xy, energy, mean = _cells(fields, cell_px)
    # Coherence of the structure tensor (Bigun and Granlund 1987), of each cell and of the whole image.
    coherence = np.hypot(xx - yy, 2 * xy) / (xx + yy + np.float32(1e-9))
    of_xx, of_yy, of_xy = xx.mean(), yy.mean(), xy.mean()
    whole = np.hypot(of_xx - of_yy, 2 * of_xy) / (of_xx + of_yy + 1e-9)
    # Edge energy across the direction that prevails in the image: a line that does not follow the grain lowers it.
    angle = 0.5 * np.arctan2(2 * of_xy, of_xx - of_yy)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    stray = sine * sine * xx + cosine * cosine * yy - 2 * sine * cosine * xy
    cells = (np.sqrt(xx + yy), np.sqrt(energy), coherence, np.sqrt(np.maximum(stray, 0)), mean)
    return np.concatenate([[whole, np.abs(laplacian).max()], *(_unusual(cell) for cell in cells)])


def _cells(fields: np.ndarray, cell_px: int) -> np.ndarray:
    """Means over the cells of a grid: [n, rows, columns] of fields [n, height, width]; the last may be smaller."""
    height, width = fields.shape[1:]
    rows, columns = np.arange(0, height, cell_px), np.arange(0, width, cell_px)
    sums = np.add.reduceat(np.add.reduceat(fields, rows, axis=1), columns, axis=2)
    sizes = np.diff([*rows, height])[:, None] * np.diff([*columns, width])[None, :]
    return sums / sizes.astype(np.float32)


def _unusual(cells: np.ndarray) -> list[float]:
    """Mean and spread of a value over the cells, its extremes, and how far these lie from the median cell."""
    flat = np.sort(cells, axis=None)
    median = float(flat[len(flat) // 2])
    spread = float(flat[(3 * len(flat)) // 4] - flat[len(flat) // 4]) + 1e-6
    low, high = float(flat[0]), float(flat[-1])
    return [float(flat.mean()), spread, low, high, (median - low) / spread, (high - median) / spread]


def _line_statistics(grey: np.ndarray) -> np.ndarray:
    """Responses of line filters, the strongest direction first: mean size, quantiles, extremes and unusual cells."""
    height, width = grey.shape
    pad = int(3 * _LINE_ALONG)
    shape = tuple(fft.next_fast_len(size + 2 * pad, real=True) for size in grey.shape)
    margins = [(pad, whole - size - pad) for whole, size in zip(shape, grey.shape, strict=True)]
    padded = np.pad(grey - grey.mean(), margins, mode="symmetric")
    responses = fft.irfft2(fft.rfft2(padded) * _line_filters(*shape), s=shape)
    responses = responses[:, pad : pad + height, pad : pad + width]
    size = np.abs(responses)
    energy = size.mean(axis=(1, 2))
    first = int(energy.argmax())
    order = [(first + index) % _DIRECTIONS for index in range(_DIRECTIONS)]
    low, high = responses.min(axis=(1, 2)), responses.max(axis=(1, 2))
    per_direction = np.stack([energy, low, high, np.maximum(high, -low) / (energy + 1e-6)])[:, order]
    # Directions away from the grain, where a line stands out.
    stray = size[[order[index] for index in range(2, _DIRECTIONS - 1)]].max(axis=0)
    return np.concatenate([per_direction.ravel(), _quantiles(stray), _unusual(_cell_maxima(stray))])


def _cell_maxima(field: np.ndarray) -> np.ndarray:
    height, width = field.shape
    rows, columns = np.arange(0, height, _CELL_PX), np.arange(0, width, _CELL_PX)
    return np.maximum.reduceat(np.maximum.reduceat(field, rows, axis=0), columns, axis=1)


@lru_cache(maxsize=4)
def _line_filters(height: int, width: int) -> np.ndarray:
    """Transfer functions float32 [directions, height, width // 2 + 1] of second derivatives of long Gaussians."""
    vertical = 2 * np.pi * np.fft.fftfreq(height)[None, :, None]
    horizontal = 2 * np.pi * np.fft.rfftfreq(width)[None, None, :]
    angles = (np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS)[:, None, None]
    along = np.cos(angles) * horizontal + np.sin(angles) * vertical
    across = np.cos(angles) * vertical - np.sin(angles) * horizontal
    return (across**2 * np.exp(-0.5 * ((_LINE_ALONG * along) ** 2 + (_LINE_ACROSS * across) ** 2))).astype(np.float32)


@lru_cache(maxsize=1)
def _pattern_classes() -> np.ndarray:
    """Class of each of the 256 patterns: number of ones where these are one run around the circle, else 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9)


def _binary_patterns(grey: np.ndarray) -> np.ndarray:
    """Histogram [10] of rotation-invariant uniform local binary patterns (Ojala, Pietikäinen and Mäenpää 2002)."""
    padded = np.pad(grey, 1, mode="edge")
    height, width = grey.shape
    ring = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    code = np.zeros(grey.shape, dtype=np.uint8)
    for bit, (y, x) in enumerate(ring):
        code |= (padded[y : y + height, x : x + width] >= grey).view(np.uint8) << np.uint8(bit)
    counts = np.bincount(code.ravel(), minlength=256)
    return np.bincount(_pattern_classes(), weights=counts, minlength=10) / grey.size
