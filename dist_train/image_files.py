"""Image files below a folder, as training and prediction find them alike. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator

from dist_train.errors import DataError

_COMMON = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif")
IMAGE_SUFFIXES = frozenset((*_COMMON, ".pgm", ".ppm", ".pbm", ".pnm", ".jp2", ".tga"))


def images_below(root: str, without: str | None = None) -> tuple[list[str], list[str]]:
    """Paths below the folder, sorted: of images, and of other files that lie in its folders. without: a folder to pass
    over. Hidden files and folders are passed over, and links to folders followed, each folder once. DataError."""
    images, others = [], []
    for folder, names in _walk(root, without, set()):
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else below.replace(os.sep, "/") + "/"
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                images.append(prefix + name)
            elif prefix and name.lower() not in ("thumbs.db", "desktop.ini"):
                others.append(prefix + name)  # beside the classes lie licences and notes
    return sorted(images), sorted(others)


def _walk(folder: str, without: str | None, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """Folders, links to folders among them, each once, with their files."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen or folder == without:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from error
    yield folder, [name for name, is_folder in listed if not is_folder]
    for name, is_folder in sorted(listed):
        if is_folder:
            yield from _walk(os.path.join(folder, name), without, seen)
