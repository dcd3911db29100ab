"""Every image decoded once, brought to size and kept as bytes in one memory map, whatever labels and split say of it.

Workers write each image to its place, so that nothing is held and the bytes do not depend on their number. Torch-free.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dist_train.prepared import check_space, commit, is_whole, load_facts
from dist_train.worker_pool import map_in_workers
from recipes.defect_detection import images, synthetic
from recipes.defect_detection.coco import draw_outlines
from recipes.defect_detection.config import DataConfig, SyntheticConfig
from recipes.defect_detection.images import Decoded, Format, UnreadableError, format_of
from recipes.defect_detection.listing import Listing, Payload, counted, raise_problems
from recipes.defect_detection.progress import Progress

# Changes whenever the same pixels would be kept otherwise.
VERSION = 1
RECORD = np.dtype(
    [
        ("slot", "<i8"),  # place in the listing
        ("check", "<u4"),
        ("readable", "?"),
        ("pixel_hash", "V16"),
        ("file_hash", "V16"),
        ("notes", "<u2"),
        ("largest", "<u2"),  # value of a 16-bit image
        ("height", "<i4"),  # of the image as it was
        ("width", "<i4"),
        ("masked", "?"),
        ("defect_px", "<i8"),
        ("smallest_px", "<i8"),
        ("sums", "<u8", 3),
        ("squares", "<u8", 3),
        ("kind", "U24"),  # of generated images
    ]
)
"""What is known of an image beside its pixels. Hashes of 16 bytes; sums over the values of each channel."""
KEPT = ("images.npy", "checks.npy", "masks.npy")
_BATCH = 16
_DEPTHS = (8, 10, 12, 14, 16)
Say = Callable[[str], None]
Found = tuple[np.ndarray, dict[int, str], list[str]]
"""Records, why a slot's image cannot be read, and what is wrong otherwise."""


def store_images(listing: Listing, content: str, data: DataConfig, say: Say) -> Path:
    """The folder with the pixels of the listing: images.npy, checks.npy, masks.npy and records.npy; found again by
    content. DataError that names all images that cannot be read; StorageError.

    content: the digest of the listing's images and masks.
    """
    form = format_of(data)
    described = [VERSION, images.VERSION, content, asdict(form)]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    root = data.cache_dir.expanduser()
    folder = root / f"images-{key[:24]}"
    _remove_leftovers(root)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_whole(folder):
            say(f"data           images read before: {folder}")
            _refuse(listing, load_facts(folder)["unreadable"], [], data)
            return folder
        check_space(root, _bytes_needed(listing, form), 0, say)
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed preparation left; we hold the lock
        try:
            temporary.mkdir()
            commit(temporary, folder, _store(listing, temporary, form, data, say))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_leftovers(root: Path) -> None:
    """What killed preparations have left: nobody holds their locks."""
    for path in root.glob(".tmp-images-*"):
        with contextlib.suppress(Timeout), FileLock(root / f".{path.name.removeprefix('.tmp-')}.lock", timeout=0):
            shutil.rmtree(path, ignore_errors=True)


def read_records(folder: Path) -> np.ndarray:
    """RECORD [n] of the images that could be read."""
    return np.load(folder / "records.npy")


def link_images(store: Path, folder: Path) -> None:
    """One copy on the disk, which stays when the store is removed."""
    for name in KEPT:
        try:
            os.link(store / name, folder / name)
        except OSError:  # a file system without links
            shutil.copyfile(store / name, folder / name)


def _bytes_needed(listing: Listing, form: Format) -> int:
    rows, pixels = len(listing.rows), form.height * form.width
    masks = sum(bool(row.mask) for row in listing.rows)
    return rows * (pixels * form.channels + RECORD.itemsize + 300) + masks * pixels


def _refuse(listing: Listing, unreadable: list[str], wrong: list[str], data: DataConfig) -> None:
    allowed = data.most_unreadable
    problems = [*listing.problems, *wrong]
    if len(unreadable) <= allowed and not problems:
        return
    advice = ""
    if unreadable:
        advice = (
            f"\n{counted([problem.split(': ')[0] for problem in unreadable])}, cannot be read; data.most_unreadable "
            f"({allowed}) is how many of these may be left out."
        )
    raise_problems([*problems, *unreadable], listing.where, advice)


