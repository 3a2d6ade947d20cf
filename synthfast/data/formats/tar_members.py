"""The members of a tar file that nobody vouches for: their names, places and sizes, found from front to back.

The formats are POSIX ustar and pax (IEEE Std 1003.1, pax: "ustar Interchange Format") and GNU's long names. Nothing is unpacked,
and names lead nowhere; those that would lead out of a folder, links and devices are refused all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from synthfast.errors import SynthfastError

BLOCK = 512
_LARGEST = 1 << 60  # beyond any file
_MOST_EXTENDED = 1 << 20  # bytes of an extended header: real ones have a few hundred
_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ([^=]{1,4096})=")
_FILES, _FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"K", b"x", b"g"
_REFUSED = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies. ``header``: the block that describes it."""

    name: str
    offset: int
    size: int
    header: bytes


def members(file: IO[bytes], where: str, size: int | None = None) -> Iterator[Member]:
    """The files in a tar, in order. The caller may read ``file`` between two of them.

    Args:
        file: seekable forwards; a gzip file is, too.
        where: starts the one-line errors.
        size: the tar's size, by which members that reach beyond its end are found at once; None if it is not known.
    """
    at = 0
    long_name, extended = "", {}
    while True:
        block = _block(file, where, at)
        if block is None:
            if long_name or extended:
                raise SynthfastError(f"{where}: ends with a header of nothing; restore it")
            _require_end(file, where)
            return
        kind, length = block[156:157], _number(block[124:136], where, at)
        name = long_name or extended.get("path") or _name(block)
        length = int(extended["size"]) if re.fullmatch(r"[0-9]{1,18}", extended.get("size", "")) else length
        data = at + BLOCK
        following = data + -(-length // BLOCK) * BLOCK
        if size is not None and data + length > size:
            raise SynthfastError(
                f"{where}: {_shown(name)} is said to have {length} bytes, which are not there; restore it"
            )
        if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL, _LONG_LINK):
            text = _extended(file, where, at, length)
            if kind == _LONG_NAME:
                long_name = text.rstrip(b"\0").decode("utf-8", "replace")
            elif kind == _PAX:
                extended = _pax(text, where, at)
        else:
            _check(name, kind, where)
            if kind in _FILES:
                yield Member(name, data, length, block)
            long_name, extended = "", {}
        at = following
        file.seek(at)
        if file.tell() < data + length:
            raise SynthfastError(f"{where}: ends within {_shown(name)}; restore it")


def _block(file: IO[bytes], where: str, at: int) -> bytes | None:
    """A header that fits its checksum; None for the block of zeros that ends a tar."""
    block = file.read(BLOCK)
    if len(block) != BLOCK:
        raise SynthfastError(f"{where}: ends at byte {at + len(block)} without the end of a tar file; restore it")
    if not any(block):
        if at == 0:
            raise SynthfastError(f"{where}: an empty tar file, expected images; check the path")
        return None
    stated = _number(block[148:156], where, at)
    if stated != sum(block) - sum(block[148:156]) + 8 * 32:  # the checksum's own place counts as spaces
        raise SynthfastError(f"{where}: not a tar file, or damaged at byte {at} (wrong checksum); restore it")
    return block


def _require_end(file: IO[bytes], where: str) -> None:
    """Nothing but zeros may follow: members after the end, as in tars put together by cat, would be lost."""
    while block := file.read(1 << 16):
        if any(block):
            raise SynthfastError(
                f"{where}: goes on after the end of the tar file; make one tar of it, or several files"
            )


def _number(field: bytes, where: str, at: int) -> int:
    """Octal digits, or as GNU writes large ones, a set first bit and the number in base 256."""
    text = field.strip(b" \0")
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        number = int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else _LARGEST
    if number >= _LARGEST:
        raise SynthfastError(f"{where}: not a tar file, or damaged at byte {at} (no number in a header); restore it")
    return number


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _extended(file: IO[bytes], where: str, at: int, length: int) -> bytes:
    if length > _MOST_EXTENDED:
        raise SynthfastError(
            f"{where}: an extended header of {length} bytes at byte {at}, expected at most {_MOST_EXTENDED}; remake it"
        )
    text = file.read(length)
    if len(text) != length:
        raise SynthfastError(f"{where}: ends within an extended header at byte {at}; restore it")
    return text


def _pax(text: bytes, where: str, at: int) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE`` and a line feed each, where LENGTH counts the whole record."""
    values, place = {}, 0
    while place < len(text):
        match = _RECORD.match(text, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            raise SynthfastError(f"{where}: a damaged extended header at byte {at}; restore it")
        values[match[2].decode("utf-8", "replace")] = text[match.end() : end - 1].decode("utf-8", "replace")
        place = end
    return values


def _check(name: str, kind: bytes, where: str) -> None:
    if kind not in (*_FILES, _FOLDER):
        what = _REFUSED.get(kind, f"of kind {kind!r}")
        raise SynthfastError(f"{where}: {_shown(name)} is {what}, expected files alone; remake the tar")
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise SynthfastError(f"{where}: {_shown(name)} leads out of its folder; remake the tar if you trust it")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
