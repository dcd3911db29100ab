"""Images of every mode and fault: what is converted, what is refused, and how they are brought to size."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.errors import DataError
from recipes.defect_detection import images
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.images import (
    Format,
    UnreadableError,
    decode_image,
    decode_mask,
    fit_image,
    fit_mask,
    read_frame,
    smallest_part_px,
)
from tests.pictures import pixels

GREY, COLOUR = Format(24, 24, 1, "pad"), Format(24, 24, 3, "pad")
VALUES = pixels(0)


def _saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _read(data: bytes, form: Format = GREY) -> tuple[np.ndarray, list[str]]:
    decoded = decode_image(data, form)
    notes = [note for index, note in enumerate(images.NOTES) if decoded.notes >> index & 1]
    return fit_image(decoded.image, form), notes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA"])
def test_grey_pixels_come_out_as_they_were(kind: str) -> None:
    data = _saved(Image.fromarray(VALUES), kind, **({"lossless": True} if kind == "WEBP" else {}))
    read, notes = _read(data)
    assert (read[0] == VALUES).all()
    assert notes == []
    wide, _ = _read(data, COLOUR)
    assert (wide == VALUES).all()
    assert wide.shape == (3, 24, 24)


def test_colour_is_kept_or_made_grey_and_only_real_colour_is_noted() -> None:
    rgb = Image.fromarray(pixels(1, channels=3))
    read, notes = _read(_saved(rgb), COLOUR)
    assert (read.transpose(1, 2, 0) == np.asarray(rgb)).all()
    assert notes == []
    grey, notes = _read(_saved(rgb))
    assert (grey[0] == np.asarray(rgb.convert("L"))).all()
    assert notes == ["colour made grey"]
    read, notes = _read(_saved(Image.fromarray(VALUES).convert("RGB")))
    assert (read[0] == VALUES).all()
    assert notes == []


def test_palettes_and_bits_are_pixels() -> None:
    few = VALUES // 64 * 64
    read, notes = _read(_saved(Image.fromarray(few).convert("P")))
    assert (read[0] == few).all()
    assert notes == []
    bits = Image.fromarray(VALUES > 128)
    assert (_read(_saved(bits))[0][0] == (VALUES > 128) * 255).all()


def test_cmyk_is_made_rgb() -> None:
    rgb = Image.fromarray(pixels(1, channels=3))
    read, notes = _read(_saved(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0), COLOUR)
    assert np.abs(read.transpose(1, 2, 0).astype(int) - np.asarray(rgb)).mean() < 4
    assert notes == ["CMYK or another colour space made RGB"]


def test_transparent_parts_are_black_and_an_opaque_alpha_is_nothing() -> None:
    alpha = np.full((24, 24), 255, dtype=np.uint8)
    opaque = Image.fromarray(np.dstack([VALUES, VALUES, VALUES, alpha]), "RGBA")
    assert (_read(_saved(opaque))[0][0] == VALUES).all()
    assert _read(_saved(opaque))[1] == []
    alpha[:, :12] = 0
    half = Image.fromarray(np.dstack([VALUES, VALUES, VALUES, alpha]), "RGBA")
    read, notes = _read(_saved(half))
    assert (read[0, :, :12] == 0).all()
    assert (read[0, :, 12:] == VALUES[:, 12:]).all()
    assert notes == ["transparent parts made black"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_is_scaled_by_its_depth_and_not_clipped(kind: str) -> None:
    deep = Image.fromarray(VALUES.astype(np.uint16) * 257)
    read, notes = _read(_saved(deep, kind))
    assert (read[0] == VALUES).all()
    assert notes == ["16-bit pixels scaled to 8 bits"]
    twelve = Image.fromarray((VALUES.astype(np.uint16) << 4) + (VALUES >> 4))
    read = fit_image(decode_image(_saved(twelve, kind), Format(24, 24, 1, "pad", bits=12)).image, GREY)
    assert (read[0] == VALUES).all()
    assert decode_image(_saved(twelve, kind), GREY).largest == int(VALUES.max()) * 16 + int(VALUES.max() >> 4)


def _deep_png(values: np.ndarray) -> bytes:
    """A PNG of uint16 [height, width, channels], which Pillow cannot write."""
    height, width, channels = values.shape
    colour = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [*chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def _deep_tiff(values: np.ndarray, order: str) -> bytes:
    """A TIFF of uint16 [height, width, 3], bare; order: < or >."""
    height, width, channels = values.shape
    tags = {256: width, 257: height, 258: 0, 259: 1, 262: 2, 273: 8, 277: channels, 278: height, 279: values.nbytes}
    content = values.astype(f"{order}u2").tobytes()
    bits_at = 8 + len(content)
    data = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, bits_at + 6) + content
    data += struct.pack(f"{order}3H", 16, 16, 16) + struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        data += struct.pack(f"{order}HHII", tag, *((3, 3, bits_at) if tag == 258 else (4, 1, value)))
    return data + struct.pack(f"{order}I", 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF<", "TIFF>"])
def test_deep_colour_is_scaled_by_its_depth_as_grey_is(kind: str) -> None:
    rgb = pixels(1, channels=3)

    def written(values: np.ndarray) -> bytes:
        return _deep_png(values) if kind == "PNG" else _deep_tiff(values, kind[-1])

    read, notes = _read(written(rgb.astype(np.uint16) * 257), COLOUR)
    assert (read.transpose(1, 2, 0) == rgb).all()
    assert notes == ["16-bit pixels scaled to 8 bits"]
    twelve = (rgb.astype(np.uint16) << 4) + (rgb >> 4)
    assert decode_image(written(twelve), COLOUR).largest == twelve.max()
    read = fit_image(decode_image(written(twelve), Format(24, 24, 3, "pad", bits=12)).image, COLOUR)
    assert (read.transpose(1, 2, 0) == rgb).all()
    assert (read_frame(twelve, DataConfig(size_px=24, channels=3), bits=12).image == read).all()
    marked = np.zeros((24, 24, 3), dtype=np.uint16)
    marked[3:5, 6:9, 1] = 7
    assert (decode_mask(written(marked)) == (marked[:, :, 1] > 0)).all()


def test_deep_pixels_with_alpha_are_scaled_too() -> None:
    rgb, alpha = pixels(1, channels=3).astype(np.uint16), np.full((24, 24, 1), 65535, dtype=np.uint16)
    alpha[:, :12] = 0
    read, notes = _read(_deep_png(np.concatenate([rgb * 257, alpha], 2)), COLOUR)
    assert (read[:, :, 12:].transpose(1, 2, 0) == rgb[:, 12:]).all()
    assert not read[:, :, :12].any()
    assert notes == ["16-bit pixels scaled to 8 bits", "transparent parts made black"]
    grey = np.concatenate([VALUES[:, :, None].astype(np.uint16) << 4 | VALUES[:, :, None] >> 4, alpha], 2)
    decoded = decode_image(_deep_png(grey), Format(24, 24, 1, "pad", bits=12))
    assert (fit_image(decoded.image, GREY)[0, :, 12:] == VALUES[:, 12:]).all()
    assert decoded.largest == grey[:, :, 0].max()


def test_float_pixels_from_0_to_1_are_scaled_and_others_refused() -> None:
    read, notes = _read(_saved(Image.fromarray((VALUES / 255).astype(np.float32)), "TIFF"))
    assert (read[0] == VALUES).all()
    assert notes == ["float pixels from 0 to 1 scaled to 8 bits"]
    for wrong in (VALUES.astype(np.float32), np.full((4, 4), np.nan, dtype=np.float32)):
        with pytest.raises(UnreadableError, match="allowed are 0 to 1"):
            _read(_saved(Image.fromarray(wrong), "TIFF"))


def test_integers_beyond_16_bits_are_refused() -> None:
    with pytest.raises(UnreadableError, match="allowed are 0 to 65535"):
        _read(_saved(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_stand_upright_as_their_exif_says(kind: str) -> None:
    upright = pixels(3, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right to see it
    lying = Image.fromarray(np.rot90(upright).copy())
    data = _saved(lying, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    decoded = decode_image(data, GREY)
    assert (decoded.image.height, decoded.image.width) == (16, 24)
    assert np.abs(np.asarray(decoded.image).astype(int) - upright).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    with pytest.raises(UnreadableError, match="holds 3 pictures"):
        _read(_saved(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_damaged_files_are_told_apart() -> None:
    jpeg = _saved(Image.fromarray(pixels(0, 200, 200)), "JPEG")
    png = _saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)))
    cases = {b"": "is empty", jpeg[: len(jpeg) // 2]: "truncated", b"no image at all": "known format"}
    cases |= {png[: len(png) // 2]: "damaged", jpeg[:10]: "damaged|known format"}
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    cases[bytes(flipped)] = "damaged"
    for data, reason in cases.items():
        with pytest.raises(UnreadableError, match=reason):
            _read(data)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    for side in (9_500, 13_500):  # beyond Pillow's warning, and beyond its error
        with pytest.raises(UnreadableError, match="more than 89 million pixels"):
            _read(_png_of_side(side))


def _png_of_side(side: int) -> bytes:
    """A PNG whose header says so, before a few bytes of pixels."""
    data = bytearray(_saved(Image.new("L", (16, 16))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_the_picture_of_a_camera_is_read_without_its_previews() -> None:
    picture, preview = (Image.fromarray(pixels(seed, channels=3)) for seed in range(2))
    data = _saved(picture, "MPO", save_all=True, append_images=[preview], quality=100)
    read, _ = _read(data, COLOUR)
    assert np.abs(read.transpose(1, 2, 0).astype(int) - np.asarray(picture)).mean() < 8


def test_padding_keeps_proportions_never_enlarges_and_repeats_the_edge() -> None:
    form = Format(32, 32, 1, "pad")
    small = fit_image(Image.fromarray(pixels(0, 10, 20)), form)[0]
    assert (small[11:21, 6:26] == pixels(0, 10, 20)).all()
    assert (small[0, 6:26] == pixels(0, 10, 20)[0]).all()
    assert form.placed(64, 128) == (16, 32, 8, 0)
    assert form.placed(1, 5000)[:2] == (1, 32)
    assert Format(32, 32, 1, "stretch").placed(10, 20) == (32, 32, 0, 0)


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("side", [50, 64, 97, 128, 300])
def test_a_smaller_mask_marks_what_touches_the_defect_and_a_larger_one_the_nearest(fit: Any, side: int) -> None:
    form, generator = Format(64, 48, 1, fit), np.random.default_rng(side)
    mask = generator.random((side, side)) < 0.01
    fitted = fit_mask(mask, form)
    rows, columns, top, left = form.placed(side, side)
    expected = np.zeros((rows, columns), dtype=bool)
    if rows < side:
        for y, x in np.argwhere(mask):
            ys = [r for r in range(rows) if r * side < (y + 1) * rows and (r + 1) * side > y * rows]
            xs = [c for c in range(columns) if c * side < (x + 1) * columns and (c + 1) * side > x * columns]
            expected[np.ix_(ys, xs)] = True
        if columns < side:
            assert (fitted[top : top + rows, left : left + columns] == expected).all()
    elif rows == columns == side:
        assert (fitted[top : top + rows, left : left + columns] == mask).all()
    assert fitted.dtype == np.uint8
    assert fitted.any() == mask.any()


def test_a_mask_made_larger_takes_the_nearest_pixel() -> None:
    mask = np.random.default_rng(0).random((10, 15)) < 0.3
    nearest = Image.fromarray(mask.astype(np.uint8)).resize((45, 40), Image.Resampling.NEAREST)
    assert (fit_mask(mask, Format(40, 45, 1, "stretch")) == np.asarray(nearest)).all()


def test_whatever_is_not_black_is_marked() -> None:
    mask = np.zeros((24, 24), dtype=bool)
    mask[4:9, 5:7] = True
    for image in (
        Image.fromarray(mask),
        Image.fromarray(mask.astype(np.uint8)),  # classes as numbers
        Image.fromarray(mask.astype(np.uint8) * 255),
        Image.fromarray(mask.astype(np.uint16) * 300),
        Image.fromarray(np.dstack([mask * np.uint8(200), mask * np.uint8(0), mask * np.uint8(0)])),
        Image.fromarray(np.dstack([np.full((24, 24, 3), 90, dtype=np.uint8), mask * np.uint8(255)]), "RGBA"),
    ):
        assert (decode_mask(_saved(image)) == mask).all(), image.mode
    noisy = decode_mask(_saved(Image.fromarray(mask.astype(np.uint8) * 255), "JPEG", quality=90))
    assert (noisy == mask).mean() > 0.98
    assert not noisy[16:].any()


def test_the_smallest_part_is_counted_by_its_area_after_the_resizing() -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[2:10, 2:10] = True  # 64 pixels
    mask[50, 50:66] = True  # a scratch of 16
    mask[51, 66] = True  # that goes on over a corner
    assert smallest_part_px(mask, Format(128, 128, 1, "pad")) == 17
    assert smallest_part_px(mask, Format(64, 64, 1, "pad")) == 4, "17 / 4, though 8 pixels of the mask touch it"
    assert fit_mask(mask, Format(64, 64, 1, "pad")).sum() > 16
    assert smallest_part_px(np.zeros((8, 8), dtype=bool), GREY) == 0


def test_a_new_frame_says_where_it_lies(tmp_path: Path) -> None:
    data = DataConfig(size_px=32)
    Image.fromarray(pixels(0, 64, 32)).save(tmp_path / "a.png")
    frame = read_frame(str(tmp_path / "a.png"), data)
    assert frame.image.shape == (1, 32, 32)
    assert frame.place == (0, 8, 32, 16, 64, 32)
    same = pixels(0, 64, 32)
    for source in ((tmp_path / "a.png").read_bytes(), same, np.dstack([same] * 3), same[:, :, None]):
        assert (read_frame(source, data).image == frame.image).all()
    for deep in (same.astype(np.uint16) * 257, (same / 255).astype(np.float64)):
        assert np.abs(read_frame(deep, data).image.astype(int) - frame.image).max() <= 1
    assert (read_frame(same.astype(np.uint16) << 4 | (same >> 4), data, bits=12).image == frame.image).all()


def test_a_frame_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b\.png is no image of a known format"):
        read_frame(str(tmp_path / "b.png"), DataConfig())
    with pytest.raises(DataError, match=r"c\.png cannot be read: No such file"):
        read_frame(str(tmp_path / "c.png"), DataConfig())
    with pytest.raises(DataError, match=r"an array \[2, 3, 4, 5\] of uint8"):
        read_frame(np.zeros((2, 3, 4, 5), dtype=np.uint8), DataConfig())
