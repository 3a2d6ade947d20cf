"""Images from any source into a shard folder: in bounded memory, interrupted and resumed at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast import __version__
from synthfast.data.formats.codec import DEFAULT_QUALITY, Codec
from synthfast.data.images import Chosen, ImageSet, by_part
from synthfast.data.joined import Joined
from synthfast.data.selection import Selection
from synthfast.data.shards.folder import ShardFolder
from synthfast.data.shards.shard_set import ShardSet
from synthfast.errors import UsageError

CHUNK_BYTES = 8 << 20  # of pixels, read and written at a time
CHUNK_IMAGES = 1 << 14  # at most: in a tar the smallest images take 2 KB each

# Called with the images done (those that were there before included) and all of them; first before the first image.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Copied:
    """What a run left: where, the images that were there before it, and those it wrote; and what is lost in that format."""

    path: str
    kept: int
    made: int
    warning: str | None = None


@dataclass(frozen=True)
class Layout:
    """How a set is cut and stored: npy or wds shards; codec and quality are those of wds, None being the usual ones."""

    shard_size: int
    format: str = "npy"
    codec: str | None = None
    quality: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of a shard folder's request, which has ``format`` and what follows for wds alone."""
        values: dict[str, Any] = {"shard_size": self.shard_size}
        if self.format == "wds":
            values |= {"format": "wds", "codec": self.codec or "png"}
            if values["codec"] == "jpg":
                values["quality"] = self.quality or DEFAULT_QUALITY
        return values


def layout_of(
    images: ShardSet, format: str | None, shard_size: int | None, codec: str | None, quality: int | None
) -> Layout:
    """How to store images that come from ``images``: as they are there, but for what is given.

    UsageError for a codec or a quality that belongs to a format which is neither given nor that of ``images``.
    """
    had = images.manifest.request
    shard_size = shard_size or had.values["shard_size"]
    if format is None and codec is None:
        return Layout(shard_size, images.format, images.codec, had.values.get("quality"))
    if format is None and images.format != "wds":
        raise UsageError(
            f"--codec {codec}: {images.name} holds npy shards, which have no codec; give --format wds with it"
        )
    return Layout(shard_size, format or "wds", codec, quality)


def shard_request(images: ImageSet, layout: Layout, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a shard folder that is to hold ``images``; ``origin`` says where they come from."""
    first = {"n": len(images), "shape": list(images.shape), "classes": images.classes}
    return {**first, **layout.to_json(), **origin, "synthfast": __version__}


def origin_of(images: ImageSet, source: str, selection: Selection | None = None) -> dict[str, Any]:
    """Where images come from, as JSON values: name and fingerprint, the selection's hash, whether lossy coding has left its
    traces, the request of shards."""
    origin: dict[str, Any] = {"source": {"name": source, "fingerprint": images.fingerprint()}}
    if selection is not None:
        origin["selection"] = selection.sha256
    if images.lossy:
        origin["lossy"] = True
    if isinstance(images, ShardSet):
        origin["original"] = images.manifest.request.values
    return origin


def copy_to_shards(
    images: ImageSet,
    out: str | Path,
    request: Mapping[str, Any],
    *,
    options: Mapping[str, str],
    report: Report | None = None,
) -> Copied:
    """Write ``images`` into the shard folder ``out``, or complete what an earlier run of the same request began.

    They are read in order. Files of tars that are to be stored as they are already are copied, neither decoded nor coded anew.
    ``options``: what the command line calls the keys of the request.
    """
    with ShardFolder.create_or_resume(out, request, options=options) as folder:
        files = stored_files(images, folder.request.codec)
        pending = list(folder.pending())
        made, total = 0, len(images)
        kept = total - sum(span.count for span in pending)
        tell = report or (lambda done, total: None)
        tell(kept, total)
        for span in pending:
            with folder.writer(span.index) as writer:
                for rows in chunks(images, span.first, span.first + span.count):
                    labels = None if images.labels is None else images.labels[rows]
                    if files is not None:
                        writer.append_files(files(rows), labels)
                    else:
                        writer.append(images.read(rows), labels)
                    made += len(rows)
                    tell(kept + made, total)
                writer.commit()
        folder.finish()
    return Copied(str(out), kept, made)


def stored_files(images: ImageSet, codec: Codec | None) -> Callable[[np.ndarray], list[bytes]] | None:
    """A function from numbers of images, int64 [k], to their files, where they are all stored by ``codec``; else None."""
    if codec is not None and isinstance(images, ShardSet):
        return images.encoded if images.manifest.request.codec == codec else None
    if isinstance(images, Chosen):
        files = stored_files(images.images, codec)
        return None if files is None else lambda rows: files(images.items[rows])
    if isinstance(images, Joined):
        parts = [stored_files(part, codec) for part in images.parts]
        return None if None in parts else lambda rows: _joined_files(images.ends, parts, rows)
    return None


def _joined_files(ends: np.ndarray, parts: list[Callable[[np.ndarray], list[bytes]]], rows: np.ndarray) -> list[bytes]:
    found = [b""] * len(rows)
    for number, slots, rows_of_part in by_part(ends, rows):
        for slot, file in zip(slots.tolist(), parts[number](rows_of_part), strict=True):
            found[slot] = file
    return found


def chunks(images: ImageSet, first: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """The numbers ``first`` to ``stop - 1`` (all of them by default), int64, as many at a time as CHUNK_BYTES hold, and no more
    than CHUNK_IMAGES."""
    stop = len(images) if stop is None else stop
    size = min(max(1, CHUNK_BYTES // int(np.prod(images.shape))), CHUNK_IMAGES)
    return (np.arange(start, min(start + size, stop)) for start in range(first, stop, size))
