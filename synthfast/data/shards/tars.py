"""The images in the tars of a shard folder, read by index."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from synthfast.artifacts import os_error
from synthfast.data.formats.codec import Codec
from synthfast.data.formats.tar import BLOCK, Members, Naming, padded
from synthfast.data.formats.tar_index import read_index
from synthfast.data.images import by_part
from synthfast.data.shards.manifest import Request, ShardEntry, shard_path
from synthfast.data.storage.places import Folder
from synthfast.errors import SynthfastError

_VERIFIED = 4096  # members whose headers are compared at once


class TarShard:
    """One tar and its index, which are opened when they are first read. Several threads may read.

    Args:
        folder, request, entry: as in ``synthfast.data.shards.manifest``; sizes of files are checked against the entry.
        labels: int64 [entry.span.count], or None in a set without classes.
    """

    def __init__(self, folder: Folder, request: Request, entry: ShardEntry, labels: np.ndarray | None) -> None:
        codec = request.codec
        assert codec is not None
        self._codec, self._entry, self._labels = codec, entry, labels
        self._naming = Naming(request.n, codec.name)
        self._folder, self._lock = folder, threading.Lock()
        if isinstance(folder, Path):
            _ = self.tar, self.index  # their sizes are checked now; files at a URL are fetched when they are needed

    @cached_property
    def tar(self) -> Path:
        """The tar's path."""
        return shard_path(self._folder, self._entry.parts["tar"])

    @cached_property
    def index(self) -> Path:
        """The path of DALI's index."""
        return shard_path(self._folder, self._entry.parts["tar_index"])

    @cached_property
    def _sizes_and_offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 and int64: 12 bytes an image, for as long as the set is open."""
        members = self.members()
        return members.sizes.astype(np.int32), members.offsets

    @cached_property
    def _data(self) -> np.ndarray:
        try:
            return np.asarray(np.memmap(self.tar, np.uint8, "r"))
        except OSError as error:
            raise os_error(self.tar, error) from error

    def members(self) -> Members:
        """What is in the tar, from its index."""
        return read_index(
            self.index,
            naming=self._naming,
            first=self._entry.span.first,
            count=self._entry.span.count,
            labels=self._labels,
            tar_bytes=self._entry.parts["tar"].bytes,
            most_bytes=self._codec.most_bytes,
        )

    def check_index(self) -> None:
        """SynthfastError unless every line of the index is right."""
        with self._lock:
            _ = self._sizes_and_offsets

    def files(self, rows: np.ndarray) -> list[memoryview]:
        """The images ``rows`` (int64 [k] in [0, count)) as they are stored, without a copy."""
        with self._lock:
            sizes, offsets = self._sizes_and_offsets
            view = memoryview(self._data)
        pairs = zip(offsets[rows].tolist(), sizes[rows].tolist(), strict=True)
        return [view[offset : offset + size] for offset, size in pairs]

    def name(self, row: int) -> str:
        """What errors call an image."""
        return f"{self.tar} ({self._naming.member(self._entry.span.first + row)})"

    def verify(self) -> None:
        """Compare every header, label and padding of the tar with what the index says, and the first bytes of every image.

        Raises SynthfastError that names the first member that is wrong.
        """
        members = self.members()
        offsets, blocks = members.offsets, self._data.reshape(-1, BLOCK)
        for first in range(0, len(offsets), _VERIFIED):
            rows = slice(first, first + _VERIFIED)
            part = Members(
                self._naming,
                members.first + first,
                members.sizes[rows],
                None if members.labels is None else members.labels[rows],
                int(offsets[first]) - BLOCK,
            )
            wrong = _differing(part, blocks, self._codec)
            if wrong is not None:
                raise SynthfastError(f"{self.name(first + wrong[0])}: {wrong[1]}; restore or remake the folder")
        if blocks[members.end // BLOCK :].any():
            raise SynthfastError(f"{self.tar}: its end is not zeros; restore or remake the folder")


class TarShards:
    """The images of several tars under one index.

    Attributes:
        codec: how they are stored.
    """

    def __init__(self, shards: Sequence[TarShard], counts: Sequence[int], codec: Codec) -> None:
        self.shards, self.codec = list(shards), codec
        self._ends = np.cumsum(counts)

    def encoded(self, indices: np.ndarray) -> list[memoryview]:
        """The images at ``indices`` (int64 [k]) as they are stored."""
        found: list[memoryview] = [memoryview(b"")] * len(indices)
        for number, slots, rows in by_part(self._ends, indices):
            for slot, file in zip(slots.tolist(), self.shards[number].files(rows), strict=True):
                found[slot] = file
        return found

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` (int64 [k]): uint8 [k, H, W, C]."""

        def name(place: int) -> str:
            [(number, _, rows)] = by_part(self._ends, indices[place : place + 1])
            return self.shards[number].name(int(rows[0]))

        return self.codec.decode(self.encoded(indices), name)

    def check_indexes(self) -> None:
        """SynthfastError unless every line of every index is right."""
        for shard in self.shards:
            shard.check_index()


def _differing(members: Members, blocks: np.ndarray, codec: Codec) -> tuple[int, str] | None:
    """The first of ``members`` that is not as it must be in a file of ``blocks``, and why."""
    offsets = members.offsets
    last = blocks[(offsets + padded(members.sizes)) // BLOCK - 1]
    used = members.sizes - padded(members.sizes) + BLOCK
    checks = [
        ("its header is not what the index says", (blocks[offsets // BLOCK - 1] != members.headers()).any(1)),
        ("what follows it is not zeros", (last * (np.arange(BLOCK) >= used[:, None])).any(1)),
    ]
    start = np.frombuffer(codec.start, np.uint8)
    checks.append((f"not a {codec.name} of the set's size", (blocks[offsets // BLOCK, : len(start)] != start).any(1)))
    if members.labels is not None:
        rows = members.label_offsets // BLOCK
        found = np.stack((blocks[rows - 1], blocks[rows]), 1)
        checks.append(("its label is not that of the labels' file", (found != members.label_blocks()).any((1, 2))))
    wrong = [(int(np.argmax(bad)), why) for why, bad in checks if bad.any()]
    return min(wrong, key=lambda each: each[0]) if wrong else None
