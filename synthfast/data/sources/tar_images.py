"""Images in WebDataset tars from elsewhere: found in one pass over the tars' headers, read by their places afterwards.

The layout is that of https://github.com/webdataset/webdataset: the members of a sample follow each other and share the part of
their names before the first dot. Of each sample the image (png, jpg, webp or bmp) and the label are used: ``.cls``, a number as
text, or ``.json``, a number or an object with ``label`` or ``cls``.
"""

from __future__ import annotations

import array
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from synthfast.artifacts import os_error
from synthfast.data.formats.tar_members import Member, members
from synthfast.data.shards.manifest import MOST_CLASSES
from synthfast.data.sources.files import SUFFIXES, FileImages
from synthfast.errors import SynthfastError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MOST_IMAGE, _MOST_CLS, _MOST_JSON = 64 << 20, 256, 1 << 20  # bytes
_OPEN_TARS = 16


class TarImages(FileImages):
    """Samples of WebDataset tars, in the order of the tars' names and within each as they lie.

    20 bytes a sample are kept. Gzipped tars are read well in order only. See :class:`synthfast.data.sources.files.FileImages`
    for shape and ``image_size``.

    Raises:
        SynthfastError: not a tar; one that holds links, paths that lead out of it or absurd sizes; or samples without an image
            or, where others have one, without a label.
    """

    def __init__(self, path: str, name: str, *, image_size: int | None = None) -> None:
        self._tars = _find(path)
        self._found = _Found()
        self._sizes = [_scan(tar, k, self._found) for k, tar in enumerate(self._tars)]
        self._digest, self._found.digest = self._found.digest.hexdigest(), None
        self._handles: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._reading, self._process = threading.Lock(), os.getpid()
        labels = np.array(self._found.labels, np.int64) if self._found.labels else None
        super().__init__(name, Path(), range(len(self._found.offsets)), labels, image_size=image_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict(), "_reading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # in a process that opens the tars itself
        self.__dict__.update(state, _reading=threading.Lock(), _process=os.getpid())

    def _has_lossy_files(self) -> bool:
        return self._found.lossy

    def fingerprint(self) -> str:
        """SHA-256 of the members' headers (names, sizes, times) and of the labels: no image is read."""
        return hashlib.sha256(repr((len(self), self.shape, self.classes, self._digest)).encode()).hexdigest()

    def encoded(self, indices: np.ndarray) -> list[bytes]:
        """The members that hold the images at ``indices`` (integers [k] in [0, n)), as they are."""
        return [self._content(int(index))[1] for index in indices]

    def _open(self, item: int) -> tuple[str, IO[bytes]]:
        where, data = self._content(item)
        return where, io.BytesIO(data)

    def _content(self, item: int) -> tuple[str, bytes]:
        found = self._found
        number, offset, size = found.tars[item], found.offsets[item], found.sizes[item]
        where = f"{self._tars[number]}: the image at byte {offset}"
        with self._reading, _readable(self._tars[number]):
            file = self._handle(number)
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise SynthfastError(f"{where}: is cut short; the tar changed while it was read")
        return where, data

    def _title(self, item: int) -> str:
        return f"image {item}"

    def _handle(self, number: int) -> IO[bytes]:
        if self._process != os.getpid():  # a forked process would move its parent's place in the file
            self._handles, self._process = OrderedDict(), os.getpid()
        if number not in self._handles:
            if len(self._handles) >= _OPEN_TARS:
                self._handles.popitem(last=False)[1].close()
            if os.path.getsize(self._tars[number]) != self._sizes[number]:
                raise SynthfastError(f"{self._tars[number]}: changed while it was read; run the same command again")
            self._handles[number] = _open_tar(self._tars[number])
        self._handles.move_to_end(number)
        return self._handles[number]


@dataclass
class _Found:
    """What the tars hold: a row for each sample; while they are scanned, a hash over all headers and labels."""

    tars: array.array = field(default_factory=lambda: array.array("i"))
    offsets: array.array = field(default_factory=lambda: array.array("q"))
    sizes: array.array = field(default_factory=lambda: array.array("i"))
    labels: array.array = field(default_factory=lambda: array.array("i"))
    lossy: bool = False
    digest: Any = field(default_factory=hashlib.sha256)


@dataclass
class _Sample:
    """The members of one sample that are used."""

    key: str
    image: Member | None = None
    label: int | None = None
    has_cls: bool = False


def _find(path: str) -> list[Path]:
    """A tar, those of a folder, or those that a pattern fits, by name; ``{0000..0146}`` counts, as webdataset has it."""
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = [file for file in sorted(Path(path).iterdir()) if file.name.endswith(TAR_SUFFIXES) and file.is_file()]
    else:
        fitting = {pattern: sorted(filter(os.path.isfile, glob.glob(pattern))) for pattern in _expanded(path)}
        found = [Path(file) for files in fitting.values() for file in files]
        missing = [pattern for pattern, files in fitting.items() if not files]
        if found and missing:
            raise SynthfastError(f"{path}: {missing[0]} is not there, while others of the range are; check the path")
    if not found:
        raise SynthfastError(f"{path}: expected a tar file, a folder of them, or a pattern for them; check the path")
    return found


def _expanded(path: str) -> list[str]:
    """The patterns that a path with ranges of numbers stands for; one with more than a million is taken as it is."""
    ranges = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", path)
    if ranges is None:
        return [path]
    first, last = ranges[1], ranges[2]
    before, after = path[: ranges.start()], _expanded(path[ranges.end() :])
    if not 0 < (int(last) - int(first) + 1) * len(after) <= 1_000_000:
        return [path]
    return [f"{before}{number:0{len(first)}}{rest}" for number in range(int(first), int(last) + 1) for rest in after]


def _scan(tar: Path, number: int, found: _Found) -> int:
    """Note every sample of one tar; the tar's size."""
    with _readable(tar):
        size = os.path.getsize(tar)
        with _open_tar(tar) as file:
            known_size = None if isinstance(file, gzip.GzipFile) else size
            sample = None
            for member in members(file, str(tar), known_size):
                found.digest.update(member.header)
                key, _, extension = _parts(member.name)
                if not extension:
                    continue
                if sample is None or sample.key != key:
                    _note(sample, tar, number, found)
                    sample = _Sample(key)
                _add(sample, member, extension.lower(), file, tar, found)
            _note(sample, tar, number, found)
    return size


def _parts(name: str) -> tuple[str, str, str]:
    """Key, dot and extension; no extension for a hidden file or one without a dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, dot, extension) if stem and not stem.startswith("__") else (name, "", "")


def _add(sample: _Sample, member: Member, extension: str, file: IO[bytes], tar: Path, found: _Found) -> None:
    if f".{extension}" in SUFFIXES:
        if sample.image is not None:
            raise SynthfastError(f"{tar}: sample {sample.key!r:.90} has two images, expected one; remake the tar")
        _require_size(member, _MOST_IMAGE, tar)
        sample.image = member
        found.lossy |= extension not in ("png", "bmp")
    elif extension == "cls":
        sample.label, sample.has_cls = _number(_content(member, _MOST_CLS, file, tar, found), member, tar), True
    elif extension == "json" and not sample.has_cls:
        sample.label = _json_label(_content(member, _MOST_JSON, file, tar, found), member, tar)


def _note(sample: _Sample | None, tar: Path, number: int, found: _Found) -> None:
    if sample is None:
        return
    if sample.image is None:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise SynthfastError(f"{tar}: sample {sample.key!r:.90} has no image, expected one of {kinds}; remake the tar")
    if (sample.label is not None) != bool(found.labels) and found.offsets:
        has, others = ("a", "none") if sample.label is not None else ("no", "one")
        raise SynthfastError(
            f"{tar}: sample {sample.key!r:.90} has {has} label, those before it have {others}; remake the tar"
        )
    found.tars.append(number)
    found.offsets.append(sample.image.offset)
    found.sizes.append(sample.image.size)
    if sample.label is not None:
        found.labels.append(sample.label)


def _content(member: Member, most: int, file: IO[bytes], tar: Path, found: _Found) -> bytes:
    _require_size(member, most, tar)
    data = file.read(member.size)
    if len(data) != member.size:
        raise EOFError(f"{member.name!r:.90} is cut short")
    found.digest.update(data)
    return data


def _require_size(member: Member, most: int, tar: Path) -> None:
    if member.size > most:
        raise SynthfastError(
            f"{tar}: {member.name!r:.90} has {member.size} bytes, expected at most {most}; remake the tar"
        )


def _number(data: bytes, member: Member, tar: Path) -> int:
    if not re.fullmatch(rb"\s*[0-9]{1,7}\s*", data) or int(data) >= MOST_CLASSES:
        raise SynthfastError(
            f"{tar}: {member.name!r:.90} must hold a class from 0 to {MOST_CLASSES - 1}, found {data[:20]!r}; remake the tar"
        )
    return int(data)


def _json_label(data: bytes, member: Member, tar: Path) -> int | None:
    """The label; None if there is none under a known key."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SynthfastError(f"{tar}: {member.name!r:.90} is not valid JSON ({error}); remake the tar") from error
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
        if value is None:
            return None
    return _number(json.dumps(value).encode(), member, tar)


def _open_tar(tar: Path) -> IO[bytes]:
    file = open(tar, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        if file.read(2) != b"\x1f\x8b":
            file.seek(0)
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return gzip.open(tar)


@contextlib.contextmanager
def _readable(tar: Path) -> Iterator[None]:
    """What reading a damaged file can raise, in one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SynthfastError(f"{tar}: not a readable tar file ({error}); restore it") from error
    except OSError as error:
        raise os_error(tar, error) from error
