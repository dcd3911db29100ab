"""Read an image or a mask, whatever its format and mode, and bring it to size. Torch-free.

What can be read faithfully is converted, and noted; what cannot is refused with the reason.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from dist_train.errors import DataError
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.deep_colour import LowBytes, open_low_bytes

# Changes whenever the same file would be read into other pixels.
VERSION = 2

_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "TGA")
NOTES = (
    "colour made grey",
    "16-bit pixels scaled to 8 bits",
    "float pixels from 0 to 1 scaled to 8 bits",
    "transparent parts made black",
    "turned upright as their EXIF says",
    "CMYK or another colour space made RGB",
)
"""What may have been done to an image, in words; a set of them is a number with these bits."""
_GREY, _DEEP, _FLOAT, _TRANSPARENT, _TURNED, _SPACE = (1 << index for index in range(len(NOTES)))
DEEP = _DEEP
_ORIENTATION = 0x0112
# Compression leaves values near 0 around a mask that was kept as JPEG.
_JPEG_MASK_FROM = 128


class UnreadableError(Exception):
    """An image that cannot be read; the message says why, without naming the file."""


@dataclass(frozen=True)
class Format:
    """What images are brought to."""

    height: int
    width: int
    channels: Literal[1, 3]
    fit: Literal["pad", "stretch"]
    bits: int = 16
    """Bits that 16-bit images really use: cameras keep 10, 12 or 14 bits in 16."""

    def placed(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Height and width that an image is resized to, and the place of its upper left corner in the form."""
        if self.fit == "stretch":
            return self.height, self.width, 0, 0
        scale = min(1.0, self.height / height, self.width / width)
        rows = min(max(1, round(height * scale)), self.height)
        columns = min(max(1, round(width * scale)), self.width)
        return rows, columns, (self.height - rows) // 2, (self.width - columns) // 2


@dataclass(frozen=True)
class Frame:
    """A new image as the network sees it."""

    image: np.ndarray
    """uint8 [channels, height, width]"""
    place: tuple[int, ...]
    """Where it lies in there (top, left, height, width), and its own height and width."""


def format_of(data: DataConfig, bits: int = 16) -> Format:
    height, width = data.height_width
    return Format(height, width, data.channels, data.fit, bits)


def read_frame(source: str | bytes | np.ndarray, data: DataConfig, bits: int = 16) -> Frame:
    """An image that lies in a file, in the bytes of one, or in an array [height, width] or [height, width, channels].
    bits: those of the prepared data, from its facts. DataError with the file's name.
    """
    form = format_of(data, bits)
    try:
        if isinstance(source, np.ndarray):
            image = _converted(_from_array(source, bits), form).image
        else:
            image = decode_image(Path(source).read_bytes() if isinstance(source, str) else source, form).image
    except OSError as error:
        raise DataError(f"{source!s} cannot be read: {error.strerror or error}.") from error
    except UnreadableError as error:
        raise DataError(f"{source if isinstance(source, str) else 'an image'} {error}.") from None
    rows, columns, top, left = form.placed(image.height, image.width)
    return Frame(fit_image(image, form), (top, left, rows, columns, image.height, image.width))


def _from_array(values: np.ndarray, bits: int) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    shapes = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not shapes or not values.size or values.dtype not in (np.uint8, np.uint16, np.float32, np.float64, np.bool_):
        raise UnreadableError(
            f"is an array {list(values.shape)} of {values.dtype}; allowed are [height, width] and [height, width, 3], "
            "of uint8, uint16, or floats from 0 to 1"
        )
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    if values.dtype == np.uint16 and values.ndim == 3:
        values = _to_bytes(values, bits)
    try:
        return Image.fromarray(np.ascontiguousarray(values))
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"is an array of {values.dtype} with {values.ndim} axes: {error}") from None


@dataclass(frozen=True)
class Decoded:
    image: Image.Image
    """Mode L or RGB, upright, in its own size."""
    notes: int
    largest: int = 0
    """Largest value of a 16-bit image."""


def decode_image(data: bytes, form: Format) -> Decoded:
    """The image in a file's bytes. UnreadableError."""
    opened = _open(data)
    image, notes = opened.image, _TURNED if opened.turned else 0
    if opened.low is None:
        return _converted(image, form, notes)
    values, alpha = opened.low.joined(image)
    scaled = Image.fromarray(_to_bytes(values, form.bits))
    if alpha is not None:
        scaled.putalpha(Image.fromarray(alpha))
    return _converted(scaled, form, notes | _DEEP, int(values.max()))


def _converted(image: Image.Image, form: Format, notes: int = 0, largest: int = 0) -> Decoded:
    """In the mode that the form asks for."""
    if image.mode.startswith("I") or image.mode == "F":
        grey, largest = _scaled(image, form.bits)
        notes |= _FLOAT if image.mode == "F" else _DEEP
        return Decoded(_with_channels(Image.fromarray(grey), form.channels), notes, largest)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            # What lies under transparent pixels was never meant to be seen.
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            notes |= _TRANSPARENT
        image = image.convert("RGB")
    elif image.mode not in ("L", "RGB"):
        notes |= 0 if image.mode == "P" else _SPACE
        image = image.convert("RGB")
    if form.channels == 1 and image.mode == "RGB" and _is_coloured(image):
        notes |= _GREY
    return Decoded(_with_channels(image, form.channels), notes, largest)


