"""Folders of images in layouts of others: png files, a subfolder a class, and CIFAR's binary version.

Beside the files lies ``export.json``: what was asked for, and how many images are written. It is there from the start, so that a
run goes on where the last one stopped, and no other command writes there.

    {"format": 1, "complete": false, "done": 8192, "request": {"n": 50000, "to": "folder", ...}}
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.artifacts import (
    TEMPORARY_PREFIX,
    Lock,
    atomic_write_bytes,
    atomic_write_json,
    make_folder,
    open_temporary,
    os_error,
    read_json,
)
from synthfast.data.formats.codec import Codec
from synthfast.data.images import ImageSet
from synthfast.data.shards.manifest import require_same
from synthfast.data.sources.cifar_binary import CIFAR_NAMES, CIFAR_SHAPE
from synthfast.data.transfer.copying import CHUNK_BYTES, Copied, Report
from synthfast.errors import SynthfastError, UsageError

RECORD = "export.json"
RECORD_FORMAT = 1
CIFAR_RECORDS = 10_000  # images in a file
_HINT = "once that is mended run the same command again: what is written is kept"

# Writes the images of a range of numbers; and whether all of their files are there.
Write = Callable[[range], None]
IsThere = Callable[[range], bool]


def write_folder(
    images: ImageSet, out: Path, record: Mapping[str, Any], options: Mapping[str, str], report: Report
) -> Copied:
    """Write ``images`` (grey or RGB) as png files named by their number, in a subfolder a class where there are labels.

    Subfolders sort in the order of the classes; those of classes without images are not made, because readers of such folders
    refuse empty ones. The result's warning then says so.
    """
    if images.shape[2] not in (1, 3):
        raise UsageError(f"--to folder: expected grey or RGB images, found {images.shape[2]} channels; take npz")
    names = None if images.classes is None else folder_names(images.classes, images.class_names)
    width = len(str(len(images) - 1))
    codec = Codec("png", images.shape)

    def path(number: int) -> Path:
        file = f"{number:0{width}d}.png"
        return out / file if names is None else out / names[images.labels[number]] / file

    def write(numbers: range) -> None:
        pixels = images.read(np.arange(numbers.start, numbers.stop))
        for number, file in zip(numbers, codec.encode(pixels), strict=True):
            _replace(path(number), file)
        _wait_for_disk(out)  # once for all of them: before the record says that they are written

    def is_there(numbers: range) -> bool:
        return all(_size(path(number)) for number in numbers)

    def prepare() -> None:
        for k in () if names is None else np.unique(images.labels):
            make_folder(out / names[k])
            if (out / names[k]).is_symlink():
                raise SynthfastError(f"{out / names[k]}: a link that leads out of the folder; remove it")

    size = max(1, min(4096, CHUNK_BYTES // int(np.prod(images.shape))))
    copied = _fill(images, out, record, options, report, size, (write, is_there, prepare))
    return replace(copied, warning=_without_images(images))


def write_cifar(
    images: ImageSet, out: Path, record: Mapping[str, Any], options: Mapping[str, str], report: Report
) -> Copied:
    """Write ``data_batch_1.bin`` and so on: 10,000 records each of a label's byte and the pixels, channel by channel.

    The layout is that of https://www.cs.toronto.edu/~kriz/cifar.html; ``batches.meta.txt`` has the names of the classes.
    """
    if images.shape != CIFAR_SHAPE:
        raise UsageError(f"--to cifar: expected images 32x32x3, found {'x'.join(map(str, images.shape))}; take npz")
    if images.labels is None:
        raise UsageError("--to cifar: expected images with labels, found none; take npz")
    if images.classes > 256:
        raise UsageError(f"--to cifar: a label is a byte, expected at most 256 classes, found {images.classes}")

    def path(numbers: range) -> Path:
        return out / f"data_batch_{numbers.start // CIFAR_RECORDS + 1}.bin"

    def write(numbers: range) -> None:
        rows = np.arange(numbers.start, numbers.stop)
        planes = images.read(rows).transpose(0, 3, 1, 2).reshape(len(rows), -1)
        records = np.concatenate([images.labels[rows, None].astype(np.uint8), planes], 1)
        atomic_write_bytes(path(numbers), records.tobytes())

    def is_there(numbers: range) -> bool:
        return _size(path(numbers)) == len(numbers) * (1 + int(np.prod(CIFAR_SHAPE)))

    def prepare() -> None:
        names = [" ".join(name.split()) for name in images.class_names or ()]
        if names and all(names):
            atomic_write_bytes(out / CIFAR_NAMES, "".join(f"{name}\n" for name in names).encode())

    return _fill(images, out, record, options, report, CIFAR_RECORDS, (write, is_there, prepare))


def folder_names(classes: int, class_names: Sequence[str] | None) -> list[str]:
    """A folder's name for each class; sorted, they are in the order of the classes.

    The classes' own names where they are in that order and fit as file names; else numbers, the names behind them if they fit.
    """
    width = len(str(classes - 1))
    numbers = [f"{k:0{width}d}" for k in range(classes)]
    if class_names is None:
        return numbers
    names = [re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:100] for name in class_names]
    plain = all(name and name[0] != "." for name in names) and names == list(class_names)
    if plain and names == sorted(names) and len(set(names)) == classes:
        return names
    return [f"{number}-{name}" for number, name in zip(numbers, names, strict=True)]


def _without_images(images: ImageSet) -> str | None:
    """A warning if readers of the folders, who number the classes that they find, will find fewer of them."""
    if images.labels is None:
        return None
    empty = np.flatnonzero(np.bincount(images.labels, minlength=images.classes) == 0).tolist()
    if not empty:
        return None
    some = ", ".join(map(str, empty[:5])) + (" and so on" if len(empty) > 5 else "")
    return (
        f"{len(empty)} of {images.classes} classes without an image have no folder ({some}), so that readers of the folders "
        "number the classes anew; --to npz keeps the labels"
    )


def _fill(
    images: ImageSet,
    out: Path,
    record: Mapping[str, Any],
    options: Mapping[str, str],
    report: Report,
    size: int,
    steps: tuple[Write, IsThere, Callable[[], None]],
) -> Copied:
    """Write the images ``size`` at a time, but those whose files an earlier run of the same ``record`` left."""
    write, is_there, prepare = steps
    make_folder(out)
    with Lock(out):
        done, complete = _open_record(out, record, options)
        total, kept, made = len(images), 0, 0
        blocks = [range(first, min(first + size, total)) for first in range(0, total, size)]
        pending = [block for block in blocks if block.stop > done or not is_there(block)]
        kept = total - sum(map(len, pending))
        report(kept, total)
        try:
            if pending or not complete:
                prepare()
            for block in pending:
                write(block)
                made += len(block)
                if block.stop > done:
                    _write_record(out, record, block.stop, complete=False)
                report(kept + made, total)
        except OSError as error:
            raise os_error(error.filename or out, error, _HINT) from error
        if not complete:
            _write_record(out, record, total, complete=True)
    return Copied(str(out), kept, made)


def _open_record(out: Path, record: Mapping[str, Any], options: Mapping[str, str]) -> tuple[int, bool]:
    """The images that are written, and whether that is all; makes the record of a new folder."""
    path = out / RECORD
    if not path.exists():
        strangers = sorted(set(os.listdir(out)) - {TEMPORARY_PREFIX + RECORD})
        if strangers:
            raise UsageError(
                f"{out}: holds files ({strangers[0]}) but no {RECORD}, so it is no folder of this command; "
                "choose a new or empty folder"
            )
        _write_record(out, record, 0, complete=False)
        return 0, False
    found = read_json(path, "export's record")
    version, done = found.get("format"), found.get("done")
    if type(version) is not int or version < 1 or type(done) is not int or not isinstance(found.get("request"), dict):
        raise SynthfastError(f"{path}: not the record of an export; remove the folder and export again")
    if version > RECORD_FORMAT:
        raise SynthfastError(
            f"{path}: format {version} is newer than this synthfast reads ({RECORD_FORMAT}); upgrade synthfast"
        )
    require_same(out, found["request"], json.loads(json.dumps(record)), lambda key: options.get(key, key))
    return done, found.get("complete") is True


def _write_record(out: Path, record: Mapping[str, Any], done: int, *, complete: bool) -> None:
    value = {"format": RECORD_FORMAT, "complete": complete, "done": done, "request": dict(record)}
    atomic_write_json(out / RECORD, value)


def _replace(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename, without waiting for the disk."""
    with open_temporary(path) as file:
        file.write(data)
    os.replace(file.name, path)


def _wait_for_disk(folder: Path) -> None:
    """Until all that was written to the file system of ``folder`` is on the disk; Linux alone can do so for just this one."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
