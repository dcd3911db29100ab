"""Colour of 16 bits, of which Pillow keeps the high byte of each value alone: the other one, read beside it."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# How Pillow unpacks such pixels, by their byte order: big, little, or the machine's own.
_UNPACKED = re.compile(r"(RGBX?|RGBA);16([BLN])")
_GREY_ALPHA = "LA;16B"
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True)
class LowBytes:
    """A picture with the low byte of each value in place of the high one."""

    image: Image.Image
    is_grey: bool
    """Grey with alpha, as the four bytes of a pixel."""

    def joined(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
        """With the picture of high bytes: colour uint16 [height, width, 3], and alpha uint8 [height, width] where there
        is one."""
        high, low = np.asarray(image), np.asarray(self.image)
        if self.is_grey:
            low = low[:, :, [1, 1, 1, 3]]
        values = high[:, :, :3].astype(np.uint16) << 8 | low[:, :, :3]
        return values, high[:, :, 3] if high.shape[2] == 4 else None


def open_low_bytes(image: Image.Image, data: bytes) -> LowBytes | None:
    """Of a picture that is opened from the file's bytes and not loaded yet; not loaded either. None where a value has
    one byte, or Pillow keeps both, as of grey."""
    tiles: Any = getattr(image, "tile", None)
    rawmode = _rawmode(tiles[0].args) if tiles else ""
    match = _UNPACKED.fullmatch(rawmode)
    if match is None and rawmode != _GREY_ALPHA:
        return None
    # Read in the other byte order the low byte is the one that is kept.
    other = "RGBA" if match is None else f"{match[1]};16{_OTHER_ORDER[match[2]]}"
    low: Any = Image.open(io.BytesIO(data), formats=(str(image.format),))
    low.tile = [part._replace(args=_with_rawmode(part.args, other)) for part in low.tile]
    return LowBytes(low, match is None)


def _rawmode(args: Any) -> str:
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _with_rawmode(args: Any, rawmode: str) -> Any:
    return rawmode if isinstance(args, str) else (rawmode, *args[1:])
