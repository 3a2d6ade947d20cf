"""Reading a complete shard folder, and looking into one: ``ShardSet``, ``verify`` and ``summary``."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.artifacts import sha256_file
from synthfast.data.images import ArrayImages, checked_labels
from synthfast.data.manifest import Manifest, Request, ShardEntry, ShardFile, finished_shards, shard_path
from synthfast.data.npy import map_npy
from synthfast.errors import SynthfastError


class ShardSet(ArrayImages):
    """The images of a complete shard folder, memory-mapped, under one index over all shards.

    Opening checks the manifest and every file's header and size; ``verify`` also reads and hashes the contents.

    Raises:
        SynthfastError: the folder is incomplete, damaged, or not one that this version reads.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        request = self.manifest.request
        if not self.manifest.complete:
            raise SynthfastError(_incomplete(self.path, self.manifest))
        images = [_map_images(self.path, request, entry) for entry in self.manifest.shards]
        labels = None
        if request.classes is not None:
            labels = np.concatenate([_map_labels(self.path, entry) for entry in self.manifest.shards])
        super().__init__(str(path), images, labels, request.classes)

    def fingerprint(self) -> str:
        """SHA-256 over the shards' SHA-256 in the manifest: no image is read. It depends on the shard size too."""
        digests = [(len(self), self.shape, self.classes)]
        digests += [(entry.span.count, *(file.sha256 for file in entry.files)) for entry in self.manifest.shards]
        return hashlib.sha256(repr(digests).encode()).hexdigest()


def verify(path: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read a shard folder whole and list what is wrong with it, each in one line that starts with the file's name.

    Finds files that are missing, cut short, changed by so much as a bit, swapped with another, or that no manifest
    knows; headers that are not what the manifest says; labels outside the classes; and shards not made yet. A lost or
    damaged shard is made again by deleting it and repeating the command that made the folder. ``progress`` is called
    with the bytes read so far and in all. A manifest that cannot be read is a SynthfastError.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    entries = finished_shards(path, manifest)
    problems = [] if manifest.complete else [_incomplete(path, manifest)]
    owners = {file.sha256: file.file for entry in entries.values() for file in entry.files}
    total = sum(file.bytes for entry in entries.values() for file in entry.files)
    done = 0
    for entry in entries.values():
        for file in entry.files:
            try:
                _verify_file(path, manifest.request, entry, file, owners)
            except SynthfastError as error:
                problems.append(str(error))
            done += file.bytes
            if progress is not None:
                progress(done, total)
    return problems + _strangers(path, manifest, entries)


def summary(path: str | os.PathLike) -> dict[str, Any]:
    """Facts about a shard folder, complete or not, as JSON values; ``images_per_class`` counts what is there so far.

    ``request`` is everything that the sampler noted: generator, solver, seed, guidance and so on.
    """
    path = Path(path)
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
        "images_per_class": per_class,
        "shards": request.shard_count,
        "shards_finished": len(entries),
        "bytes": sum(file.bytes for entry in entries.values() for file in entry.files),
        "request": request.values,
    }


def _map_images(path: Path, request: Request, entry: ShardEntry) -> np.ndarray:
    return map_npy(shard_path(path, entry.images), "|u1", (entry.span.count, *request.shape))


def _map_labels(path: Path, entry: ShardEntry) -> np.ndarray:
    return map_npy(shard_path(path, entry.labels), "<i8", (entry.span.count,))


def _verify_file(path: Path, request: Request, entry: ShardEntry, file: ShardFile, owners: dict[str, str]) -> None:
    digest = sha256_file(shard_path(path, file))
    if digest != file.sha256:
        other = owners.get(digest)
        reason = (
            f"holds what belongs in {other}" if other else f"its SHA-256 is {digest}, the manifest says {file.sha256}"
        )
        raise SynthfastError(f"{path / file.file}: {reason}; delete it and run the same sample command again")
    if file is entry.images:
        _map_images(path, request, entry)
    else:
        checked_labels(_map_labels(path, entry), entry.span.count, request.classes, str(path / file.file))


def _strangers(path: Path, manifest: Manifest, entries: dict[int, ShardEntry]) -> list[str]:
    """Files that look like shards and belong to none; sidecars and shards being written are no strangers."""
    request, problems = manifest.request, []
    for file in sorted(path.glob("shard-*")):
        match = re.fullmatch(r"shard-(\d{6,})(\.images\.npy|\.labels\.npy|\.json)", file.name)
        index = int(match[1]) if match else -1
        known: set[str] = set()
        if 0 <= index < request.shard_count:
            span = request.span(index)
            known = {span.sidecar_file, span.images_file}
            if request.classes is not None:
                known.add(span.labels_file)
        if file.name not in known:
            problems.append(f"{file}: does not belong to this set; remove it")
    return problems


def _incomplete(path: Path, manifest: Manifest) -> str:
    finished = len(finished_shards(path, manifest))
    return (
        f"{path}: incomplete, {finished} of {manifest.request.shard_count} shards are there; "
        "run the same sample command again to complete it"
    )
