"""Readers of the published data sets, each in the layout in which it is distributed.

torchvision downloads, and reads CIFAR's Python version, whose pickles it checks against known hashes first; it is
imported only then. Everything else is read here: plain bytes, text, npz and image files.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from synthfast.artifacts import os_error, require_file
from synthfast.assets import DIGITS
from synthfast.data.formats.npy import read_npz
from synthfast.data.images import ArrayImages, ImageSet
from synthfast.data.sources.files import FileImages, open_folder
from synthfast.errors import SynthfastError

DIGIT_NAMES = tuple("0123456789")

# Centre crop of the aligned faces before resizing, as in Song et al., "Score-Based Generative Modeling through
# Stochastic Differential Equations" (ICLR 2021), whose CelebA 64x64 results others compare with.
CELEBA_CROP = 140
CELEBA_SIZE = (178, 218)
PARTITION = "list_eval_partition.txt"
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Wanted:
    """Which part of a published set to open, and from where. ``image_size`` concerns the sets that are resized."""

    data_dir: Path
    split: str
    download: bool
    image_size: int


def open_digits(wanted: Wanted) -> ImageSet:
    """The embedded digits: 500 training or 1,297 test images 8x8x1; see assets/README.md."""
    arrays = read_npz(DIGITS, ("image", "label", wanted.split))
    rows = arrays[wanted.split]
    name = f"digits:{wanted.split}"
    return ArrayImages(name, [arrays["image"][rows, :, :, None]], arrays["label"][rows], 10, DIGIT_NAMES)


def open_mnist(wanted: Wanted) -> ImageSet:
    """MNIST from its idx files, gzipped or not, in ``data_dir`` or, as torchvision stores them, ``MNIST/raw`` in it."""
    data_dir = wanted.data_dir
    stem = {"train": "train", "test": "t10k"}[wanted.split]
    folders = [data_dir / "MNIST" / "raw", data_dir]
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]

    def find() -> list[Path] | None:
        for folder in folders:
            paths = [_first_file(folder / name, folder / f"{name}.gz") for name in names]
            if all(paths):
                return paths
        return None

    paths = find()
    if paths is None and wanted.download:
        with _downloading("mnist", data_dir) as datasets:
            datasets.MNIST(str(data_dir), train=True, download=True)
        paths = find()
    if paths is None:
        raise _missing("mnist", f"{names[0]}[.gz]", folders)
    images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    _require_part("mnist", wanted.split, len(images), {"train": 60_000, "test": 10_000})
    return ArrayImages(f"mnist:{wanted.split}", [images[..., None]], labels, 10, DIGIT_NAMES)


def open_cifar(wanted: Wanted, *, classes: int) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (fine labels): the binary version where it is unpacked, else torchvision's Python version.

    The record layouts are those of https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    data_dir, split = wanted.data_dir, wanted.split
    name = f"cifar{classes}"
    folder = data_dir / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    if folder.is_dir():
        return _open_cifar_binary(name, folder, classes, split)
    python_folder = data_dir / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    if not python_folder.is_dir() and not wanted.download:
        raise _missing(name, f"{python_folder.name} or {folder.name}", [data_dir])
    with _downloading(name, data_dir) as datasets:
        kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
        if not wanted.download:
            _require_known(
                python_folder, [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
            )
        data = kind(str(data_dir), train=split == "train", download=wanted.download)
    return ArrayImages(
        f"{name}:{split}", [np.ascontiguousarray(data.data)], np.asarray(data.targets), classes, data.classes
    )


def _open_cifar_binary(name: str, folder: Path, classes: int, split: str) -> ImageSet:
    if classes == 10:
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        label_bytes, names_file = 1, "batches.meta.txt"
    else:
        files, label_bytes, names_file = [f"{split}.bin"], 2, "fine_label_names.txt"  # coarse label, fine label
    record = label_bytes + 3 * 32 * 32
    parts, labels = [], []
    for file in files:
        data = _read_bytes(folder / file)
        if len(data) % record or not data:
            raise SynthfastError(
                f"{folder / file}: expected a whole number of {record}-byte records, found {len(data)} bytes; "
                "unpack it again"
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        parts.append(rows[:, label_bytes:])
        labels.append(rows[:, label_bytes - 1])
    class_names = None
    if (folder / names_file).is_file():
        class_names = _read_bytes(folder / names_file).decode("utf-8", "replace").split()
        if len(class_names) != classes:
            raise SynthfastError(
                f"{folder / names_file}: expected the names of {classes} classes, found {len(class_names)}; unpack it again"
            )
    all_labels = np.concatenate(labels).astype(np.int64)
    _require_part(name, split, len(all_labels), {"train": 50_000, "test": 10_000})
    return ArrayImages(f"{name}:{split}", parts, all_labels, classes, class_names, planar=(32, 32, 3))


def open_celeba(wanted: Wanted) -> ImageSet:
    """CelebA's aligned faces (178x218 jpg), the central 140x140 resized; no labels, attributes are not read."""
    folders = [wanted.data_dir / "celeba", wanted.data_dir]

    def find() -> Path | None:
        return next((f for f in folders if (f / "img_align_celeba").is_dir() and (f / PARTITION).is_file()), None)

    folder = find()
    if folder is None and wanted.download:
        with _downloading("celeba", wanted.data_dir) as datasets:
            datasets.CelebA(str(wanted.data_dir), split="all", download=True)
        folder = find()
    if folder is None:
        raise _missing("celeba", f"img_align_celeba/ and {PARTITION}", folders)
    number = {"train": "0", "valid": "1", "test": "2"}[wanted.split]
    files = []
    for line in _read_bytes(folder / PARTITION).decode("utf-8", "replace").splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2") or Path(words[0]).name != words[0]:
            raise SynthfastError(f"{folder / PARTITION}: expected lines like '000001.jpg 0', found '{line[:60]}'")
        if words[1] == number:
            files.append(words[0])
    return FileImages(
        f"celeba:{wanted.split}",
        folder / "img_align_celeba",
        files,
        image_size=wanted.image_size,
        crop=CELEBA_CROP,
        source_size=CELEBA_SIZE,
    )


