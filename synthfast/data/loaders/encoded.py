"""Images as they lie in files: png and jpg bytes that DALI decodes to the pixels that :meth:`ImageSet.read` gives.

Decoders agree on plain files: 8 bits per channel, grey or RGB, nothing that changes colours. All others (palettes, alpha, 16
bits, other formats, damaged ones) are left to ``read``, which has a rule or an error for each, and encoded anew, without loss.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

from synthfast.data.images import Chosen, ImageSet
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.sources.files import FileImages

Shape = tuple[int, int, int]
Encoded = Callable[[np.ndarray], list[bytes]]

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # colour types of png
_HARMLESS = (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs")  # chunks that change no pixel
_FRAMES = (0xC0, 0xC1, 0xC2)  # jpg: baseline, extended, progressive, all with Huffman codes
_BARE = (0x01, *range(0xD0, 0xD8))  # markers without a length


def encoded_images(images: ImageSet) -> Encoded | None:
    """What gives the png or jpg bytes of the images at int64 [k]; None for a set that has none, or changes them when read."""
    if isinstance(images, Chosen):
        inner, items = encoded_images(images.images), images.items
        return None if inner is None else lambda indices: inner(items[indices])
    if (isinstance(images, FileImages) and images.as_stored) or (
        isinstance(images, ShardSet) and images.format == "wds"
    ):
        return images.encoded
    return None


def plain_images(images: ImageSet, encoded: Encoded, items: np.ndarray) -> list[np.ndarray]:
    """The images ``items`` as files that every decoder takes for the same pixels of the set's shape: uint8 [bytes] each.

    Raises SynthfastError, naming the image, for one that ``read`` refuses.
    """
    found = encoded(items)
    others = [k for k, data in enumerate(found) if not is_plain(data, images.shape)]
    for k, pixels in zip(others, images.read(items[others]) if others else (), strict=True):
        found[k] = bare_png(pixels)
    return [np.frombuffer(data, np.uint8) for data in found]


def is_plain(data: bytes, shape: Shape) -> bool:
    """Whether ``data`` is a whole plain png or jpg of ``shape`` (H, W, C)."""
    return _plain_png(data, shape) if data.startswith(_PNG) else _plain_jpg(data, shape)


def bare_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] with C 1 or 3 as a png that is not compressed."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # a filter byte of 0 begins each
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if channels == 1 else _RGB, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return _PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _plain_png(data: bytes, shape: Shape) -> bool:
    at, view = len(_PNG), memoryview(data)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + size
        if end + 4 > len(data) or zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", data, at + 8)
            if (height, width, {_GREY: 1, _RGB: 3}.get(colour), depth) != (*shape, 8):
                return False
        elif kind == b"IEND":
            return True
        elif kind != b"IDAT" and kind not in _HARMLESS:
            return False
        at = end + 4
    return False


def _plain_jpg(data: bytes, shape: Shape) -> bool:
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    at, framed = 2, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _BARE:
            at += 2
            continue
        if marker in _FRAMES:
            if framed or at + 10 > len(data) or struct.unpack_from(">BHHB", data, at + 4) != (8, *shape):
                return False
            framed = True
        if marker == 0xDA:  # pixels
            return framed
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False
