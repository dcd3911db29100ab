"""Defects that are put into good training images: drawn scratches, real ones cut out by their masks, and patches of
other good images. Each image's is a function of its seed alone. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recipes.defect_detection.paste import paste_defect
from recipes.defect_detection.scratches import draw_scratch

Example = tuple[np.ndarray, np.ndarray]
"""An image uint8 [channels, height, width], and its mask uint8 [height, width]."""

# Ranges of drawn scratches, widely around what is seen in practice: what matters is to be seen, not to be alike.
_WIDTH_PX, _LENGTH_SHARE, _CONTRAST = (0.8, 3.0), (0.08, 0.5), (0.08, 0.45)
_PATCH_SHARE = (0.05, 0.3)


@dataclass(frozen=True)
class DefectShares:
    """How often a good image gets which defect; they sum up to at most 1."""

    scratches: float = 0.0
    paste: float = 0.0
    patches: float = 0.0

    @property
    def total(self) -> float:
        return self.scratches + self.paste + self.patches


def add_defect(
    image: np.ndarray,
    seed: int,
    shares: DefectShares,
    defect: Callable[[float], Example],
    other: Callable[[float], np.ndarray],
    flips: bool,
) -> np.ndarray | None:
    """A new image with a defect, or None where this seed draws none.

    defect, other: from a number in 0..1 to a real defect with its mask, and to another good image.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.random()
    if drawn < shares.scratches:
        return _scratched(image, generator)
    drawn -= shares.scratches
    if drawn < shares.paste:
        source, mask = defect(generator.random())
        return paste_defect(image, source, mask, generator, flips)[0]
    if drawn < shares.paste + shares.patches:
        return _patched(image, other(generator.random()), generator)
    return None


def _scratched(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    width, share, contrast = (generator.uniform(*limits) for limits in (_WIDTH_PX, _LENGTH_SHARE, _CONTRAST))
    scratched, _ = draw_scratch(
        image.astype(np.float32) / 255, generator, width, share * max(image.shape[1:]), contrast
    )
    return np.round(np.clip(scratched, 0, 1) * 255).astype(np.uint8)


def _patched(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A rectangle of another good image, somewhere else: what is in its wrong place (Li et al. 2021, "CutPaste")."""
    height, width = image.shape[1:]
    rows, columns = (
        max(2, round(length * float(np.exp(generator.uniform(*np.log(_PATCH_SHARE)))))) for length in (height, width)
    )
    top, left, from_top, from_left = (
        int(generator.integers(0, length - part + 1))
        for length, part in ((height, rows), (width, columns), (height, rows), (width, columns))
    )
    patched = image.copy()
    patch = other[:, from_top : from_top + rows, from_left : from_left + columns].astype(np.float32)
    patched[:, top : top + rows, left : left + columns] = np.clip(patch * generator.uniform(0.85, 1.15), 0, 255)
    return patched
