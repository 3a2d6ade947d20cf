"""Writing a shard folder so that it can be interrupted anywhere and completed by the same command.

    with ShardFolder.create_or_resume("out", request) as folder:    # one process: holds the lock
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                writer.append(images, labels)                       # as often as it takes: span.count images
                writer.commit()
        folder.finish()

The request says in which format (see ``synthfast.data.shards.manifest``): npy arrays, or WebDataset tars with DALI's index. A
shard counts as finished once its sidecar ``shard-000000.json`` is there, which is renamed into place after the files
that it describes. ``finish`` gathers the sidecars into the manifest. Every file is written under a temporary
name, flushed to disk and renamed, so a run killed at any moment leaves a folder that the next one completes, byte for
byte as if it had never been interrupted.

A folder may be at a URL (``memory://x``, ``s3://bucket/x``): a shard is then written to a temporary folder and uploaded when it
is whole, its sidecar last; see ``synthfast.data.storage.places``, and ``synthfast.data.storage.lock`` for what a lock there is
worth.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from synthfast.artifacts import TEMPORARY_PREFIX, Lock, os_error
from synthfast.data.shards.hashed_file import CONTINUE_HINT
from synthfast.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Request,
    ShardEntry,
    Span,
    finished_shards,
    require_same,
    shard_path,
)
from synthfast.data.shards.remote_writer import RemoteShardWriter
from synthfast.data.shards.writer import ShardWriter
from synthfast.data.storage.lock import RemoteLock, is_claim
from synthfast.data.storage.places import Folder, make, place, remove, sizes, write_object
from synthfast.errors import SynthfastError, UsageError


class ShardFolder:
    """A shard folder open for writing; made by ``create_or_resume`` or ``join``, and a context manager.

    Attributes:
        path: the folder; the text of a URL.
        request: what it is to hold.
        complete: whether ``finish`` has been done, now or by an earlier run.
    """

    def __init__(self, path: Folder, manifest: Manifest, lock: Lock | RemoteLock | None) -> None:
        self.path, self.request, self.complete = path, manifest.request, manifest.complete
        self._lock = lock
        self._staging: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def create_or_resume(
        cls, path: str | os.PathLike, request: Mapping[str, Any], *, options: Mapping[str, str] | None = None
    ) -> ShardFolder:
        """Make the folder, or go on with one that was made for the same request. Locks it against other processes.

        Args:
            path: the folder, or the URL of one; made if missing, and refused if it holds files but no manifest.
            request: JSON values, see ``synthfast.data.shards.manifest``.
            options: what to call a key of the request in messages, such as {"solver.steps": "--steps"}.

        Raises:
            UsageError: the folder holds something else, or was made for another request; the difference is named.
            SynthfastError: another process is writing it, or the file system refuses.
        """
        path = place(path)
        make(path)
        lock = Lock(path) if isinstance(path, Path) else RemoteLock(path)
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
        path = place(path)
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
        if isinstance(self.path, Path):
            return ShardWriter(self.path, self.request, index)
        if self._staging is None:
            self._staging = tempfile.TemporaryDirectory(prefix="synthfast-")
        return RemoteShardWriter(self.path, Path(self._staging.name), self.request, index)

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
        write_object(self.path, MANIFEST, manifest.to_json())
        self.complete = True
        try:
            _remove_sidecars(self.path)
        except OSError as error:
            raise os_error(self.path, error, CONTINUE_HINT) from error
        return manifest

    def close(self) -> None:
        """Release the lock."""
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _parse(request: Mapping[str, Any], path: Folder) -> Request:
    # Through JSON and back, so that a tuple equals the list that was read from a manifest.
    return Request.parse(json.loads(json.dumps(request, allow_nan=False)), f"{path}: request")


def _open_manifest(path: Folder, request: Request, options: Mapping[str, str]) -> Manifest:
    """The manifest of a folder whose lock is held, made or healed as needed."""
    there = sizes(path)
    if MANIFEST not in there:
        strangers = sorted(name for name in there if name != TEMPORARY_PREFIX + MANIFEST and not is_claim(name))
        if strangers:
            raise UsageError(
                f"{path}: holds files ({strangers[0]}) but no {MANIFEST}, so it is no shard folder; "
                "choose a new or empty folder"
            )
        return _write_manifest(path, Manifest(request))
    manifest = Manifest.load(path)
    _require_same(path, manifest.request, request, options)
    for name in there:
        if name.startswith(TEMPORARY_PREFIX):
            remove(path, name)
    recorded = finished_shards(path, manifest)
    good = {index: entry for index, entry in recorded.items() if _is_whole(path, entry, there)}
    if manifest.complete and len(good) == len(recorded):
        _remove_sidecars(path)
        return manifest
    if manifest.complete:  # shards were lost since: back to the state before ``finish``, to make them again
        for entry in good.values():
            write_object(path, entry.span.sidecar_file, entry.to_json())
    _remove_sidecars(path, keep=good)
    return _write_manifest(path, Manifest(manifest.request)) if manifest.complete else manifest


def _write_manifest(path: Folder, manifest: Manifest) -> Manifest:
    write_object(path, MANIFEST, manifest.to_json())
    return manifest


def _require_same(path: Folder, old: Request, new: Request, options: Mapping[str, str]) -> None:
    was, now = ({"format": each.format, **each.values} for each in (old, new))  # npy is not written down
    require_same(path, was, now, lambda key: options.get(key, key))


def _is_whole(path: Folder, entry: ShardEntry, there: Mapping[str, int]) -> bool:
    """Whether the files are there in full size. Their content is for ``verify``: checking it here means reading all.

    ``there``: the folder's files with their bytes.
    """
    if isinstance(path, str):
        return all(there.get(file.file) == file.bytes for file in entry.files)
    try:
        for file in entry.files:
            shard_path(path, file)
    except SynthfastError:
        return False
    return True


def _remove_sidecars(path: Folder, keep: Mapping[int, ShardEntry] | None = None) -> None:
    kept = {entry.span.sidecar_file for entry in (keep or {}).values()}
    for name in sorted(sizes(path)):
        if re.fullmatch(r"shard-.*\.json", name) and name not in kept:
            remove(path, name)
