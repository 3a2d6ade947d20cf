"""The layout of our tars, against Python's tarfile and a plain way to write the index."""

from __future__ import annotations

import io
import re
import tarfile

import numpy as np
import pytest

from synthfast.data.formats.tar import BLOCK, END, Members, Naming


def sizes_of(files: list[bytes]) -> np.ndarray:
    return np.array([len(file) for file in files], np.int64)


def some_files(count: int, seed: int = 0) -> list[bytes]:
    """Files of random sizes, block edges among them."""
    random = np.random.default_rng(seed)
    sizes = [1, 511, 512, 513, 1024, *random.integers(1, 3000, max(0, count - 5))][:count]
    return [random.bytes(int(size)) for size in sizes]


def plain_index(members: list[tarfile.TarInfo], each: int) -> str:
    words = [f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in members]
    return "".join(" ".join(words[k : k + each]) + "\n" for k in range(0, len(words), each))


@pytest.mark.parametrize("first", [0, 7, 999_999_990, 10**12])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_tarfile_and_a_plain_index_agree(first, labelled, count):
    files = some_files(count)
    labels = np.resize([0, 9, 10, 99, 100, 12345, 999_999], count) if labelled else None
    naming = Naming(first + count, "png")
    members = Members(naming, first, sizes_of(files), labels)
    data = members.blocks(files).tobytes() + END
    assert len(data) == members.end + len(END)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.getmembers()
        contents = [tar.extractfile(member).read() for member in found]
    digits = max(9, len(str(first + count - 1)))
    names, expected = [], []
    for number, file in enumerate(files):
        key = f"{first + number:0{digits}d}"
        names += [f"{key}.png"] + ([f"{key}.cls"] if labelled else [])
        expected += [file] + ([str(labels[number]).encode()] if labelled else [])
    assert [member.name for member in found] == names and contents == expected
    for member in found:
        assert (member.mode, member.uid, member.gid, member.mtime, member.type) == (0o644, 0, 0, 0, tarfile.REGTYPE)
        assert (member.uname, member.gname, member.linkname) == ("", "", "")
    assert members.index_lines().decode() == plain_index(found, 2 if labelled else 1)
    assert data[257:265] == b"ustar\x0000" and re.fullmatch(rb"[0-7]{6}\0 ", data[148:156])


def test_pieces_are_the_whole():
    files, labels = some_files(50), np.arange(50)
    whole = Members(Naming(100, "jpg"), 20, sizes_of(files), labels)
    place, blocks, lines = 0, b"", b""
    for first, last in ((0, 1), (1, 17), (17, 50)):
        part = Members(Naming(100, "jpg"), 20 + first, sizes_of(files[first:last]), labels[first:last], place)
        blocks += part.blocks(files[first:last]).tobytes()
        lines += part.index_lines()
        place = part.end
    assert blocks == whole.blocks(files).tobytes() and lines == whole.index_lines() and place == whole.end


def test_names_have_the_digits_of_the_last():
    assert Naming(1, "png").member(0) == "000000000.png"
    assert Naming(10**9, "png").member(10**9 - 1) == "999999999.png"
    assert Naming(10**9 + 1, "png").member(5) == "0000000005.png"


def test_large_members():
    """Only the header is looked at: eleven octal digits reach to 8 GiB."""
    members = Members(Naming(2, "png"), 0, np.array([8 * 2**30 - 1, 1]), None)
    info = tarfile.TarInfo.frombuf(members.headers()[0].tobytes(), "ascii", "strict")
    assert info.size == 8 * 2**30 - 1
    assert members.offsets.tolist() == [BLOCK, 8 * 2**30 + 2 * BLOCK]