def open_imagenet(wanted: Wanted) -> ImageSet:
    """ImageNet (ILSVRC 2012): the downsampled npz batches of Chrabaszcz et al. where present, else folders of JPEG.

    The npz batches (arXiv:1707.08819) count classes 1 to 1000 in an order of their own, which becomes 0 to 999; folders
    ``train/<wnid>`` and ``val/<wnid>`` count in the order of the sorted names. The test split is the validation part.
    """
    data_dir, image_size, name = wanted.data_dir, wanted.image_size, f"imagenet:{wanted.split}"
    part = "train" if wanted.split == "train" else "val"
    places = [data_dir, data_dir / "imagenet", data_dir / f"Imagenet{image_size}_{part}_npz"]
    files = [f"train_data_batch_{i}.npz" for i in range(1, 11)] if part == "train" else ["val_data.npz"]
    for folder in places:
        if (folder / files[0]).is_file():
            return _open_downsampled(name, [folder / file for file in files], image_size)
    for folder in (data_dir / "imagenet" / part, data_dir / part):
        if folder.is_dir():
            return open_folder(folder, name, image_size=image_size, to_rgb=True)
    where = " and ".join(str(place) for place in places[:2])
    raise SynthfastError(
        f"imagenet: found neither {part}/<wnid>/*.JPEG nor {files[0]} in {where}; "
        "it has no free download: get it from image-net.org and pass its folder as --data-dir"
    )