def _store(listing: Listing, folder: Path, form: Format, data: DataConfig, say: Say) -> dict[str, Any]:
    count = len(listing.rows)
    shape = (count, form.channels, form.height, form.width)
    _make_array(folder / "images.npy", shape)
    _make_array(folder / "masks.npy", (count if listing.has_masks else 0, *shape[2:]))
    records = np.zeros(count, dtype=RECORD)
    unreadable: dict[int, str] = {}
    wrong: list[str] = []

    def read(jobs: Iterator[tuple[Any, ...]], function: Callable[..., Found], total: int) -> None:
        with Progress(say, "images read", total) as progress:
            for found, failed, other in map_in_workers(function, jobs):
                records[found["slot"]] = found
                unreadable.update(failed)
                wrong.extend(other)
                progress.advance(len(found))

    if listing.generated:
        read(_generated_jobs(folder, form, data.synthetic, count), generate_batch, count)
    else:
        read(_jobs(listing, folder, form, np.arange(count)), read_batch, count)
        form, deep = _by_true_depth(records, form, say)
        if len(deep):
            read(_jobs(listing, folder, form, deep), read_batch, len(deep))
    problems = [f"{_name(listing, slot)}: {unreadable[slot]}" for slot in sorted(unreadable)]
    _refuse(listing, problems, wrong, data)
    kept = np.flatnonzero(records["readable"])
    masked = kept[records["masked"][kept]]
    _keep(folder / "images.npy", kept, shape)
    _keep(folder / "masks.npy", masked, (len(masked), *shape[2:]))
    np.save(folder / "checks.npy", records["check"][kept])
    np.save(folder / "records.npy", records[kept])
    return {"rows": len(kept), "unreadable": problems, "bits": form.bits}


def _name(listing: Listing, slot: int) -> str:
    row = listing.rows[slot]
    return row.file or row.id


def _by_true_depth(records: np.ndarray, form: Format, say: Say) -> tuple[Format, np.ndarray]:
    """The form with the bits that the 16-bit images use together, and which of them must be read again for it."""
    deep = np.flatnonzero(records["readable"] & (records["notes"] & images.DEEP > 0))
    if not len(deep):
        return form, deep
    used = int(records["largest"][deep].max()).bit_length()
    bits = next(depth for depth in _DEPTHS if depth >= used)
    say(f"data           {len(deep)} images are of 16 bits and use {bits} bits: 0 … {2**bits - 1} become 8 bits")
    return Format(form.height, form.width, form.channels, form.fit, bits), deep if bits < form.bits else deep[:0]


def _jobs(listing: Listing, folder: Path, form: Format, slots: np.ndarray) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(slots), _BATCH):
        chosen = slots[start : start + _BATCH].tolist()
        first = chosen[0]
        loaded = listing.payloads(first, chosen[-1] + 1)
        names = [_name(listing, slot) for slot in chosen]
        yield folder, form, chosen, [loaded[slot - first] for slot in chosen], names


def _generated_jobs(folder: Path, form: Format, config: SyntheticConfig, count: int) -> Iterator[tuple[Any, ...]]:
    for start in range(0, count, _BATCH):
        yield folder, form, config, start, min(start + _BATCH, count)


def read_batch(folder: Path, form: Format, slots: list[int], payloads: list[Payload], names: list[str]) -> Found:
    """Read images and their masks, and write them to their slots; runs in a worker."""
    records, unreadable, wrong = np.zeros(len(slots), dtype=RECORD), {}, []
    records["slot"] = slots
    with _Writer(folder, form) as writer:
        for record, slot, (source, outlined), name in zip(records, slots, payloads, names, strict=True):
            try:
                content = _content(source)
                decoded = images.decode_image(content, form)
            except UnreadableError as error:
                unreadable[slot] = str(error)
                continue
            record["file_hash"] = _hash(content)
            record["readable"] = True
            _describe(record, decoded)
            writer.write_image(record, images.fit_image(decoded.image, form))
            record["defect_px"] = record["smallest_px"] = -1
            if outlined is None:
                continue
            try:
                mask = _mask(outlined, decoded)
            except (UnreadableError, ValueError) as error:
                path = outlined if isinstance(outlined, str) and outlined[0] != "{" else name
                wrong.append(f"{path}: {error}" if path != name else f"{name}: {error}")
                continue
            writer.write_mask(record, images.fit_mask(mask, form), images.smallest_part_px(mask, form))
    return records, unreadable, wrong


