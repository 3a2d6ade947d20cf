"""A file that is hashed while it is written, and appears under its name only once it is whole and on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from synthfast.artifacts import commit_temporary, open_temporary, os_error, temporary_path
from synthfast.data.shards.manifest import ShardFile
from synthfast.errors import SynthfastError

CONTINUE_HINT = "once that is mended run the same command again: finished shards are kept"


class HashedFile:
    """A file under its temporary name whose SHA-256 is taken while it is written."""

    def __init__(self, path: Path, start: bytes) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        try:
            self._file = open_temporary(path)
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
