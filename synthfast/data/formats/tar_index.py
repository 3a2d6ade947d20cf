"""Reading DALI's index of one of our tars without trusting it, for ten thousand lines at a time and no object a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from synthfast.artifacts import os_error
from synthfast.data.formats.tar import BLOCK, END, Members, Naming, index_head
from synthfast.errors import SynthfastError

_MOST_LINE = 160  # bytes of a line: two extensions, offsets, sizes and names
_MOST_DIGITS = 10  # of a size
_HINT = "restore or remake the folder"


def read_index(
    path: Path, *, naming: Naming, first: int, count: int, labels: np.ndarray | None, tar_bytes: int, most_bytes: int
) -> Members:
    """The members of a tar, from its index.

    Only the images' sizes are taken from the file: offsets, names and labels follow from them, and the file must be byte
    for byte what they give. So no line can point outside the tar, into another member or to another name.

    Args:
        naming, first, count, labels: what the members are called, and the labels that the index must agree with.
        tar_bytes: the size of the tar, which the members must fill.
        most_bytes: no image is larger.

    Raises:
        SynthfastError: naming the line that is wrong, what was expected there and what was found.
    """
    # An image takes a header and a block at least: what a manifest counts is not believed before memory is taken for it.
    if count > tar_bytes // (2 * BLOCK):
        raise SynthfastError(f"{path}: {count} images cannot be in a tar of {tar_bytes} bytes; {_HINT}")
    text, head = _read(path, count), index_head(count)
    if not text.startswith(head):
        raise SynthfastError(f"{path}: line 1: expected {_show(head)}, found {_show(text)}; {_HINT}")
    sizes = _sizes(path, text[len(head) :], count)
    wrong = np.flatnonzero((sizes < 1) | (sizes > most_bytes))
    if len(wrong):
        raise SynthfastError(
            f"{path}: line {wrong[0] + 2}: an image of {sizes[wrong[0]]} bytes, expected 1 to {most_bytes}; {_HINT}"
        )
    members = Members(naming, first, sizes, labels)
    _compare(path, text, head + members.index_lines())
    if members.end + len(END) != tar_bytes:
        raise SynthfastError(
            f"{path}: its images fill a tar of {members.end + len(END)} bytes, found one of {tar_bytes}; {_HINT}"
        )
    return members


def _read(path: Path, count: int) -> bytes:
    most = _MOST_LINE * (count + 1)
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
    except OSError as error:
        raise os_error(path, error) from error
    if len(text) > most:
        raise SynthfastError(f"{path}: expected at most {most} bytes for {count} images, found more; {_HINT}")
    return text


def _sizes(path: Path, text: bytes, count: int) -> np.ndarray:
    """The third word of each line, int64 [count]."""
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if len(ends) != count or (count and ends[-1] != len(data) - 1):
        raise SynthfastError(f"{path}: expected {count} whole lines after the first, found {len(ends)}; {_HINT}")
    starts = np.concatenate(([0], ends[:-1] + 1))
    # The second space of each line, and the third; far beyond the text where there are fewer.
    spaces = np.concatenate((np.flatnonzero(data == ord(" ")), [len(data)] * 3))
    before = np.searchsorted(spaces, starts) + 1
    low, high = spaces[before] + 1, spaces[before + 1]
    good = (high < ends) & (low < high) & (high - low <= _MOST_DIGITS)
    sizes = np.zeros(count, np.int64)
    for place in range(_MOST_DIGITS):
        used = good & (low + place < high)
        digits = data[np.where(used, low + place, 0)].astype(np.int64) - ord("0")
        good &= ~used | ((digits >= 0) & (digits <= 9))
        sizes = np.where(used, sizes * 10 + digits, sizes)
    if not good.all():
        wrong = int(np.argmin(good))
        line = text[starts[wrong] : ends[wrong]]
        raise SynthfastError(
            f"{path}: line {wrong + 2}: expected extension, offset, size and name, found {_show(line)}; {_HINT}"
        )
    return sizes


def _compare(path: Path, found: bytes, expected: bytes) -> None:
    if found == expected:
        return
    for number, (is_there, should_be) in enumerate(
        zip(found.split(b"\n"), expected.split(b"\n"), strict=False), start=1
    ):
        if is_there != should_be:
            raise SynthfastError(
                f"{path}: line {number}: expected {_show(should_be)}, found {_show(is_there)}; {_HINT}"
            )


def _show(line: bytes) -> str:
    text = repr(line.partition(b"\n")[0].decode("ascii", "backslashreplace"))
    return text if len(text) <= 100 else text[:97] + "..."
