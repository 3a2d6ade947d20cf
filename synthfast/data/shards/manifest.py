"""``manifest.json`` of a shard folder: what was asked for, and what each shard file must be.

    {"format": 1,
     "complete": true,
     "request": {"n": 100000, "shape": [8, 8, 1], "classes": 10, "shard_size": 50000, ...},
     "shards": [{"index": 0, "first": 0, "count": 50000,
                 "images": {"file": "shard-000000.images.npy", "sha256": "...", "bytes": 3200128},
                 "labels": {"file": "shard-000000.labels.npy", "sha256": "...", "bytes": 400128}}, ...]}

``request`` is the sampler's: everything on which the content depends, as plain JSON values in a fixed order. Only
``n``, ``shape``, ``classes`` (null: no labels) and ``shard_size`` mean something here: which shard holds which images.

A folder of WebDataset tars is format 2. Its request has ``"format": "wds"``, ``"codec": "png"`` or ``"jpg"`` and for jpg
``"quality"``, and a shard has, instead of ``images``, a ``tar`` and its ``tar_index``: ``shard-000000.tar`` and
``shard-000000.idx``.

While the folder is being written ``complete`` is false, ``shards`` is empty, and each finished shard has its entry in
a file of its own, ``shard-000000.json``. Nothing in the manifest depends on the time, so equal requests leave equal
bytes. A manifest from elsewhere is not trusted: every key is checked, and file names must be the ones above.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from synthfast.artifacts import os_error
from synthfast.data.formats.codec import CODECS, DEFAULT_QUALITY, MOST_SIDE, Codec
from synthfast.data.formats.png import COLOUR_TYPES
from synthfast.data.storage.cache import fetch
from synthfast.data.storage.places import Folder, join, read_object, read_objects, sizes
from synthfast.errors import SynthfastError, UsageError

FORMATS = {"npy": 1, "wds": 2}  # of images, and the version of the manifest that knows them
MANIFEST = "manifest.json"
MOST_CLASSES = 1_000_000  # tables are made with a row per class: a hostile manifest must not choose their size
MOST_IMAGES = 10**15  # of a set of tars, whose members are named by number
_FILES = {"npy": {"images": ".images.npy"}, "wds": {"tar": ".tar", "tar_index": ".idx"}}
_LABELS = {"labels": ".labels.npy"}
_ABSENT = object()


class Span(NamedTuple):
    """One shard's place in the set: images ``first`` to ``first + count - 1``."""

    index: int
    first: int
    count: int

    @property
    def stem(self) -> str:
        return f"shard-{self.index:06d}"

    @property
    def sidecar_file(self) -> str:
        return f"{self.stem}.json"