def decode_mask(data: bytes) -> np.ndarray:
    """bool [height, width], true in the defect: whatever is not black. UnreadableError."""
    opened = _open(data)
    image = opened.image
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image) > 0
    if opened.low is not None:
        values, alpha = opened.low.joined(image)
        return (values.max(axis=2) > 0) & (True if alpha is None else alpha > 0)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    values = np.asarray(image.convert("RGB")).max(axis=2)
    return values >= (_JPEG_MASK_FROM if image.format in ("JPEG", "MPO") else 1)


@dataclass(frozen=True)
class _Opened:
    """The only picture of a file, decoded and upright."""

    image: Image.Image
    turned: bool
    """For that, as its EXIF says."""
    low: LowBytes | None
    """The low bytes of colour of 16 bits, of which the image has the high ones."""


def _open(data: bytes) -> _Opened:
    if not data:
        raise UnreadableError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            file_format, frames = image.format, getattr(image, "n_frames", 1)
            # A camera's MPO holds previews behind its picture.
            if frames > 1 and file_format != "MPO":
                raise UnreadableError(f"holds {frames} pictures, as an animation does: keep one in a file")
            low = open_low_bytes(image, data)
            image.load()
            orientation = _orientation(image)
            image = _upright(image, orientation)
            image.format = file_format
            if low is not None:
                low.image.load()
                low = replace(low, image=_upright(low.image, orientation))
    except UnreadableError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UnreadableError(f"has more than {most:.0f} million pixels: cut or shrink it before") from None
    except Image.UnidentifiedImageError:
        raise UnreadableError("is no image of a known format") from None
    except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error and others
        raise UnreadableError(f"is damaged: {str(error) or type(error).__name__}") from None
    return _Opened(image, orientation != 1, low)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    info = image.info
    image = ImageOps.exif_transpose(image)
    image.info.update({key: info[key] for key in ("transparency",) if key in info})
    return image


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF beside a whole picture
        return 1
    return found if found in range(1, 9) else 1


def _scaled(image: Image.Image, bits: int) -> tuple[np.ndarray, int]:
    """Deep grey to uint8 by the depth that all such images of the data share, never by each image's own range."""
    values = np.asarray(image)
    if image.mode == "F":
        lowest, highest = float(values.min()), float(values.max())
        if not (lowest >= 0.0 and highest <= 1.0):  # also for NaN
            raise UnreadableError(f"has float pixels from {lowest:g} to {highest:g}; allowed are 0 to 1")
        return (values * 255 + 0.5).astype(np.uint8), 0
    lowest, largest = int(values.min()), int(values.max())
    if lowest < 0 or largest >= 2**16:
        raise UnreadableError(f"has 32-bit pixels from {lowest} to {largest}; allowed are 0 to 65535")
    return _to_bytes(values, bits), largest


def _to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    most = 2**bits - 1
    scaled = (np.minimum(values.astype(np.uint32), most) * 255 + most // 2) // most
    return scaled.astype(np.uint8)


def _is_coloured(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes()


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("L" if channels == 1 else "RGB")


def fit_image(image: Image.Image, form: Format) -> np.ndarray:
    """uint8 [channels, height, width]: resized with all source pixels taking part, filled up with the edge."""
    rows, columns, top, left = form.placed(image.height, image.width)
    if (image.height, image.width) != (rows, columns):
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(rows, columns, form.channels).transpose(2, 0, 1)
    if (rows, columns) != (form.height, form.width):
        sides = ((top, form.height - rows - top), (left, form.width - columns - left))
        pixels = np.pad(pixels, ((0, 0), *sides), mode="edge")
    return np.ascontiguousarray(pixels)


def fit_mask(mask: np.ndarray, form: Format) -> np.ndarray:
    """uint8 [height, width], 1 where the form's pixel covers any pixel of the defect, so that none gets lost."""
    rows, columns, top, left = form.placed(*mask.shape)
    fitted = _fit_rows(_fit_rows(mask, rows).T, columns).T
    result = np.zeros((form.height, form.width), dtype=np.uint8)
    result[top : top + rows, left : left + columns] = fitted
    return result


def _fit_rows(mask: np.ndarray, rows: int) -> np.ndarray:
    own, places = len(mask), np.arange(rows)
    if own == rows:
        return mask
    if own < rows:
        return mask[(2 * places + 1) * own // (2 * rows)]
    first, last = places * own // rows, -(-(places + 1) * own // rows)
    total = np.concatenate([np.zeros((1, mask.shape[1]), dtype=np.int32), mask.cumsum(axis=0, dtype=np.int32)])
    return total[last] > total[first]


def smallest_part_px(mask: np.ndarray, form: Format) -> int:
    """Pixels of the form that the smallest connected part (8 neighbours) of a mask in its own size fills, at least 1;
    0 for an empty mask.

    Of its area, not of the fitted mask, whose pixels count as soon as the defect touches them.
    """
    rows, columns, _, _ = form.placed(*mask.shape)
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return 0
    smallest = int(np.bincount(parts.ravel())[1:].min())
    return max(1, int(smallest * rows * columns / mask.size))
