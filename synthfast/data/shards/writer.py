"""Writes one shard: arrays for the format npy; tar, index and labels for the format wds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from synthfast.artifacts import json_bytes
from synthfast.data.formats.npy import npy_header
from synthfast.data.formats.tar import END, Members, Naming, index_head
from synthfast.data.shards.hashed_file import HashedFile
from synthfast.data.shards.manifest import Request, ShardEntry, Span
from synthfast.errors import SynthfastError

Data = bytes | np.ndarray


class _Layout(ABC):
    """What the files of a shard hold, by what ``Request.files`` calls them."""

    def __init__(self, request: Request, span: Span) -> None:
        self.request, self.span = request, span

    @abstractmethod
    def start(self) -> dict[str, bytes]:
        """What each file begins with."""

    @abstractmethod
    def pieces(self, images: np.ndarray, labels: np.ndarray | None) -> Mapping[str, Data]:
        """What a batch adds: uint8 [k, H, W, C] and int64 [k]."""

    def end(self) -> dict[str, bytes]:
        """What files end with."""
        return {}

    def _labels_start(self) -> dict[str, bytes]:
        return {} if self.request.classes is None else {"labels": npy_header("<i8", (self.span.count,))}


class _NpyLayout(_Layout):
    def start(self) -> dict[str, bytes]:
        return {"images": npy_header("|u1", (self.span.count, *self.request.shape)), **self._labels_start()}

    def pieces(self, images: np.ndarray, labels: np.ndarray | None) -> Mapping[str, Data]:
        return {"images": _raw(images), **_labels(labels)}


class _WdsLayout(_Layout):
    def __init__(self, request: Request, span: Span) -> None:
        super().__init__(request, span)
        codec = request.codec
        assert codec is not None
        self._codec, self._naming = codec, Naming(request.n, codec.name)
        self._next, self._place = span.first, 0  # the next image, and where its header goes

    def start(self) -> dict[str, bytes]:
        return {"tar": b"", "tar_index": index_head(self.span.count), **self._labels_start()}

    def pieces(self, images: np.ndarray, labels: np.ndarray | None) -> Mapping[str, Data]:
        return self.pieces_of_files(self._codec.encode(images), labels)

    def pieces_of_files(self, files: Sequence[bytes], labels: np.ndarray | None) -> Mapping[str, Data]:
        """What images add that are coded already."""
        sizes = np.array([len(file) for file in files], np.int64)
        members = Members(self._naming, self._next, sizes, labels, self._place)
        self._next, self._place = self._next + len(files), members.end
        return {"tar": _raw(members.blocks(files)), "tar_index": members.index_lines(), **_labels(labels)}

    def end(self) -> dict[str, bytes]:
        return {"tar": END}


_LAYOUTS = {"npy": _NpyLayout, "wds": _WdsLayout}


class ShardWriter:
    """Writes one shard, streaming to disk; as a context manager it aborts unless ``commit`` was called."""

    def __init__(self, folder: Path, request: Request, index: int) -> None:
        self._folder, self._request = folder, request
        self.span = request.span(index)
        self._written = 0
        self._layout: _Layout = _LAYOUTS[request.format](request, self.span)
        self._files: dict[str, HashedFile] = {}
        try:
            names = request.files(self.span)
            for role, start in self._layout.start().items():
                self._files[role] = HashedFile(folder / names[role], start)
        except SynthfastError:
            self.abort()
            raise

    def append(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add uint8 ``images`` [k, H, W, C] and their int64 ``labels`` [k] (None in a set without classes).

        The files do not depend on how images are cut into batches. Raises SynthfastError if the disk is full or
        refuses; the shard is then aborted.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self._request.shape:
            raise ValueError(f"images must be uint8 [k, *{self._request.shape}], found {images.dtype} {images.shape}")
        self._check(len(images), labels)
        if len(images):
            self._write(self._layout.pieces(np.ascontiguousarray(images), labels))
        self._written += len(images)

    def append_files(self, files: Sequence[bytes], labels: np.ndarray | None = None) -> None:
        """Add images that ``request.codec`` has coded already, as they are; labels and errors as in ``append``. For wds only."""
        if not isinstance(self._layout, _WdsLayout):
            raise TypeError(f"shard {self.span.index} is of format {self._request.format}, which stores no files")
        self._check(len(files), labels)
        if files:
            self._write(self._layout.pieces_of_files(files, labels))
        self._written += len(files)

    def _check(self, count: int, labels: np.ndarray | None) -> None:
        """ValueError unless ``count`` more images and their labels belong into the shard."""
        classes = self._request.classes
        if self._written + count > self.span.count:
            raise ValueError(f"shard {self.span.index} holds {self.span.count} images, found {self._written + count}")
        if (labels is None) != (classes is None):
            raise ValueError(f"labels must {'not ' if classes is None else ''}be given in a set of {classes} classes")
        if labels is not None:
            if labels.dtype != np.int64 or labels.shape != (count,):
                raise ValueError(f"labels must be int64 [{count}], found {labels.dtype} {labels.shape}")
            if count and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(f"labels must be in [0, {classes}), found {labels.min()} to {labels.max()}")

    def commit(self) -> ShardEntry:
        """Make the shard durable and visible: its files, then the sidecar that says it is finished."""
        if self._written != self.span.count:
            raise ValueError(f"shard {self.span.index} needs {self.span.count} images, {self._written} were appended")
        self._write(self._layout.end())
        try:
            entry = ShardEntry(self.span, {role: file.close() for role, file in self._files.items()})
            for file in self._files.values():
                file.rename()
            sidecar = HashedFile(self._folder / self.span.sidecar_file, json_bytes(entry.to_json()))
            self._files["sidecar"] = sidecar
            sidecar.close()
            sidecar.rename()
        except SynthfastError:
            self.abort()
            raise
        return entry

    def abort(self) -> None:
        """Remove the temporary files; nothing to do after ``commit``."""
        for file in self._files.values():
            file.discard()

    def _write(self, pieces: Mapping[str, Data]) -> None:
        try:
            for role, piece in pieces.items():
                self._files[role].write(piece)
        except SynthfastError:
            self.abort()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


def _labels(labels: np.ndarray | None) -> dict[str, Data]:
    return {} if labels is None else {"labels": _raw(labels.astype("<i8", copy=False))}


def _raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
