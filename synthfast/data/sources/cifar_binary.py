"""CIFAR's binary version as a source of images, whatever number of images, files and classes (at most 256) it has."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from synthfast.artifacts import os_error
from synthfast.data.images import ArrayImages
from synthfast.data.machine import allow_open_files
from synthfast.errors import SynthfastError

CIFAR_SHAPE = (32, 32, 3)
CIFAR_NAMES = "batches.meta.txt"
_RECORD = 1 + int(np.prod(CIFAR_SHAPE))


def open_cifar_binary(path: Path, name: str) -> ArrayImages:
    """Records of a label's byte and 32x32x3 pixels, channel by channel, of a file or of a folder's ``data_batch_N.bin``.

    The files are memory-mapped. A folder's ``batches.meta.txt`` names the classes.
    """
    files = _files(path)
    allow_open_files(len(files))
    parts, labels = [], []
    for file in files:
        try:
            size = file.stat().st_size
            if size == 0 or size % _RECORD:
                raise SynthfastError(
                    f"{file}: expected a whole number of {_RECORD}-byte records, found {size} bytes; restore the file"
                )
            rows = np.memmap(file, np.uint8, "r").reshape(-1, _RECORD)
        except OSError as error:
            raise os_error(file, error) from error
        parts.append(rows[:, 1:])
        labels.append(np.asarray(rows[:, 0], np.int64))
    class_names = _class_names(path / CIFAR_NAMES) if path.is_dir() else None
    classes = None if class_names is None else len(class_names)
    return ArrayImages(name, parts, np.concatenate(labels), classes, class_names, planar=CIFAR_SHAPE)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    numbered = {}
    for file in path.glob("data_batch_*.bin"):
        if match := re.fullmatch(r"data_batch_(\d{1,9})\.bin", file.name):
            numbered[int(match[1])] = file
    numbers = sorted(numbered)
    if not numbers:
        raise SynthfastError(f"{path}: expected a .bin file or a folder of data_batch_1.bin and so on; check the path")
    if numbers != list(range(1, len(numbers) + 1)):
        lost = next(k for k, number in enumerate(numbers, 1) if k != number)
        raise SynthfastError(
            f"{path}: data_batch_{lost}.bin is missing, {numbered[numbers[-1]].name} is there; restore it"
        )
    return [numbered[number] for number in numbers]


def _class_names(path: Path) -> list[str] | None:
    try:
        lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    except OSError as error:
        raise os_error(path, error) from error
    return [line for line in lines if line.strip()] or None