@dataclass(frozen=True)
class Request:
    """The request of a manifest; ``values`` is the whole of it, the properties are what shards are cut by."""

    values: dict[str, Any]

    @property
    def n(self) -> int:
        return self.values["n"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.values["shape"])

    @property
    def classes(self) -> int | None:
        return self.values["classes"]

    @property
    def format(self) -> str:
        return self.values.get("format", "npy")

    @property
    def codec(self) -> Codec | None:
        """How the images of tars are stored; None for npy."""
        if self.format == "npy":
            return None
        return Codec(self.values["codec"], self.shape, self.values.get("quality", DEFAULT_QUALITY))

    @property
    def shard_count(self) -> int:
        return -(-self.n // self.values["shard_size"])

    def span(self, index: int) -> Span:
        size = self.values["shard_size"]
        return Span(index, index * size, min(size, self.n - index * size))

    def files(self, span: Span) -> dict[str, str]:
        """What the files of a shard are called, by what they hold, in the order in which they appear on the disk."""
        suffixes = _FILES[self.format] | ({} if self.classes is None else _LABELS)
        return {role: span.stem + suffix for role, suffix in suffixes.items()}

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Request:
        """Check the keys that matter here; ``where`` starts the one-line errors."""
        for key in ("n", "shard_size"):
            if _take(values, key, int, where) < 1:
                raise SynthfastError(f"{where}: '{key}' must be at least 1, found {values[key]}")
        shape = _take(values, "shape", list, where)
        if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
            raise SynthfastError(f"{where}: 'shape' must be three positive integers [H, W, C], found {_show(shape)}")
        if values.get("classes", _ABSENT) is not None and not 1 <= _take(values, "classes", int, where) <= MOST_CLASSES:
            raise SynthfastError(f"{where}: 'classes' must be null or 1 to {MOST_CLASSES}, found {values['classes']}")
        if "format" in values:
            _check_wds(values, where)
        return cls(dict(values))


@dataclass(frozen=True)
class ShardFile:
    file: str
    sha256: str
    bytes: int

    @classmethod
    def parse(cls, value: Mapping[str, Any], file: str, where: str) -> ShardFile:
        name, digest = _take(value, "file", str, where), _take(value, "sha256", str, where)
        if name != file:
            raise SynthfastError(f"{where}: the file must be called {file}, found {_show(name)}")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise SynthfastError(f"{where}: 'sha256' must be 64 hexadecimal digits, found {_show(digest)}")
        return cls(name, digest, _take(value, "bytes", int, where))

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "sha256": self.sha256, "bytes": self.bytes}


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: its place and its files."""

    span: Span
    parts: dict[str, ShardFile]  # by what they hold, as ``Request.files`` names them

    @property
    def labels(self) -> ShardFile | None:
        return self.parts.get("labels")

    @property
    def files(self) -> tuple[ShardFile, ...]:
        return tuple(self.parts.values())

    @classmethod
    def parse(cls, value: Any, request: Request, index: int, where: str) -> ShardEntry:
        if not isinstance(value, dict):
            raise SynthfastError(f"{where}: a shard must be an object, found {_show(value)}")
        span = request.span(index)
        for key, expected in span._asdict().items():
            if _take(value, key, int, where) != expected:
                raise SynthfastError(f"{where}: '{key}' must be {expected}, found {value[key]}")
        if request.classes is None and value.get("labels", _ABSENT) is not None:
            raise SynthfastError(f"{where}: 'labels' must be null in a set without classes")
        names = request.files(span)
        return cls(
            span,
            {
                role: ShardFile.parse(_take(value, role, dict, where), name, f"{where}.{role}")
                for role, name in names.items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        files = {role: file.to_json() for role, file in self.parts.items()}
        return {**self.span._asdict(), **files, "labels": files.get("labels")}


@dataclass(frozen=True)
class Manifest:
    """``shards`` has every shard of a complete set, and is empty while the set is being written."""

    request: Request
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        shards = [entry.to_json() for entry in self.shards]
        version = FORMATS[self.request.format]
        return {"format": version, "complete": self.complete, "request": self.request.values, "shards": shards}

    @classmethod
    def load(cls, folder: Folder) -> Manifest:
        """Read and check ``folder``'s manifest, not the shards themselves."""
        where = str(join(folder, MANIFEST))
        if isinstance(folder, Path) and os.path.isfile(folder):
            raise SynthfastError(
                f"{folder}: expected a shard folder, found a file; synthfast shards import makes one from npz files and tars"
            )
        value = read_object(folder, MANIFEST, "shard manifest")
        version = _take(value, "format", int, where)
        newest = max(FORMATS.values())
        if version > newest:
            raise SynthfastError(
                f"{where}: format {version} is newer than this synthfast reads ({newest}); upgrade synthfast"
            )
        if version < 1:
            raise SynthfastError(f"{where}: 'format' must be 1 or more, found {version}; restore or remake the folder")
        complete, shards = _take(value, "complete", bool, where), _take(value, "shards", list, where)
        request = Request.parse(_take(value, "request", dict, where), f"{where}: request")
        if version != FORMATS[request.format]:
            raise SynthfastError(
                f"{where}: 'format' must be {FORMATS[request.format]} for {request.format} shards, found {version}; "
                "restore or remake the folder"
            )
        expected = request.shard_count if complete else 0
        if len(shards) != expected:
            raise SynthfastError(
                f"{where}: 'shards' must have {expected} entries, found {len(shards)}; restore the file"
            )
        entries = (
            ShardEntry.parse(shard, request, index, f"{where}: shards[{index}]") for index, shard in enumerate(shards)
        )
        return cls(request, tuple(entries), complete)


