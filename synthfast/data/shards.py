"""Writing a shard folder so that it can be interrupted anywhere and completed by the same command.

    with ShardFolder.create_or_resume("out", request) as folder:    # one process: holds the lock
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                writer.append(images, labels)                       # as often as it takes: span.count images
                writer.commit()
        folder.finish()

A shard counts as finished once its sidecar ``shard-000000.json`` is there, which is renamed into place after the two
files that it describes. ``finish`` gathers the sidecars into the manifest. Every file is written under a temporary
name, flushed to disk and renamed, so a run killed at any moment leaves a folder that the next one completes, byte for
byte as if it had never been interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from synthfast.artifacts import (
    TEMPORARY_PREFIX,
    Lock,
    atomic_write_json,
    commit_temporary,
    json_bytes,
    os_error,
    temporary_path,
)
from synthfast.data.manifest import (
    MANIFEST,
    Manifest,
    Request,
    ShardEntry,
    ShardFile,
    Span,
    finished_shards,
    require_same,
    shard_path,
)
from synthfast.data.npy import npy_header
from synthfast.errors import SynthfastError, UsageError

CONTINUE_HINT = "once that is mended run the same command again: finished shards are kept"


class ShardFolder:
    """A shard folder open for writing; made by ``create_or_resume`` or ``join``, and a context manager.

    Attributes:
        path: the folder.
        request: what it is to hold.
        complete: whether ``finish`` has been done, now or by an earlier run.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: Lock | None) -> None:
        self.path, self.request, self.complete = path, manifest.request, manifest.complete
        self._lock = lock

    @classmethod
    def create_or_resume(
        cls, path: str | os.PathLike, request: Mapping[str, Any], *, options: Mapping[str, str] | None = None
    ) -> ShardFolder:
        """Make the folder, or go on with one that was made for the same request. Locks it against other processes.

        Args:
            path: the folder; made if missing, and refused if it holds files but no manifest.
            request: JSON values, see ``synthfast.data.manifest``.
            options: what to call a key of the request in messages, such as {"solver.steps": "--steps"}.

        Raises:
            UsageError: the folder holds something else, or was made for another request; the difference is named.
            SynthfastError: another process is writing it, or the file system refuses.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_error(path, error, "choose another --out") from error
        lock = Lock(path)
        try:
            try:
                manifest = _open_manifest(path, _parse(request, path), options or {})
            except OSError as error:
                raise os_error(path, error, CONTINUE_HINT) from error
            return cls(path, manifest, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def join(
        cls, path: str | os.PathLike, request: Mapping[str, Any], *, options: Mapping[str, str] | None = None
    ) -> ShardFolder:
        """Write into a folder whose lock another rank of the same run holds, after that rank has opened it.

        Divide the work by shard index (``span.index % world_size``), not by the place in ``pending()``: the ranks look
        at different moments, when other shards may have been finished.
        """
        path = Path(path)
        manifest = Manifest.load(path)
        _require_same(path, manifest.request, _parse(request, path), options or {})
        return cls(path, manifest, None)

    def pending(self) -> Iterator[Span]:
        """The shards that are still to be written, in order, as of this call."""
        if self.complete:
            return iter(())
        finished = finished_shards(self.path, Manifest(self.request))
        return (self.request.span(i) for i in range(self.request.shard_count) if i not in finished)

    def writer(self, index: int) -> ShardWriter:
        """A writer for shard ``index``; one at a time for each shard."""
        if not 0 <= index < self.request.shard_count:
            raise IndexError(f"shard {index} of {self.request.shard_count}")
        return ShardWriter(self.path, self.request, index)

    def finish(self) -> Manifest:
        """Record every shard in the manifest, mark it complete and remove the sidecars. Only for the lock's holder."""
        if self.complete:
            return Manifest.load(self.path)
        shards = finished_shards(self.path, Manifest(self.request))
        if len(shards) != self.request.shard_count:
            raise SynthfastError(
                f"{self.path}: {len(shards)} of {self.request.shard_count} shards are finished; "
                "run the same command again to complete it"
            )
        manifest = Manifest(self.request, tuple(shards[i] for i in range(len(shards))), complete=True)
        atomic_write_json(self.path / MANIFEST, manifest.to_json())
        self.complete = True
        try:
            _remove_sidecars(self.path)
        except OSError as error:
            raise os_error(self.path, error, CONTINUE_HINT) from error
        return manifest

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ShardWriter:
    """Writes one shard, streaming to disk; as a context manager it aborts unless ``commit`` was called."""

    def __init__(self, folder: Path, request: Request, index: int) -> None:
        self._folder, self._request = folder, request
        self.span = request.span(index)
        self._written = 0
        self._files: list[_HashedFile] = []
        try:
            images_header = npy_header("|u1", (self.span.count, *request.shape))
            self._files.append(_HashedFile(folder / self.span.images_file, images_header))
            if request.classes is not None:
                labels_header = npy_header("<i8", (self.span.count,))
                self._files.append(_HashedFile(folder / self.span.labels_file, labels_header))
        except SynthfastError:
            self.abort()
            raise

    def append(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add uint8 ``images`` [k, H, W, C] and their int64 ``labels`` [k] (None in a set without classes).

        Raises SynthfastError if the disk is full or refuses; the shard is then aborted.
        """
        count, classes = len(images), self._request.classes
        if images.dtype != np.uint8 or images.shape[1:] != self._request.shape:
            raise ValueError(f"images must be uint8 [k, *{self._request.shape}], found {images.dtype} {images.shape}")
        if self._written + count > self.span.count:
            raise ValueError(f"shard {self.span.index} holds {self.span.count} images, found {self._written + count}")
        if (labels is None) != (classes is None):
            raise ValueError(f"labels must {'not ' if classes is None else ''}be given in a set of {classes} classes")
        arrays = [images]
        if labels is not None:
            if labels.dtype != np.int64 or labels.shape != (count,):
                raise ValueError(f"labels must be int64 [{count}], found {labels.dtype} {labels.shape}")
            if count and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(f"labels must be in [0, {classes}), found {labels.min()} to {labels.max()}")
            arrays.append(labels.astype("<i8", copy=False))
        try:
            for file, array in zip(self._files, arrays, strict=True):
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        except SynthfastError:
            self.abort()
            raise
        self._written += count

    def commit(self) -> ShardEntry:
        """Make the shard durable and visible: both files, then the sidecar that says it is finished."""
        if self._written != self.span.count:
            raise ValueError(f"shard {self.span.index} needs {self.span.count} images, {self._written} were appended")
        try:
            parts = [file.close() for file in self._files]
            entry = ShardEntry(self.span, parts[0], parts[1] if len(parts) > 1 else None)
            for file in self._files:
                file.rename()
            sidecar = _HashedFile(self._folder / self.span.sidecar_file, json_bytes(entry.to_json()))
            self._files.append(sidecar)
            sidecar.close()
            sidecar.rename()
        except SynthfastError:
            self.abort()
            raise
        return entry

    def abort(self) -> None:
        """Remove the temporary files; nothing to do after ``commit``."""
        for file in self._files:
            file.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


class _HashedFile:
    """A file under its temporary name whose SHA-256 is taken while it is written."""

    def __init__(self, path: Path, start: bytes) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        try:
            self._file = open(temporary_path(path), "wb")  # noqa: SIM115 (close or discard closes it)
        except OSError as error:
            raise os_error(path, error, CONTINUE_HINT) from error
        try:
            self.write(start)
        except SynthfastError:
            self.discard()
            raise

    def write(self, data: bytes | np.ndarray) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise os_error(self._path, error, CONTINUE_HINT) from error
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> ShardFile:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise os_error(self._path, error, CONTINUE_HINT) from error
        return ShardFile(self._path.name, self._digest.hexdigest(), self._bytes)

    def rename(self) -> None:
        try:
            commit_temporary(self._path)
        except OSError as error:
            raise os_error(self._path, error, CONTINUE_HINT) from error

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what was still buffered may not fit on the disk either
            self._file.close()
        with contextlib.suppress(OSError):  # the next run removes what stays
            temporary_path(self._path).unlink(missing_ok=True)


def _parse(request: Mapping[str, Any], path: Path) -> Request:
    # Through JSON and back, so that a tuple equals the list that was read from a manifest.
    return Request.parse(json.loads(json.dumps(request, allow_nan=False)), f"{path}: request")


def _open_manifest(path: Path, request: Request, options: Mapping[str, str]) -> Manifest:
    """The manifest of a folder whose lock is held, made or healed as needed."""
    if not (path / MANIFEST).exists():
        strangers = sorted(set(os.listdir(path)) - {TEMPORARY_PREFIX + MANIFEST})
        if strangers:
            raise UsageError(
                f"{path}: holds files ({strangers[0]}) but no {MANIFEST}, so it is no shard folder; "
                "choose a new or empty folder"
            )
        return _write_manifest(path, Manifest(request))
    manifest = Manifest.load(path)
    _require_same(path, manifest.request, request, options)
    for leftover in path.glob(TEMPORARY_PREFIX + "*"):
        leftover.unlink()
    recorded = finished_shards(path, manifest)
    good = {index: entry for index, entry in recorded.items() if _is_whole(path, entry)}
    if manifest.complete and len(good) == len(recorded):
        _remove_sidecars(path)
        return manifest
    if manifest.complete:  # shards were lost since: back to the state before ``finish``, to make them again
        for entry in good.values():
            atomic_write_json(path / entry.span.sidecar_file, entry.to_json())
    _remove_sidecars(path, keep=good)
    return _write_manifest(path, Manifest(manifest.request)) if manifest.complete else manifest


def _write_manifest(path: Path, manifest: Manifest) -> Manifest:
    atomic_write_json(path / MANIFEST, manifest.to_json())
    return manifest


def _require_same(path: Path, old: Request, new: Request, options: Mapping[str, str]) -> None:
    require_same(path, old.values, new.values, lambda key: options.get(key, key))


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    """Whether the files are there in full size. Their content is for ``verify``: checking it here means reading all."""
    try:
        for file in entry.files:
            shard_path(path, file)
    except SynthfastError:
        return False
    return True


def _remove_sidecars(path: Path, keep: Mapping[int, ShardEntry] | None = None) -> None:
    kept = {entry.span.sidecar_file for entry in (keep or {}).values()}
    for sidecar in path.glob("shard-*.json"):
        if sidecar.name not in kept:
            sidecar.unlink()
