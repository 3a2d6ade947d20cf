"""Reading and writing npy and npz files without trusting them: no pickle, sizes checked, large arrays memory-mapped.

The npy format is described in NEP 1 (https://numpy.org/neps/nep-0001-npy-format.html): a magic string, a version, the
header length, a Python literal with dtype, order and shape, then the raw data.
"""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from synthfast.artifacts import os_error, require_file
from synthfast.errors import SynthfastError

# What numpy's header parser can raise on hostile bytes, beyond the ValueError it promises.
_HEADER_ERRORS = (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError, OverflowError)


class NpyHeader(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a version 1.0 npy file in C order, ``dtype`` such as "|u1" or "<i8".

    Written here rather than by numpy, whose padding differs between its versions: shards must be equal everywhere.
    """
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode("ascii")
    start = b"\x93NUMPY\x01\x00"
    padding = -(len(start) + 2 + len(text) + 1) % 64
    text += b" " * padding + b"\n"
    return start + struct.pack("<H", len(text)) + text


def read_header(file: BinaryIO, name: str) -> NpyHeader:
    """Parse the npy header at the file's position and leave the position at the data. Python objects are refused."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise SynthfastError(f"{name}: npy version {version} is not supported, expected 1.0 or 2.0; save it again")
    except _HEADER_ERRORS as error:
        raise SynthfastError(f"{name}: not a valid npy file ({_first_line(error)}); restore or remake it") from error
    if dtype.hasobject or any(size < 0 for size in shape):
        raise SynthfastError(f"{name}: expected an array of plain numbers, found {dtype} {list(shape)}")
    return NpyHeader(dtype, shape, fortran_order)


def map_npy(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an npy file read-only after checking that it is exactly an array of ``dtype`` and ``shape``."""
    try:
        require_file(path)
        with open(path, "rb") as file:
            header = read_header(file, str(path))
            wanted = (np.dtype(dtype), tuple(shape), False)
            if header != wanted:
                found = f"{header.dtype} {list(header.shape)}{' in Fortran order' if header.fortran_order else ''}"
                raise SynthfastError(f"{path}: expected {wanted[0]} {list(shape)}, found {found}; restore or remake it")
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
            if size != offset + header.data_bytes:
                raise SynthfastError(
                    f"{path}: expected {offset + header.data_bytes} bytes, found {size}; restore or remake it"
                )
            return np.asarray(np.memmap(file, dtype, "r", offset, shape))  # the file that was checked, opened once
    except OSError as error:
        raise os_error(path, error) from error


def image_shape(dtype: np.dtype, shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """(H, W, C) of an array of images in a file: uint8 [n, H, W] or [n, H, W, C] with C 1 or 3; SynthfastError for others."""
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
        found = f"{dtype} {list(shape)}"
        raise SynthfastError(f"{path}: 'image' must be uint8 [n, H, W] or [n, H, W, C], found {found}; convert it")
    _, height, width, channels = shape if len(shape) == 4 else (*shape, 1)
    if channels not in (1, 3):
        found = [shape[0], height, width, channels]
        raise SynthfastError(f"{path}: 'image' must be [n, H, W, C] with C 1 or 3, found {found}; convert it")
    return height, width, channels


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an npz file.

    Members that are stored (``np.savez``) are memory-mapped, so a file larger than memory can be read; their zip
    checksums are then not checked. Deflated members (``np.savez_compressed``) are read into memory.
    """
    try:
        require_file(path)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            present = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            for name in required:
                if name not in present:
                    found = ", ".join(sorted(present)) or "none"
                    raise SynthfastError(f"{path}: expected an array '{name}', found {found}; rename or add it")
            wanted = [*required, *(name for name in optional if name in present)]
            return {name: _read_member(path, file, archive, archive.getinfo(f"{name}.npy")) for name in wanted}
    except OSError as error:
        raise os_error(path, error) from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: an encrypted member, or (its subclass NotImplementedError) an unknown compression.
        raise SynthfastError(f"{path}: not a valid npz file ({_first_line(error)}); restore or remake it") from error


def _read_member(path: Path, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = f"{path} ({member.filename})"
    with archive.open(member) as stream:  # also checks the member's local header
        header = read_header(stream, name)
        header_bytes = stream.tell()
        if member.file_size - header_bytes != header.data_bytes:
            found = member.file_size - header_bytes
            raise SynthfastError(f"{name}: expected {header.data_bytes} bytes of data, found {found}; remake the file")
        order = "F" if header.fortran_order else "C"
        if member.compress_type != zipfile.ZIP_STORED or header.data_bytes == 0:
            return np.ndarray(header.shape, header.dtype, stream.read(), order=order)
    # A zip member's data follows its local header: 30 fixed bytes, then a name and an extra field of stated lengths.
    file.seek(member.header_offset + 26)
    start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header_bytes
    return np.asarray(np.memmap(path, header.dtype, "r", start, header.shape, order))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
