"""Mask-guided copy-paste: a real defect, cut out by its mask, set into another image (Ghiasi et al. 2021)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

_FEATHER_PX = 3
_TOGETHER_PX = 4  # parts of a mask that lie closer than this belong to one defect


def paste_defect(
    target: np.ndarray, source: np.ndarray, mask: np.ndarray, generator: np.random.Generator, flips: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask): the target with one defect of the source at a random place, new arrays.

    target, source: uint8 [channels, height, width]; mask: uint8 [height, width], 1 in the source's defects, of which
    one is drawn. flips: mirror it at random. The edge is feathered, and the defect is made so much brighter or darker
    that its surroundings match those at its new place. ValueError: the mask is empty, or the defect is larger than the
    target.
    """
    patch, inside = _cut_out(source, _one_defect(mask, generator))
    if flips:
        for axis in (1, 2):
            if generator.random() < 0.5:
                patch, inside = np.flip(patch, axis), np.flip(inside, axis - 1)
    height, width = inside.shape
    if height > target.shape[1] or width > target.shape[2]:
        raise ValueError(f"the defect is {height} x {width} pixels, but the target only {target.shape[1:]}")
    y = int(generator.integers(target.shape[1] - height + 1))
    x = int(generator.integers(target.shape[2] - width + 1))
    place = (slice(y, y + height), slice(x, x + width))
    below = target[:, *place].astype(np.float32)
    weight = np.clip(1 - ndimage.distance_transform_edt(~inside) / (_FEATHER_PX + 1), 0, 1).astype(np.float32)
    around = ~inside
    shift = (below - patch)[:, around].mean(axis=1) if around.any() else np.zeros(len(target), dtype=np.float32)
    mixed = below + weight * (patch + shift[:, None, None] - below)
    image, pasted = target.copy(), np.zeros(target.shape[1:], dtype=np.uint8)
    image[:, *place] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    pasted[place] = inside
    return image, pasted


def _one_defect(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """bool [height, width]: one of the defects; a line that the mask shows broken is one."""
    if not mask.any():
        raise ValueError("the mask of the source is empty: there is no defect to paste")
    near = ndimage.distance_transform_edt(mask == 0) <= _TOGETHER_PX / 2
    parts, count = ndimage.label(near, structure=np.ones((3, 3)))
    return (mask > 0) & (parts == 1 + int(generator.integers(count)))


def _cut_out(source: np.ndarray, defect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [channels, h, w], bool [h, w]): the defect's bounding box and a margin to feather in."""
    edges = []
    for axis in (0, 1):
        filled = np.flatnonzero(defect.any(axis=1 - axis))
        edges.append(slice(max(0, filled[0] - _FEATHER_PX), filled[-1] + 1 + _FEATHER_PX))
    return source[:, *edges].astype(np.float32), defect[tuple(edges)]
