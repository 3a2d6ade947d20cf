"""npz files of ``image`` and ``label``, the layout of the published EDM sets, read and written from front to back.

Nothing is held whole but the labels, so that files larger than memory can be deflated, too, and every member's CRC-32 is
checked on the way. The format is a zip file (APPNOTE.TXT 6.3, with zip64 members) of npy files.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from synthfast.artifacts import Lock, commit_temporary, make_folder, open_temporary, os_error, temporary_path
from synthfast.data.formats.npy import NpyHeader, image_shape, npy_header, read_header
from synthfast.data.images import ImageSet
from synthfast.data.shards.manifest import require_same
from synthfast.data.transfer.copying import Copied, Report, chunks
from synthfast.errors import SynthfastError, UsageError

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of zip files: equal images leave equal bytes
_NOTE = b"synthfast "  # starts the comment of a file that was written here
_SKIP_BYTES = 1 << 20
_MOST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # bytes that one byte can stand for
_HINT = "once that is mended run the same command again"


class NpzStream(ImageSet):
    """The images of an npz file, stored or deflated, in bounded memory.

    Fast where they are read in ascending order; reading backwards starts again at the front.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_file():
            raise SynthfastError(f"{path}: no such npz file; check the path")
        self._path, self._lock = path, threading.Lock()
        self._at = 0  # the next image of the stream
        with _problems(path):
            self._archive = zipfile.ZipFile(path)
            members = {name: self._archive.NameToInfo.get(f"{name}.npy") for name in ("image", "label")}
            if members["image"] is None:
                found = ", ".join(self._archive.namelist()[:8]) or "none"
                raise SynthfastError(f"{path}: expected an array 'image', found {found:.200}; rename or add it")
            self._members = {name: member for name, member in members.items() if member is not None}
            self._stream, header = self._open("image")
            shape = image_shape(header.dtype, header.shape, path)
            labels = self._labels(header.shape[0]) if "label" in self._members else None
        super().__init__(name, shape, header.shape[0], labels)
        self._row = int(np.prod(shape))

    def _open(self, name: str) -> tuple[IO[bytes], NpyHeader]:
        """The member's stream at its data, and its header, which its size must fit."""
        member = self._members[name]
        where = f"{self._path} ({member.filename})"
        if member.compress_type not in _MOST:
            raise SynthfastError(f"{where}: expected a stored or deflated member; save it with np.savez again")
        packed = min(member.compress_size, os.path.getsize(self._path))
        if member.file_size > packed * _MOST[member.compress_type]:
            raise SynthfastError(f"{where}: {packed} bytes cannot hold {member.file_size}; restore or remake the file")
        stream = self._archive.open(member)
        header = read_header(stream, where)
        found = member.file_size - stream.tell()
        if found != header.data_bytes:
            raise SynthfastError(f"{where}: expected {header.data_bytes} bytes of data, found {found}; remake the file")
        if header.fortran_order and len(header.shape) > 1:
            raise SynthfastError(f"{where}: is in Fortran order, expected C order; save it again from C order")
        return stream, header

    def _labels(self, count: int) -> np.ndarray:
        stream, header = self._open("label")
        if header.dtype.kind not in "iu" or header.shape != (count,):
            raise SynthfastError(
                f"{self._path}: 'label' must be integers [{count}], one per image, found {header.dtype} "
                f"{list(header.shape)}; convert it"
            )
        with stream:
            parts = [np.zeros(0, np.int64)]
            for first in range(0, header.data_bytes, _SKIP_BYTES):
                data = _read_exactly(stream, min(_SKIP_BYTES, header.data_bytes - first))
                parts.append(np.frombuffer(data, header.dtype).astype(np.int64))
        return np.concatenate(parts)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), self._row), np.uint8)
        order = np.argsort(indices, kind="stable")
        with self._lock, _problems(self._path):
            for first, stop in _runs(indices[order]):
                rows = indices[order[first:stop]]
                out[order[first:stop]] = self._rows(int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
        return out.reshape(-1, *self.shape)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if start < self._at:
            self._stream.close()
            self._stream, _ = self._open("image")
            self._at = 0
        left = (start - self._at) * self._row
        while left:
            left -= len(_read_exactly(self._stream, min(left, _SKIP_BYTES)))
        data = _read_exactly(self._stream, (stop - start) * self._row)
        self._at = stop
        return np.frombuffer(data, np.uint8).reshape(stop - start, self._row)

    def fingerprint(self) -> str:
        """SHA-256 of the arrays' sizes and CRC-32 in the zip's directory: nothing is read. Reading checks the CRC-32."""
        facts = [(name, member.file_size, member.CRC) for name, member in self._members.items()]
        return hashlib.sha256(repr((len(self), self.shape, self.classes, facts)).encode()).hexdigest()


def write_npz(
    images: ImageSet, out: Path, record: Mapping[str, Any], options: Mapping[str, str], report: Report, compress: bool
) -> Copied:
    """Write ``image`` uint8 [n, H, W, C] and, where there are labels, ``label`` int64 [n], under a temporary name first.

    An interrupted run starts over. The zip file's comment is ``record``, by which a later run knows what is there.

    Raises:
        UsageError: ``out`` is another file, or holds other images; the difference is named.
        SynthfastError: another process is writing it, or the disk refuses.
    """
    make_folder(out.parent)
    with Lock(out):
        if out.exists():
            require_same(out, _note(out), json.loads(json.dumps(record)), lambda key: options.get(key, key))
            report(len(images), len(images))
            return Copied(str(out), len(images), 0)
        temporary = temporary_path(out)
        try:
            with open_temporary(out) as file:
                _write(file, images, record, report, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
                file.flush()
                os.fsync(file.fileno())
            commit_temporary(out)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise os_error(out, error, _HINT) from error
            raise
    return Copied(str(out), 0, len(images))


def _write(file: IO[bytes], images: ImageSet, record: Mapping[str, Any], report: Report, compression: int) -> None:
    report(0, len(images))
    with zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "image", compression) as member:
            member.write(npy_header("|u1", (len(images), *images.shape)))
            for rows in chunks(images):
                member.write(images.read(rows).data.cast("B"))
                report(int(rows[-1]) + 1, len(images))
        if images.labels is not None:
            with _member(archive, "label", compression) as member:
                member.write(npy_header("<i8", images.labels.shape))
                for first in range(0, len(images), _SKIP_BYTES):
                    member.write(images.labels[first : first + _SKIP_BYTES].astype("<i8").data.cast("B"))
        archive.comment = _NOTE + json.dumps(record).encode()


def _member(archive: zipfile.ZipFile, name: str, compression: int) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    info.compress_type, info.create_system, info.external_attr = compression, 3, 0o644 << 16
    return archive.open(info, "w", force_zip64=True)


def _note(path: Path) -> dict[str, Any]:
    """The record in a file that was written here; UsageError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
        if comment.startswith(_NOTE):
            return json.loads(comment[len(_NOTE) :])
    except (OSError, zipfile.BadZipFile, ValueError):
        pass  # the same line serves for all of them
    raise UsageError(f"{path}: is there already and no npz file of this command; remove it or choose another --out")


def _runs(ascending: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices of sorted numbers in which each is the one before it or the next."""
    breaks = np.flatnonzero(np.diff(ascending) > 1) + 1
    bounds = [0, *breaks.tolist(), len(ascending)]
    return ((a, b) for a, b in itertools.pairwise(bounds) if b > a)


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    """The next bytes of a member; zipfile compares its CRC-32 when the last of them is read."""
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes of data are missing")
    return data


@contextlib.contextmanager
def _problems(path: Path) -> Iterator[None]:
    """What reading a damaged zip file can raise, in one line."""
    try:
        yield
    except OSError as error:
        raise os_error(path, error) from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, MemoryError) as error:
        # RuntimeError: an encrypted member, or (its subclass NotImplementedError) an unknown compression.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SynthfastError(f"{path}: not a valid npz file ({reason}); restore or remake it") from error
