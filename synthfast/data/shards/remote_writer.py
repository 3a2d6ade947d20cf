"""Shards for a folder at a URL: written to a local folder first, then uploaded."""

from __future__ import annotations

import contextlib
from pathlib import Path

from synthfast.data.shards.manifest import Request, ShardEntry
from synthfast.data.shards.writer import ShardWriter
from synthfast.data.storage.places import upload


class RemoteShardWriter(ShardWriter):
    """Writes one shard into ``staging``; ``commit`` uploads its files, the sidecar last, and removes the local ones."""

    def __init__(self, folder: str, staging: Path, request: Request, index: int) -> None:
        super().__init__(staging, request, index)
        self._url, self._staging = folder, staging

    def commit(self) -> ShardEntry:
        """Make the shard whole and visible at the URL. An upload that fails leaves it unfinished: the next run makes it again."""
        entry = super().commit()
        paths = [self._staging / name for name in (*(file.file for file in entry.files), self.span.sidecar_file)]
        try:
            for path in paths:
                upload(path, self._url)
        finally:
            for path in paths:
                with contextlib.suppress(OSError):
                    path.unlink()
        return entry
