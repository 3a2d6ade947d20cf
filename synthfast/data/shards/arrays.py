"""The images of npy shards: memory-mapped, and at a URL fetched when they are first needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from synthfast.data.formats.npy import map_npy
from synthfast.data.images import by_part
from synthfast.data.shards.manifest import Request, ShardEntry, shard_path
from synthfast.data.storage.places import Folder


def map_images(path: Folder, request: Request, entry: ShardEntry) -> np.ndarray:
    """The images of one shard, uint8 [n, H, W, C], memory-mapped after a check of size and header."""
    return map_npy(shard_path(path, entry.parts["images"]), "|u1", (entry.span.count, *request.shape))


class FetchedArrays(Sequence[np.ndarray]):
    """The arrays of a set at a URL: each is fetched when it is first asked for. Several threads may ask."""

    def __init__(self, folder: str, request: Request, entries: Sequence[ShardEntry]) -> None:
        self._folder, self._request, self._entries = folder, request, entries
        self._ends = np.cumsum([entry.span.count for entry in entries])
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._mapped:
            self._mapped[number] = map_images(self._folder, self._request, self._entries[number])
        return self._mapped[number]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` (int64 [k]) of the whole set: uint8 [k, H, W, C]."""
        out = np.empty((len(indices), *self._request.shape), np.uint8)
        for number, slots, rows in by_part(self._ends, indices):
            out[slots] = self[number][rows]
        return out
