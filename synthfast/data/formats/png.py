"""Fast lossless PNG for batches of small images of one size, grey or RGB with 8 bits a channel.

The format is the W3C's (https://www.w3.org/TR/png-3/). A batch is filtered at once by numpy, each row by Sub or Up,
whichever leaves smaller absolute values in sum, and each image is deflated by igzip of Intel's ISA-L. Both filters are
also undone for a batch at once, which Average and Paeth do not allow. An image whose rows fit into one block of a tar
file without compression is stored: deflating it takes many times as long and saves nothing there.

The bytes depend on the pixels, the version of ISA-L and the kind of processor, not on threads or the size of batches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from isal import isal_zlib

COLOUR_TYPES = {1: 0, 3: 2}  # channels to PNG's grey and RGB
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NONE, _SUB, _UP = 0, 1, 2
_LEVEL = 1  # of igzip; 2 and 3 are slower and gain less than 1%
_AROUND = 57  # bytes of a file with one IDAT chunk, beside what that chunk holds
_STORED_AROUND = _AROUND + 11  # the same, and zlib's header, one stored block's, and the checksum
_TAR_BLOCK = 512
_IDAT_CRC = isal_zlib.crc32(b"IDAT")
_FRONT = struct.Struct(">33sI4s")  # signature and IHDR, length and name of the first IDAT
_CHUNK = struct.Struct(">I4s")  # length and name of a chunk
_BATCH_BYTES = 1 << 18  # pixels filtered at once: as many as stay in the cache

Bytes = bytes | memoryview


def encode_png(images: np.ndarray) -> list[bytes]:
    """Each of ``images``, uint8 [k, H, W, C] with C 1 or 3, as a PNG file."""
    count, height, width, channels = images.shape
    row_bytes = 1 + width * channels
    if _STORED_AROUND + height * row_bytes <= _TAR_BLOCK:
        return _stored(images)
    front, members = head(images.shape[1:]), []
    step = max(1, _BATCH_BYTES // (height * row_bytes))
    for first in range(0, count, step):
        for rows in _filtered(images[first : first + step]).reshape(-1, height * row_bytes):
            data = isal_zlib.compress(rows, _LEVEL)
            checksum = isal_zlib.crc32(data, _IDAT_CRC)
            parts = (front, len(data).to_bytes(4, "big"), b"IDAT", data, checksum.to_bytes(4, "big"), _END)
            members.append(b"".join(parts))
    return members


def decode_png(members: Sequence[Bytes], out: np.ndarray) -> list[int]:
    """Decode files as ``encode_png`` writes them into ``out``, uint8 [k, H, W, C].

    Returns the places of those that are not of this kind (other filters, chunks or sizes, or damaged), whose images in
    ``out`` mean nothing. No file makes it allocate more than an image.
    """
    height, width, channels = out.shape[1:]
    size = height * (1 + width * channels)
    front, step = head(out.shape[1:]), max(1, _BATCH_BYTES // size)
    others: list[int] = []
    for first in range(0, len(members), step):
        part = members[first : first + step]
        inflated = [_inflated(member, front, size) for member in part]
        good = [place for place, data in enumerate(inflated) if data is not None]
        rows = np.frombuffer(b"".join(data for data in inflated if data is not None), np.uint8)
        rows = rows.reshape(len(good), height, 1 + width * channels)
        simple = (rows[:, :, 0] <= _UP).all(1)
        places = np.array(good, np.int64)[simple]
        out[first + places] = _unfiltered(rows[simple], width, channels)
        others += (first + np.setdiff1d(np.arange(len(part)), places)).tolist()
    return others


def is_whole(file: Bytes) -> bool:
    """Whether ``file`` is made of PNG's chunks from its signature to IEND, all with the checksums that they say.

    Pillow stops reading when it has the last pixel, whose checksum comes afterwards.
    """
    place = len(_SIGNATURE)
    if file[:place] != _SIGNATURE:
        return False
    while place + 12 <= len(file):
        size, kind = _CHUNK.unpack_from(file, place)
        end = place + 8 + size
        if end + 4 > len(file) or isal_zlib.crc32(file[place + 4 : end]) != int.from_bytes(file[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        place = end + 4
    return False


def _filtered(images: np.ndarray) -> np.ndarray:
    """Rows with their filter type in front, uint8 [k, H, 1 + W C]."""
    count, height, width, channels = images.shape
    pixels = images.reshape(count, height, width * channels)
    rows = np.empty((2, count, height, 1 + width * channels), np.uint8)
    sub, up = rows
    sub[:, :, 0], up[:, :, 0] = _SUB, _UP
    sub[:, :, 1 : 1 + channels] = pixels[:, :, :channels]
    np.subtract(pixels[:, :, channels:], pixels[:, :, :-channels], out=sub[:, :, 1 + channels :])
    up[:, 0, 1:] = pixels[:, 0]
    np.subtract(pixels[:, 1:], pixels[:, :-1], out=up[:, 1:, 1:])
    # Differences are numbers from -128 to 127 here; their absolute values are added by a matrix product, which is exact
    # as long as the sums are, and several times as fast as numpy's sum.
    exact = np.float32 if 128 * rows.shape[3] < 2**24 else np.float64
    sums = np.abs(rows.view(np.int8)).view(np.uint8).astype(exact) @ np.ones(rows.shape[3], exact)
    better = sums[1] < sums[0]
    sub[better] = up[better]
    return sub


def _unfiltered(rows: np.ndarray, width: int, channels: int) -> np.ndarray:
    """Pixels [k, H, W, C] of rows whose filters are None, Sub or Up."""
    count, height, _ = rows.shape
    types, pixels = rows[:, :, 0], rows[:, :, 1:].copy()
    chosen = types == _SUB
    columns = np.ascontiguousarray(pixels[chosen].reshape(-1, width, channels).transpose(1, 2, 0))
    for x in range(1, width):
        columns[x] += columns[x - 1]
    pixels[chosen] = columns.transpose(2, 0, 1).reshape(-1, width * channels)
    mask = np.where(types == _UP, 255, 0).astype(np.uint8)[:, :, None]
    for y in range(1, height):
        pixels[:, y] += pixels[:, y - 1] & mask[:, y]
    return pixels.reshape(count, height, width, channels)


def _stored(images: np.ndarray) -> list[bytes]:
    """Files whose rows are not compressed, all of one length, made by numpy but for one checksum."""
    count, height, width, channels = images.shape
    rows = np.zeros((count, height, 1 + width * channels), np.uint8)
    rows[:, :, 1:] = images.reshape(count, height, width * channels)
    size = height * (1 + width * channels)
    data = rows.reshape(count, size)
    front = head(images.shape[1:]) + struct.pack(">I4s", size + 11, b"IDAT")
    front += b"\x78\x01\x01" + struct.pack("<HH", size, size ^ 0xFFFF)
    files = np.empty((count, size + _STORED_AROUND), np.uint8)
    files[:, : len(front)] = np.frombuffer(front, np.uint8)
    files[:, len(front) : len(front) + size] = data
    files[:, -20:-16] = _adler32(data).astype(">u4").view(np.uint8).reshape(-1, 4)
    sums = [isal_zlib.crc32(chunk) for chunk in files[:, 37:-16]]
    files[:, -16:-12] = np.array(sums, ">u4").view(np.uint8).reshape(-1, 4)
    files[:, -12:] = np.frombuffer(_END, np.uint8)
    return [file.tobytes() for file in files]


def _adler32(data: np.ndarray) -> np.ndarray:
    """The checksum of RFC 1950 of each row of ``data``, uint8 [k, m]: int64 [k]."""
    weights = np.arange(data.shape[1], 0, -1)
    low = 1 + data.sum(1, dtype=np.int64)
    high = data.shape[1] + data.astype(np.int64) @ weights
    return (high % 65521) << 16 | low % 65521


def _inflated(member: Bytes, front: bytes, size: int) -> bytes | None:
    """The filtered rows, ``size`` bytes, of a file that begins with ``front`` and has one IDAT chunk; None for any other."""
    if len(member) < _AROUND:
        return None
    start, length, kind = _FRONT.unpack_from(member)
    if start != front or kind != b"IDAT" or length != len(member) - _AROUND or member[-12:] != _END:
        return None
    data = member[41:-16]
    if isal_zlib.crc32(data, _IDAT_CRC) != int.from_bytes(member[-16:-12], "big"):
        return None
    inflater = isal_zlib.decompressobj()
    try:
        rows = inflater.decompress(data, size + 1)
    except isal_zlib.error:
        return None
    return rows if len(rows) == size and inflater.eof else None


def head(shape: Sequence[int]) -> bytes:
    """Signature and IHDR, with which a file of ``shape`` (H, W, C) begins."""
    height, width, channels = shape
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", isal_zlib.crc32(kind + data))


_END = _chunk(b"IEND", b"")
