"""Paste a real defect, cut out by its mask, onto another image. Torch-free.

After Ghiasi et al. (2021), "Simple Copy-Paste": the brightness is matched to where it goes, the edge feathered.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# Pixels around the mask that come along, the blend falling to nothing over them.
_MARGIN = 3


def paste_defect(
    target: np.ndarray, source: np.ndarray, mask: np.ndarray, generator: np.random.Generator, flips: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask): `target` with the defect of `source` at a random place, and where it now is.

    target, source: uint8 [channels, height, width]; mask: uint8 [height, width], 1 in the defect, with at least one.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    region = tuple(
        slice(max(0, int(ends[0]) - _MARGIN), min(length, int(ends[-1]) + _MARGIN + 1))
        for ends, length in ((rows, mask.shape[0]), (columns, mask.shape[1]))
    )
    patch, cut = source[:, *region].astype(np.float32), mask[region] > 0
    if flips:
        for axis in (0, 1):
            if generator.random() < 0.5:
                patch, cut = np.flip(patch, axis + 1), np.flip(cut, axis)
    height, width = (min(own, there) for own, there in zip(cut.shape, target.shape[1:], strict=True))
    patch, cut = patch[:, :height, :width], cut[:height, :width]
    top, left = (
        int(generator.integers(0, there - own + 1)) for there, own in zip(target.shape[1:], cut.shape, strict=True)
    )
    place = (slice(None), slice(top, top + height), slice(left, left + width))
    blend = np.clip(1 - ndimage.distance_transform_edt(~cut) / _MARGIN, 0, 1).astype(np.float32)
    around = ~cut if (~cut).any() else np.ones_like(cut)
    under = target[place].astype(np.float32)
    shift = (under[:, around].mean(1) - patch[:, around].mean(1))[:, None, None]
    image = target.copy()
    image[place] = np.clip(np.rint(under + blend * (patch + shift - under)), 0, 255)
    pasted = np.zeros_like(mask)
    pasted[place[1:]] = cut
    return image, pasted
