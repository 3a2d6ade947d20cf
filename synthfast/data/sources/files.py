"""Images that stay in their own files and are decoded when read."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from synthfast.artifacts import os_error, require_file
from synthfast.data.images import ImageSet
from synthfast.data.machine import in_slices
from synthfast.errors import SynthfastError, UsageError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
_TRACELESS = 2  # made smaller by this factor, images have no traces left of the blocks in which jpg codes them


class FileImages(ImageSet):
    """Image files under one folder, decoded by a pool of threads in each ``read``.

    The first file decides between grey (C = 1) and RGB (C = 3) and, without ``image_size``, the size; a later file that
    differs is an error that names it when it is read. With ``image_size`` S every image becomes S x S: the shorter side
    is resized to S (bicubic with antialiasing), then the centre is cut out.

    Args:
        files: paths relative to ``root``, in the order of the set.
        crop: cut this many pixels square out of the centre before resizing.
        source_size: (width, height) that every file must have.
        to_rgb: convert grey and other colour modes to RGB instead of refusing them.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        *,
        image_size: int | None = None,
        crop: int | None = None,
        source_size: tuple[int, int] | None = None,
        to_rgb: bool = False,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise UsageError(f"{name}: the image size must be at least 1, found {image_size}")
        self._root, self._files = root, files
        self._size, self._crop, self._source_size = image_size, crop, source_size
        self._to_rgb = to_rgb
        self._shrinks = False
        classes = None if class_names is None else len(class_names)
        shape = (1, 1, 1) if not files else self._decode(files[0], None).shape
        super().__init__(name, shape, len(files), labels, classes, class_names)
        self.lossy = not self._shrinks and self._has_lossy_files()

    def _read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), np.uint8)

        def decode(part: slice) -> None:
            for slot in range(part.start, part.stop):
                out[slot] = self._decode(self._files[indices[slot]], self.shape)

        in_slices(decode, len(indices))
        return out

    @property
    def as_stored(self) -> bool:
        """Whether a file of the set's size and kind (grey or RGB) holds the pixels that ``read`` gives."""
        return self._crop is None

    def encoded(self, indices: np.ndarray) -> list[bytes]:
        """The files of the images at ``indices`` (integers [k] in [0, n)), as they are."""
        found = []
        for index in indices:
            path, file = self._open(self._files[index])
            try:
                found.append(file.read_bytes() if isinstance(file, Path) else file.read())
            except OSError as error:
                raise os_error(path, error) from error
        return found

    def _has_lossy_files(self) -> bool:
        return any(file.lower().endswith(LOSSY_SUFFIXES) for file in self._files)

    def fingerprint(self) -> str:
        """SHA-256 of the files' relative names, sizes and modification times, and of the shape: nothing is decoded.

        A copy that does not keep modification times therefore has another fingerprint.
        """
        digest = hashlib.sha256(repr((len(self), self.shape, self.classes)).encode())
        for name in sorted(self._files):
            try:
                status = os.stat(self._root / name)
            except OSError as error:
                raise os_error(self._root / name, error) from error
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _open(self, name: str) -> tuple[str | Path, Path | BinaryIO]:
        """What errors call an image, and what it is decoded from; subclasses whose images lie elsewhere override both this and
        ``_title``."""
        path = self._root / name
        try:
            require_file(path)
        except OSError as error:
            raise os_error(path, error) from error
        except ValueError as error:  # a name that no file has, from somebody's list
            raise SynthfastError(f"{path}: not a readable image ({error}); replace or remove it") from error
        return path, path

    def _title(self, name: str) -> str:
        """A short name for the image that others are compared with."""
        return name

    def _decode(self, name: str, shape: tuple[int, int, int] | None) -> np.ndarray:
        """One file as uint8 [H, W, C]; an error naming it if it is broken or is not of ``shape``."""
        from PIL import Image

        path, file = self._open(name)
        try:
            with Image.open(file) as opened:
                if self._source_size is not None and opened.size != self._source_size:
                    raise SynthfastError(
                        f"{path}: expected {_size(self._source_size)} pixels, found {_size(opened.size)}"
                    )
                image = opened.convert("RGB") if self._to_rgb else _grey_or_rgb(opened, path)
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:  # of the system; Pillow's have no number
                raise os_error(path, error) from error
            reason = str(error).partition(" <_io")[0]  # without the address of a buffer
            raise SynthfastError(f"{path}: not a readable image ({reason}); replace or remove it") from error
        except Image.DecompressionBombError as error:
            raise SynthfastError(f"{path}: too large to be one image of a data set ({error}); remove it") from error
        if self._crop is not None:
            image = _centre(image, self._crop)
        if self._size is not None:
            if shape is None:  # the first file
                self._shrinks = min(image.size) >= _TRACELESS * self._size
            image = _resize(image, self._size)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if shape is not None and pixels.shape != shape:
            if pixels.shape[2] != shape[2]:
                kinds = {1: "grey", 3: "RGB"}
                raise SynthfastError(
                    f"{path}: expected {kinds[shape[2]]} as in {self._title(self._files[0])}, found {kinds[pixels.shape[2]]}; "
                    "convert or remove it"
                )
            raise SynthfastError(
                f"{path}: expected {_size(shape[1::-1])} pixels as in {self._title(self._files[0])}, found {_size(image.size)}; "
                "give an image size to resize to"
            )
        return pixels