def _open_downsampled(name: str, files: Sequence[Path], size: int) -> ImageSet:
    parts, labels = [], []
    for file in files:
        arrays = read_npz(file, ("data", "labels"))
        data, label = arrays["data"], arrays["labels"]
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * size * size:
            found = f"{data.dtype} {list(data.shape)}"
            raise SynthfastError(
                f"{file}: expected uint8 [n, {3 * size * size}] for image size {size}, found {found}; "
                "pass the files' image size or other files"
            )
        if label.shape != (len(data),) or label.dtype.kind not in "iu":
            raise SynthfastError(
                f"{file}: expected integer labels [{len(data)}], found {label.dtype} {list(label.shape)}"
            )
        parts.append(data)
        labels.append(label.astype(np.int64) - 1)
    return ArrayImages(name, parts, np.concatenate(labels), 1000, planar=(size, size, 3))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A uint8 array in the idx format: bytes 0, 0, 8 (the type), number of dimensions; big-endian sizes; data."""
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = _read_up_to(file, start)
            if len(header) < start or header[:4] != bytes((0, 0, 8, dimensions)):
                raise SynthfastError(
                    f"{path}: not an idx file of bytes with {dimensions} dimensions; download it again"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = int(np.prod(shape, dtype=object))
            data = _read_up_to(file, size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SynthfastError(f"{path}: not a valid gzip file ({error}); download it again") from error
    except OSError as error:
        raise os_error(path, error) from error
    if len(data) != size:
        found = "more" if len(data) > size else len(data)
        raise SynthfastError(f"{path}: expected {size} bytes of data, found {found}; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(file: BinaryIO, size: int) -> bytearray:
    """The next ``size`` bytes, or those that are left: memory is taken as they come, whatever a header says."""
    data = bytearray()
    while len(data) < size and (chunk := file.read(min(_CHUNK, size - len(data)))):
        data += chunk
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        require_file(path)
        return path.read_bytes()
    except OSError as error:
        raise os_error(path, error) from error


def _require_part(name: str, split: str, count: int, published: Mapping[str, int]) -> None:
    """SynthfastError if a split has as many images as another has; a part of it may have any other number."""
    for other, number in published.items():
        if other != split and count == number:
            raise SynthfastError(
                f"{name}:{split}: expected {published[split]:,} images, found {count:,}, as many as {other} has; the files "
                "seem to be swapped"
            )


def _require_known(folder: Path, files: Sequence[Sequence[str]]) -> None:
    """SynthfastError that names the first of the pickles (name, MD5) that is not the published one: it is not opened."""
    for name, expected in files:
        path = folder / name
        found = hashlib.md5(_read_bytes(path), usedforsecurity=False).hexdigest()
        if found != expected:
            raise SynthfastError(
                f"{path}: expected the published file with MD5 {expected}, found {found}; it is a pickle and is not opened, "
                "download it again or unpack the binary version"
            )


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _missing(name: str, what: str, places: Sequence[Path]) -> SynthfastError:
    where = " and ".join(str(place) for place in places)
    return SynthfastError(
        f"{name}: found no {what} in {where}; pass --download to fetch it or --data-dir DIR where it is"
    )


@contextlib.contextmanager
def _downloading(name: str, data_dir: Path) -> Iterator[ModuleType]:
    """torchvision.datasets, its messages sent to standard error and its failures turned into one line."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise SynthfastError(
            f"{name}: needs torchvision to download or read it, which cannot be imported ({_line(error)}); "
            "install torchvision, or unpack the data set's own files into --data-dir"
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield datasets
    except _download_errors() as error:
        raise SynthfastError(
            f"{name}: could not be downloaded or read in {data_dir} ({_line(error)}); "
            "check the connection, remove damaged files and try --download again"
        ) from error


def _download_errors() -> tuple[type[BaseException], ...]:
    errors: tuple[type[BaseException], ...] = (RuntimeError, OSError, ImportError, http.client.HTTPException)
    # CelebA comes through gdown, whose error for an exhausted Google Drive quota derives from Exception alone.
    gdown = sys.modules.get("gdown.exceptions")
    return errors if gdown is None else (*errors, gdown.FileURLRetrievalError)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