def shard_path(folder: Folder, file: ShardFile) -> Path:
    """The path of a shard's file after checking that it is a plain file of the right size within ``folder``.

    From a URL it is fetched, unless a copy of it is here already; see ``synthfast.data.storage.cache``.
    """
    if isinstance(folder, str):
        return fetch(folder, file)
    path = folder / file.file
    try:
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
            raise SynthfastError(f"{path}: a link that leads out of the folder; put the file itself there")
        status = path.stat()
    except FileNotFoundError as error:
        raise SynthfastError(f"{path}: missing; run the command that made the folder again") from error
    except OSError as error:
        raise os_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise SynthfastError(f"{path}: expected a file, found something else; remove it")
    if status.st_size != file.bytes:
        raise SynthfastError(
            f"{path}: expected {file.bytes} bytes, found {status.st_size}; run the command that made the folder again"
        )
    return path


def finished_shards(folder: Folder, manifest: Manifest) -> dict[int, ShardEntry]:
    """The shards that are recorded as finished: all of a complete set, else those with a valid sidecar."""
    if manifest.complete:
        return {entry.span.index: entry for entry in manifest.shards}
    indices = {}
    for name in sorted(sizes(folder)):
        match = re.fullmatch(r"shard-(\d{6,})\.json", name)
        index = int(match[1]) if match else manifest.request.shard_count
        if index < manifest.request.shard_count and name == manifest.request.span(index).sidecar_file:
            indices[name] = index
    entries = {}
    for name, value in read_objects(folder, indices, "shard entry"):
        index = indices[name]
        with contextlib.suppress(SynthfastError):  # not a finished shard: the next run makes it again
            entries[index] = ShardEntry.parse(value, manifest.request, index, str(join(folder, name)))
    return entries


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first key, in the old order, at which two JSON values differ, with both values as text; None if none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            path = f"{key}.{name}" if key else name
            difference = first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), path)
            if difference:
                return difference
        return None
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return None
    was, now = ("nothing" if value is None else _show(value) for value in (old, new))
    return key, was, now


def require_same(folder: Folder, old: Any, new: Any, option: Callable[[str], str]) -> None:
    """UsageError that names the first difference between what ``folder`` was made for and what is asked of it now.

    ``option`` gives the name of a key path on the command line.
    """
    difference = first_difference(old, new)
    if difference is not None:
        key, was, now = difference
        raise UsageError(
            f"{' '.join(option(key).split())}: {folder} was made with {was}, this command says {now}; "
            "repeat the command that made it, or choose another --out"
        )


def _check_wds(values: Mapping[str, Any], where: str) -> None:
    """The keys of a request that are there for tars alone."""
    if values["format"] != "wds":
        raise SynthfastError(f"{where}: 'format' must be \"wds\", or absent for npy, found {_show(values['format'])}")
    codec = _take(values, "codec", str, where)
    if codec not in CODECS:
        raise SynthfastError(f"{where}: 'codec' must be one of {', '.join(CODECS)}, found {_show(codec)}")
    if codec == "png" and "quality" in values:
        raise SynthfastError(f"{where}: 'quality' is for jpg, found it beside png; leave it out")
    if codec == "jpg" and not 1 <= _take(values, "quality", int, where) <= 100:
        raise SynthfastError(f"{where}: 'quality' must be 1 to 100, found {values['quality']}")
    if values["shape"][2] not in COLOUR_TYPES or max(values["shape"]) > MOST_SIDE:
        raise SynthfastError(
            f"{where}: images in tars must have 1 or 3 channels and sides up to {MOST_SIDE}, found {_show(values['shape'])}"
        )
    if values["n"] > MOST_IMAGES:
        raise SynthfastError(f"{where}: 'n' must be at most {MOST_IMAGES}, found {values['n']}")


def _take(value: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in value:
        raise SynthfastError(f"{where}: key '{key}' is missing; restore or remake the folder")
    if type(value[key]) is not kind:  # not isinstance: true is no integer here
        names = {int: "an integer", str: "a string", bool: "true or false", list: "a list", dict: "an object"}
        raise SynthfastError(f"{where}: '{key}' must be {names[kind]}, found {_show(value[key])}")
    return value[key]


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
