"""Reading a complete shard folder, and looking into one: ``ShardSet``, ``verify`` and ``summary``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.artifacts import sha256_file
from synthfast.data.formats.npy import map_npy
from synthfast.data.images import ArrayImages, ImageSet, checked_labels
from synthfast.data.machine import allow_open_files
from synthfast.data.shards.arrays import FetchedArrays, map_images
from synthfast.data.shards.manifest import Manifest, Request, ShardEntry, finished_shards, shard_path
from synthfast.data.shards.tars import TarShard, TarShards
from synthfast.data.storage.cache import copy
from synthfast.data.storage.places import Folder, Missing, join, place, sizes
from synthfast.errors import SynthfastError


class ShardSet(ImageSet):
    """The images of a complete shard folder of either format under one index over all shards.

    Opening checks the manifest, every file's size and the headers of arrays; the index of a tar is checked whole when
    the tar is first read. ``verify`` also reads and hashes the contents.

    At a URL, labels are fetched when it is opened, other files when they are first read; see ``synthfast.data.storage.cache``.

    Attributes:
        path: the folder; the text of a URL.
        manifest: what it says of itself.
        format: "npy" or "wds".
        arrays: of npy, the memory-mapped images of each shard, uint8 [n_i, H, W, C]; empty for wds. At a URL, a sequence that
            fetches a shard when it is asked for it.
        codec: of wds, "png" or "jpg"; None for npy.

    Raises:
        SynthfastError: the folder is incomplete, damaged, or not one that this version reads.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = place(path)
        self.manifest = Manifest.load(self.path)
        request, shards = self.manifest.request, self.manifest.shards
        if not self.manifest.complete:
            raise SynthfastError(_incomplete(self.path, self.manifest))
        allow_open_files(len(shards))
        self.format, codec = request.format, request.codec
        self.codec = None if codec is None else codec.name
        self.lossy = self.codec == "jpg" or request.values.get("lossy") is True
        labels = None if request.classes is None else _all_labels(self.path, request, shards)
        self.arrays: Sequence[np.ndarray] = []
        self._images: ArrayImages | FetchedArrays | TarShards
        if codec is None and isinstance(self.path, str):
            self._images = self.arrays = FetchedArrays(self.path, request, shards)
        elif codec is None:
            self.arrays = [map_images(self.path, request, entry) for entry in shards]
            self._images = ArrayImages(str(path), self.arrays)
        else:
            tars = _open_tars(self.path, request, shards, labels)
            self._images = TarShards(tars, [entry.span.count for entry in shards], codec)
        super().__init__(str(path), request.shape, request.n, labels, request.classes)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self._images.read(indices)

    def encoded(self, indices: np.ndarray) -> list[bytes]:
        """Of wds, the images at ``indices`` (integers [k] in [0, n)) as they are stored, as png or jpg files."""
        indices = self._checked(indices)
        return [bytes(file) for file in self._tars.encoded(indices)]

    @property
    def tar_paths(self) -> list[Path]:
        """Of wds, the tars in order."""
        return [shard.tar for shard in self._tars.shards]

    @property
    def index_paths(self) -> list[Path]:
        """Of wds, DALI's index of each tar. All are checked first: nothing that they say leads out of its tar."""
        self._tars.check_indexes()
        return [shard.index for shard in self._tars.shards]

    @property
    def _tars(self) -> TarShards:
        if not isinstance(self._images, TarShards):
            raise TypeError(f"{self.name}: holds npy arrays, not tars")
        return self._images

    def __reduce__(self) -> tuple[type, tuple[Folder]]:
        return type(self), (self.path,)  # a process that gets it opens the files itself

    def fingerprint(self) -> str:
        """SHA-256 over the shards' SHA-256 in the manifest: no image is read. It depends on the shard size too."""
        digests = [(len(self), self.shape, self.classes)]
        digests += [(entry.span.count, *(file.sha256 for file in entry.files)) for entry in self.manifest.shards]
        return hashlib.sha256(repr(digests).encode()).hexdigest()


