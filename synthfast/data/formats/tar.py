"""The layout of a WebDataset tar: numbered members, image then label, headers and index for a whole batch at once.

    000000000.png  header block, data, zeros up to a block of 512 bytes
    000000000.cls  the same; one block of data, the label in decimal. Not there in a set without labels.
    ...
    1,024 zero bytes

Everything but the images follows from their sizes, the labels and the number of the first image, so a file is checked by
comparing it with what it must be. Headers are ustar (POSIX.1-1988) with mode 0644, owner 0 and time 0. The index is DALI's
(https://docs.nvidia.com/deeplearning/dali/user-guide/docs/): "v1.2 <count>", then a line a sample with extension, data
offset, size and file name of each member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)
LABEL = "cls"
MOST_LABEL_DIGITS = 6  # labels are below a million, see synthfast.data.shards.manifest
_LEAST_DIGITS = 9  # of a member's name


@dataclass(frozen=True)
class Naming:
    """What members are called: the number of the image in the whole set, in as many digits as the last one needs.

    Attributes:
        n: images in the set.
        extension: of the images, such as "png".
    """

    n: int
    extension: str

    @property
    def digits(self) -> int:
        return max(_LEAST_DIGITS, len(str(self.n - 1)))

    def member(self, index: int) -> str:
        return f"{index:0{self.digits}d}.{self.extension}"


@dataclass(frozen=True)
class Members:
    """Consecutive members of one tar: what they are and where.

    Attributes:
        first: the number of the first image in the whole set.
        sizes: bytes of each image, int64 [k].
        labels: int64 [k] in [0, 10^6), or None.
        start: where the first header begins in the file.
    """

    naming: Naming
    first: int
    sizes: np.ndarray
    labels: np.ndarray | None
    start: int = 0

    @property
    def offsets(self) -> np.ndarray:
        """Where the data of each image begins, int64 [k]."""
        steps = self._steps
        return self.start + np.cumsum(steps) - steps + BLOCK

    @property
    def end(self) -> int:
        """Where the next member's header begins."""
        return self.start + int(self._steps.sum())

    @property
    def label_offsets(self) -> np.ndarray:
        """Where the data of each label begins, int64 [k]."""
        return self.offsets + padded(self.sizes) + BLOCK

    @property
    def _steps(self) -> np.ndarray:
        return BLOCK + padded(self.sizes) + (0 if self.labels is None else 2 * BLOCK)

    @property
    def _names(self) -> np.ndarray:
        return _decimal(np.arange(self.first, self.first + len(self.sizes)), self.naming.digits)

    def headers(self) -> np.ndarray:
        """The header block of each image, uint8 [k, 512]."""
        return _headers(self._names, self.naming.extension, self.sizes)

    def label_blocks(self) -> np.ndarray:
        """Header and data of each label, uint8 [k, 2, 512]."""
        assert self.labels is not None
        texts, sizes = _label_texts(self.labels)
        blocks = np.zeros((len(self.labels), 2, BLOCK), np.uint8)
        blocks[:, 0] = _headers(self._names, LABEL, sizes)
        blocks[:, 1, : texts.shape[1]] = texts
        return blocks

    def blocks(self, images: Sequence[bytes]) -> np.ndarray:
        """The bytes of the file from ``start`` to ``end``, uint8 [(end - start) / 512, 512], with ``images`` as the data."""
        blocks = np.zeros(((self.end - self.start) // BLOCK, BLOCK), np.uint8)
        places = self.offsets - self.start
        blocks[places // BLOCK - 1] = self.headers()
        if self.labels is not None:
            rows = (self.label_offsets - self.start) // BLOCK
            blocks[np.stack((rows - 1, rows), 1)] = self.label_blocks()
        view = memoryview(blocks).cast("B") if len(images) else memoryview(b"")
        for place, image in zip(places.tolist(), images, strict=True):
            view[place : place + len(image)] = image
        return blocks

    def index_lines(self) -> bytes:
        """Their lines in the index."""
        count, names = len(self.sizes), self._names

        def member(extension: str, offsets: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
            tail = _repeat(f".{extension}", count)
            space = _repeat(" ", count)
            return [_repeat(f"{extension} ", count), _plain(offsets), space, _plain(sizes), space, names, tail]

        columns = member(self.naming.extension, self.offsets, self.sizes)
        if self.labels is not None:
            columns += [
                _repeat(" ", count),
                *member(LABEL, self.label_offsets, _label_texts(self.labels)[1]),
            ]
        lines = np.concatenate([*columns, _repeat("\n", count)], axis=1)
        return lines[lines != 0].tobytes()


def index_head(count: int) -> bytes:
    """The first line of an index of ``count`` samples."""
    return f"v1.2 {count}\n".encode()


def padded(sizes: np.ndarray) -> np.ndarray:
    """Sizes rounded up to whole blocks."""
    return -(-sizes // BLOCK) * BLOCK


def _headers(names: np.ndarray, extension: str, sizes: np.ndarray) -> np.ndarray:
    digits, tail = names.shape[1], f".{extension}".encode()
    block = np.zeros(BLOCK, np.uint8)

    def put(place: int, text: bytes) -> None:
        block[place : place + len(text)] = np.frombuffer(text, np.uint8)

    put(digits, tail)
    for place, text in ((100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (136, b"00000000000")):  # mode to time
        put(place, text)
    put(156, b"0")  # a plain file
    put(257, b"ustar\x0000")
    headers = np.tile(block, (len(sizes), 1))
    headers[:, :digits] = names
    headers[:, 124:135] = _number(sizes, 11, 8)
    sums = headers.sum(1, dtype=np.int64) + 8 * ord(" ")  # the checksum counts as spaces
    headers[:, 148:154] = _number(sums, 6, 8)
    headers[:, 155] = ord(" ")
    return headers


def _label_texts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels in decimal, left-aligned with zero bytes after them (uint8 [k, 6]), and their lengths (int64 [k])."""
    lengths = 1 + sum((labels >= 10**power).astype(np.int64) for power in range(1, MOST_LABEL_DIGITS))
    shifted = labels * 10 ** (MOST_LABEL_DIGITS - lengths)
    texts = _decimal(shifted, MOST_LABEL_DIGITS)
    texts[np.arange(MOST_LABEL_DIGITS) >= lengths[:, None]] = 0
    return texts, lengths


def _decimal(values: np.ndarray, digits: int) -> np.ndarray:
    return _number(values, digits, 10)


def _number(values: np.ndarray, digits: int, base: int) -> np.ndarray:
    """Numbers in so many digits, uint8 [k, digits] of ASCII."""
    out = np.empty((len(values), digits), np.uint8)
    rest = values
    for place in range(digits - 1, -1, -1):
        above = rest // base
        out[:, place] = rest - above * base + ord("0")
        rest = above
    return out


def _plain(values: np.ndarray) -> np.ndarray:
    """Positive numbers in decimal, right-aligned with zero bytes before them."""
    digits = len(str(int(values.max()))) if len(values) else 1
    out = _decimal(values, digits)
    seen = np.logical_or.accumulate(out != ord("0"), axis=1)
    return np.where(seen, out, 0).astype(np.uint8)


def _repeat(text: str, count: int) -> np.ndarray:
    return np.tile(np.frombuffer(text.encode(), np.uint8), (count, 1))