def _content(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    if source is None:
        raise UnreadableError("is missing")
    try:
        with open(source, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None


def _describe(record: np.void, decoded: Decoded) -> None:
    record["notes"], record["largest"] = decoded.notes, decoded.largest
    record["height"], record["width"] = decoded.image.height, decoded.image.width


def _mask(outlined: Any, decoded: Decoded) -> np.ndarray:
    """bool, in the image's own size. UnreadableError or ValueError for one of another size."""
    height, width = decoded.image.height, decoded.image.width
    if isinstance(outlined, str) and outlined[0] == "{":
        return draw_outlines(json.loads(outlined), height, width)
    mask = images.decode_mask(_content(outlined))
    if mask.shape != (height, width):
        raise ValueError(f"is a mask of {mask.shape[1]}x{mask.shape[0]}, but its image is {width}x{height}")
    return mask


def generate_batch(folder: Path, form: Format, config: SyntheticConfig, start: int, stop: int) -> Found:
    """Generate images and write them to their slots; runs in a worker."""
    records = np.zeros(stop - start, dtype=RECORD)
    records["slot"] = np.arange(start, stop)
    with _Writer(folder, form) as writer:
        made = synthetic.generate(config, form.height, form.width, start, stop)
        for record, (image, mask, kind) in zip(records, made, strict=True):
            record["readable"], record["kind"] = True, kind
            record["height"], record["width"] = form.height, form.width
            pixels = np.repeat(image[None], form.channels, axis=0)
            writer.write_image(record, pixels)
            record["file_hash"] = record["pixel_hash"]
            record["defect_px"] = record["smallest_px"] = -1
            if kind:
                writer.write_mask(record, mask, images.smallest_part_px(mask > 0, form))
    return records, {}, []


class _Writer:
    """Writes into the arrays without mapping them: a full disk is then an error, not the end of the process."""

    def __init__(self, folder: Path, form: Format) -> None:
        self._files = [open(folder / name, "r+b") for name in ("images.npy", "masks.npy")]  # noqa: SIM115 - closed below
        self._starts = [_header_length(file) for file in self._files]
        self._pixels, self._channels = form.height * form.width, form.channels

    def write_image(self, record: np.void, pixels: np.ndarray) -> None:
        """uint8 [channels, height, width]"""
        content = pixels.tobytes()
        wide = pixels.reshape(self._channels, -1).astype(np.uint32)  # holds 255 * 255
        record["check"], record["pixel_hash"] = zlib.crc32(content), _hash(content)
        record["sums"][: self._channels] = wide.sum(axis=1, dtype=np.uint64)
        record["squares"][: self._channels] = (wide * wide).sum(axis=1, dtype=np.uint64)
        self._write(0, int(record["slot"]) * self._pixels * self._channels, content)

    def write_mask(self, record: np.void, mask: np.ndarray, smallest_px: int) -> None:
        """uint8 [height, width]"""
        record["masked"], record["defect_px"], record["smallest_px"] = True, int(mask.sum()), smallest_px
        self._write(1, int(record["slot"]) * self._pixels, mask.tobytes())

    def _write(self, index: int, place: int, content: bytes) -> None:
        written = 0
        while written < len(content):
            place_now = self._starts[index] + place + written
            written += os.pwrite(self._files[index].fileno(), content[written:], place_now)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._files:
            file.close()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _make_array(path: Path, shape: tuple[int, ...]) -> None:
    """An .npy file of zeros that takes no space until it is written to."""
    with open(path, "wb") as stream:
        _write_header(stream, shape)
        stream.truncate(stream.tell() + int(np.prod(shape)))


def _write_header(stream: Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _header_length(stream: Any) -> int:
    stream.seek(0)
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
    return stream.tell()


def _keep(path: Path, slots: np.ndarray, shape: tuple[int, ...]) -> None:
    """Move the given rows of an array together and cut off the rest, in place. slots: rising."""
    size = int(np.prod(shape[1:]))
    with open(path, "r+b") as stream:
        start = _header_length(stream)
        for place, slot in enumerate(slots.tolist()):
            if place != slot:
                stream.seek(start + slot * size)
                row = stream.read(size)
                stream.seek(start + place * size)
                stream.write(row)
        stream.truncate(start + len(slots) * size)
        stream.seek(0)
        _write_header(stream, (len(slots), *shape[1:]))  # as long as before: numpy leaves room for any count
        assert stream.tell() == start, "numpy wrote a longer header"