def verify(path: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read a shard folder whole and list what is wrong with it, each in one line that starts with the file's name.

    Finds files that are missing, cut short, changed by so much as a bit, swapped with another, or that no manifest
    knows; headers that are not what the manifest says; labels outside the classes; tars whose members are not where and
    what index and labels say; and shards not made yet. A lost or
    damaged shard is made again by deleting it and repeating the command that made the folder. ``progress`` is called
    with the bytes read so far and in all. A manifest that cannot be read is a SynthfastError.
    """
    path = place(path)
    manifest = Manifest.load(path)
    entries = finished_shards(path, manifest)
    problems = [] if manifest.complete else [_incomplete(path, manifest)]
    owners = {file.sha256: file.file for entry in entries.values() for file in entry.files}
    total = sum(file.bytes for entry in entries.values() for file in entry.files)
    done = 0
    for entry in entries.values():
        with _here(path, entry) as folder:
            found, sound = [], True
            for role, file in entry.parts.items():
                try:
                    _verify_file(folder, manifest.request, entry, role, owners)
                except SynthfastError as error:
                    found.append(str(error))
                    sound = False
                done += file.bytes
                if progress is not None:
                    progress(done, total)
            if sound and manifest.request.format == "wds":
                try:
                    _verify_tar(folder, manifest.request, entry)
                except SynthfastError as error:
                    found.append(str(error))
            problems += [problem.replace(str(folder), str(path)) for problem in found]
    return problems + _strangers(path, manifest, entries)


@contextlib.contextmanager
def _here(path: Folder, entry: ShardEntry) -> Iterator[Path]:
    """A local folder with a shard's files as they are now; those at a URL are copied, not taken from the cache."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="synthfast-") as folder:
        for file in entry.files:
            with contextlib.suppress(Missing):  # found to be missing by who looks for it
                copy(path, file.file, Path(folder) / file.file)
        yield Path(folder)


def summary(path: str | os.PathLike) -> dict[str, Any]:
    """Facts about a shard folder, complete or not, as JSON values; ``images_per_class`` counts what is there so far.

    ``request`` is everything that the sampler noted: generator, solver, seed, guidance and so on.
    """
    path = place(path)
    manifest = Manifest.load(path)
    request, entries = manifest.request, finished_shards(path, manifest)
    per_class = None
    if request.classes is not None:
        counts = np.zeros(request.classes, np.int64)
        for entry in entries.values():
            labels = checked_labels(_map_labels(path, entry), entry.span.count, request.classes, entry.labels.file)
            counts += np.bincount(labels, minlength=request.classes)
        per_class = counts.tolist()
    return {
        "path": str(path),
        "complete": manifest.complete,
        "n": request.n,
        "images": sum(entry.span.count for entry in entries.values()),
        "shape": list(request.shape),
        "classes": request.classes,
        "format": request.format,
        "images_per_class": per_class,
        "shards": request.shard_count,
        "shards_finished": len(entries),
        "bytes": sum(file.bytes for entry in entries.values() for file in entry.files),
        "request": request.values,
    }


def _all_labels(path: Folder, request: Request, shards: Sequence[ShardEntry]) -> np.ndarray:
    """int64 [n], a copy, for which one shard at a time is open."""
    parts = [np.zeros(0, np.int64)]
    parts += (np.array(_map_labels(path, entry)) for entry in shards)
    return np.concatenate(parts)


def _map_labels(path: Folder, entry: ShardEntry) -> np.ndarray:
    return map_npy(shard_path(path, entry.parts["labels"]), "<i8", (entry.span.count,))


def _verify_file(path: Path, request: Request, entry: ShardEntry, role: str, owners: dict[str, str]) -> None:
    file = entry.parts[role]
    digest = sha256_file(shard_path(path, file))
    if digest != file.sha256:
        other = owners.get(digest)
        reason = (
            f"holds what belongs in {other}" if other else f"its SHA-256 is {digest}, the manifest says {file.sha256}"
        )
        raise SynthfastError(f"{path / file.file}: {reason}; delete it and run the command that made the folder again")
    if role == "images":
        map_images(path, request, entry)
    elif role == "labels":
        checked_labels(_map_labels(path, entry), entry.span.count, request.classes, str(path / file.file))


def _verify_tar(path: Path, request: Request, entry: ShardEntry) -> None:
    labels = None if request.classes is None else np.asarray(_map_labels(path, entry))
    TarShard(path, request, entry, labels).verify()


def _open_tars(
    path: Folder, request: Request, shards: Sequence[ShardEntry], labels: np.ndarray | None
) -> list[TarShard]:
    return [
        TarShard(path, request, entry, None if labels is None else labels[entry.span.first :][: entry.span.count])
        for entry in shards
    ]


def _strangers(path: Folder, manifest: Manifest, entries: dict[int, ShardEntry]) -> list[str]:
    """Files that look like shards and belong to none; sidecars and shards being written are no strangers."""
    request, problems = manifest.request, []
    for name in sorted(name for name in sizes(path) if name.startswith("shard-")):
        match = re.fullmatch(r"shard-(\d{6,})\..+", name)
        index = int(match[1]) if match else -1
        known: set[str] = set()
        if 0 <= index < request.shard_count:
            span = request.span(index)
            known = {span.sidecar_file, *request.files(span).values()}
        if name not in known:
            problems.append(f"{join(path, name)}: does not belong to this set; remove it")
    return problems


def _incomplete(path: Folder, manifest: Manifest) -> str:
    finished = len(finished_shards(path, manifest))
    return (
        f"{path}: incomplete, {finished} of {manifest.request.shard_count} shards are there; "
        "run the command that made it again to complete it"
    )