def open_folder(folder: Path, name: str, *, image_size: int | None = None, to_rgb: bool = False) -> FileImages:
    """The images of ``folder``: with labels if they lie in subfolders (one per class, sorted names), else without.

    Files and folders whose names start with a dot, and files that are not png, jpg, jpeg, webp or bmp, are skipped.
    Deeper folders belong to the class that they lie in.
    """
    flat, classes = _list_folder(folder)
    if not any(classes.values()) and flat:
        return FileImages(name, folder, flat, image_size=image_size, to_rgb=to_rgb)
    if flat:
        raise SynthfastError(
            f"{folder}: holds both images ({flat[0]}) and class folders ({next(iter(classes))}); keep one kind"
        )
    if not any(classes.values()):
        raise SynthfastError(f"{folder}: holds no images ({', '.join(SUFFIXES)}); check the path")
    for class_name, files in classes.items():
        if not files:
            raise SynthfastError(f"{folder / class_name}: a class folder without images; fill or remove it")
    files = [file for members in classes.values() for file in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    return FileImages(name, folder, files, labels, tuple(classes), image_size=image_size, to_rgb=to_rgb)


def _list_folder(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Sorted images directly in ``folder``, and those below each of its subfolders, as relative paths."""
    if not folder.is_dir():
        raise SynthfastError(
            f"{folder}: expected a folder of images, found {'a file' if folder.exists() else 'nothing'}"
        )
    flat: list[str] = []
    classes: dict[str, list[str]] = {}

    def fail(error: OSError) -> None:
        raise os_error(error.filename, error) from error

    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(where).relative_to(folder)
        if relative == Path():
            classes = {name: [] for name in folders}
        images = [str(relative / file) for file in files if _is_image(file)]
        (classes[relative.parts[0]] if relative.parts else flat).extend(images)
    return sorted(flat), {name: sorted(members) for name, members in classes.items()}


def _is_image(file: str) -> bool:
    return not file.startswith(".") and file.lower().endswith(SUFFIXES)


def _grey_or_rgb(image: Image.Image, path: Path) -> Image.Image:
    """The image in mode L or RGB without loss of what is visible: real transparency and deep pixels are refused."""
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("L", "LA", "La", "1") else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise SynthfastError(f"{path}: has transparent pixels, expected grey or RGB; flatten it onto a background")
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        return image.convert("RGB")
    raise SynthfastError(f"{path}: expected 8 bits per channel, found mode {image.mode}; convert it")


def _centre(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    if image.size != (size, size):
        shorter = min(image.size)
        width, height = (round(side * size / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _centre(image, size)


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
