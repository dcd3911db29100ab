"""Draws a scratch into an image: for generated images, and for training on defects that are rare or were never seen."""

from __future__ import annotations

import numpy as np

_SEGMENT_PX = 4.0
_TAPER = 0.15  # share of the length, at each end, over which a scratch becomes shallower
_END_DEPTH = 0.4


def draw_scratch(
    image: np.ndarray,
    generator: np.random.Generator,
    width_px: float,
    length_px: float,
    contrast: float,
    direction: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask) with a scratch: float32 [channels, height, width] in 0..1 and uint8 [height, width], new arrays.

    A slightly bent line of the width and length, wholly inside the image where it fits. It is `contrast` of the full
    range darker or lighter than what it crosses: the mean along the line, since the depth varies. direction: its mean
    angle in radians, from the x axis towards the y axis; None draws one.
    """
    height, width = image.shape[1:]
    points = _place(
        _bent_line(generator, max(length_px - width_px, length_px / 4), direction), height, width, generator
    )
    depth = _depth_along(generator, len(points))
    coverage, relief = _rasterise(points, depth, width_px, height, width)
    whole = min(1.0, width_px)
    if not (coverage > 0.4 * whole).any():  # less than a pixel long, and it lies between pixels
        middle = tuple(np.rint(points[len(points) // 2]).astype(int))
        coverage[middle] = relief[middle] = whole
    mask = (coverage > 0.4 * whole).astype(np.uint8)
    signed = _signed_contrast(image, mask, contrast, generator)
    return np.clip(image + np.float32(signed) * relief, 0.0, 1.0).astype(np.float32), mask


def _bent_line(generator: np.random.Generator, length: float, direction: float | None) -> np.ndarray:
    """Points [n, 2] as (y, x) about the line's middle, at equal distances along it."""
    angle = generator.random() * np.pi if direction is None else direction
    bend = (generator.random() * 2 - 1) * 0.5  # radians from one end to the other
    segments = max(2, round(length / _SEGMENT_PX))
    headings = angle + bend * ((np.arange(segments) + 0.5) / segments - 0.5)
    headings += 0.06 * (generator.random(segments) * 2 - 1)
    steps = np.stack([np.sin(headings), np.cos(headings)], axis=1) * (length / segments)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return points - points[segments // 2]


def _place(points: np.ndarray, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """The points moved to a random place: all of them inside the image, or else the middle one."""
    moved = points.copy()
    for axis, size in enumerate((height, width)):
        low, high = -points[:, axis].min(), size - 1 - points[:, axis].max()
        if low > high:
            low, high = 0.0, size - 1.0
        moved[:, axis] += low + (high - low) * generator.random()
    return moved


def _depth_along(generator: np.random.Generator, count: int) -> np.ndarray:
    """Depth at each point, mean 1."""
    position = np.linspace(0.0, 1.0, count)
    knots = 0.6 + 0.8 * generator.random(max(3, count // 3 + 1))
    depth = np.interp(position, np.linspace(0.0, 1.0, len(knots)), knots)
    depth *= np.interp(np.minimum(position, 1 - position), [0.0, _TAPER], [_END_DEPTH, 1.0])
    # The two end points carry half a segment each.
    return depth / ((depth.sum() - (depth[0] + depth[-1]) / 2) / (count - 1))


def _rasterise(
    points: np.ndarray, depth: np.ndarray, width_px: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, coverage times depth): float32 [height, width]; coverage is the share of a pixel under the line."""
    coverage = np.zeros((height, width), dtype=np.float32)
    relief = np.zeros((height, width), dtype=np.float32)
    reach = (width_px + 1) / 2
    for start, stop, from_depth, to_depth in zip(points[:-1], points[1:], depth[:-1], depth[1:], strict=True):
        low = np.maximum(np.floor(np.minimum(start, stop) - reach), 0).astype(int)
        high = np.minimum(np.ceil(np.maximum(start, stop) + reach) + 1, (height, width)).astype(int)
        if (low >= high).any():
            continue
        window = (slice(low[0], high[0]), slice(low[1], high[1]))
        y = np.arange(low[0], high[0])[:, None] - start[0]
        x = np.arange(low[1], high[1])[None, :] - start[1]
        step = stop - start
        along = np.clip((y * step[0] + x * step[1]) / (step @ step), 0.0, 1.0)
        distance = np.hypot(y - along * step[0], x - along * step[1])
        # A band that crosses a row of pixels covers this much of each: its integral across the band is its width.
        covered = np.clip(reach - distance, 0.0, min(1.0, width_px))
        more = covered > coverage[window]
        coverage[window][more] = covered[more]
        relief[window][more] = (covered * (from_depth + along * (to_depth - from_depth)))[more]
    return coverage, relief


def _signed_contrast(image: np.ndarray, mask: np.ndarray, contrast: float, generator: np.random.Generator) -> float:
    """Darker or lighter at random, but never where the range leaves no room for it."""
    darker = generator.random() < 0.5
    around = float(image[:, mask > 0].mean()) if mask.any() else float(image.mean())
    if around < contrast or around > 1 - contrast:
        darker = around > 0.5
    return -contrast if darker else contrast
