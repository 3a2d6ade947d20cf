"""DALI's index of our tars is not trusted: it is what the sizes give, or it is refused in one line."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast.data.formats.tar import END, Members, Naming, index_head, padded
from synthfast.data.formats.tar_index import read_index
from synthfast.errors import SynthfastError

SIZES = np.array([7, 512, 513, 4000])
LABELS = np.array([3, 10, 0, 999])
NAMING = Naming(1000, "png")
MEMBERS = {True: Members(NAMING, 600, SIZES, LABELS), False: Members(NAMING, 600, SIZES, None)}
TEXT = {labelled: index_head(4) + members.index_lines() for labelled, members in MEMBERS.items()}


def read(path: Path, text: bytes, labelled: bool = True, **changed: object) -> Members:
    path.write_bytes(text)
    members = MEMBERS[labelled]
    facts = {
        "naming": NAMING,
        "first": 600,
        "count": 4,
        "labels": members.labels,
        "tar_bytes": members.end + len(END),
        "most_bytes": 4000,
    }
    return read_index(path, **{**facts, **changed})


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_written_is_read(tmp_path, labelled):
    found = read(tmp_path / "a.idx", TEXT[labelled], labelled)
    assert found.sizes.tolist() == SIZES.tolist()
    assert found.offsets.tolist() == MEMBERS[labelled].offsets.tolist()


def replaced(old: str, new: str, labelled: bool = True) -> bytes:
    assert TEXT[labelled].count(old.encode()) == 1
    return TEXT[labelled].replace(old.encode(), new.encode())


LINES = TEXT[True].decode().splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: expected 'v1.2 4', found ''"),
        (replaced("v1.2 4", "v1.2 5"), "line 1: expected 'v1.2 4', found 'v1.2 5'"),
        (replaced("v1.2 4", "v1.1 4"), "line 1: expected 'v1.2 4', found 'v1.1 4'"),
        (TEXT[True][:-1], "expected 4 whole lines after the first, found 3"),
        (TEXT[True] + b"\n", "expected 4 whole lines after the first, found 5"),
        ("\n".join(LINES[:-1]).encode() + b"\n", "expected 4 whole lines after the first, found 3"),
        (replaced("png 512 7 ", "png 512 513 "), "line 2: expected .* cls 2048 1 .*, found .* cls 1536 1 "),
        (replaced("png 512 7 ", "png 512 7000000 "), "line 2: an image of 7000000 bytes, expected 1 to 4000"),
        (replaced("png 512 7 ", "png 512 0 "), "line 2: an image of 0 bytes, expected 1 to 4000"),
        (replaced("png 512 7 ", "png 512 -7 "), "line 2: expected extension, offset, size and name, found 'png 512 -7"),
        (replaced("png 512 7 ", "png 512 99999999999999999999 "), "line 2: expected extension, offset, size and name"),
        (replaced("png 512 7 ", "png 512 07 "), "line 2: expected 'png 512 7 .*, found 'png 512 07"),
        (replaced("png 512 7 ", "png 0 7 "), "line 2: expected 'png 512 7 .*, found 'png 0 7"),
        (replaced("png 512 7 ", "png 1024 7 "), "line 2: expected 'png 512 7 .*, found 'png 1024 7"),
        (replaced("png 512 7 ", "jpg 512 7 "), "line 2: expected 'png 512 7 .*, found 'jpg 512 7"),
        (replaced("000000601.png", "../../../../../etc/x"), r"line 3: .*, found 'png .* \.\./\.\./"),
        (replaced("000000601.png", "000000600.png"), "line 3: expected .* 000000601.png .*, found .* 000000600.png"),
        (replaced("000000601.png", "000000601.png\0"), r"line 3: expected .*, found .*\\x00"),
        (replaced("cls 1536 1 ", "cls 1536 2 "), "line 2: expected .* cls 1536 1 .*, found .* cls 1536 2 "),
        ("\n".join([LINES[0], LINES[2], LINES[1], *LINES[3:]]).encode() + b"\n", "line 2: expected .*000000600.png"),
        ("\n".join([LINES[0], *[LINES[1]] * 4]).encode() + b"\n", "line 3: expected .*000000601.png"),
        (TEXT[False], "line 2: expected 'png 512 7 .* cls .*, found 'png 512 7"),
        (b"v1.2 4\n" + b"\n" * 4, "line 2: expected extension, offset, size and name, found ''"),
        (b"v1.2 4\n" + b"png 1\n" * 4, "line 2: expected extension, offset, size and name, found 'png 1'"),
        (b"v1.2 4\n" + b"    \n" * 4, "line 2: expected extension, offset, size and name"),
        (b"v1.2 4\n" + b"\xff" * 100 + b"\n" * 4, r"line 2: expected extension, .*, found '.*\\xff"),
        (TEXT[True] + b"x" * 1000, "expected at most 800 bytes for 4 images, found more"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "a.idx"
    with pytest.raises(SynthfastError, match=message) as error:
        read(path, text)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert str(error.value).endswith("; restore or remake the folder") and len(str(error.value)) < 500


def test_index_and_tar_must_agree_in_size(tmp_path):
    size = MEMBERS[True].end + len(END)
    with pytest.raises(SynthfastError, match=f"its images fill a tar of {size} bytes, found one of {size + 512}"):
        read(tmp_path / "a.idx", TEXT[True], tar_bytes=size + 512)
    for count in (10**15, size // 1024 + 1):  # no memory is taken for what the tar cannot hold
        with pytest.raises(SynthfastError, match=f"{count} images cannot be in a tar of {size} bytes"):
            read(tmp_path / "a.idx", TEXT[True], count=count)


def test_labels_must_be_those_of_the_labels_file(tmp_path):
    with pytest.raises(SynthfastError, match="line 3: "):
        read(tmp_path / "a.idx", TEXT[True], labels=np.array([3, 1, 0, 999]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_text_raises_anything_else(tmp_path, data):
    text = bytearray(data.draw(st.sampled_from([TEXT[True], TEXT[False], b"v1.2 4\n"])))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(text)))
        kind = data.draw(st.sampled_from(["insert", "delete", "replace"]))
        piece = data.draw(
            st.sampled_from([b" ", b"\n", b"9", b"-1", b"png ", b"\0", b"99999999999", b"\xff", b"v1.2 4\n"])
        )
        end = place if kind == "insert" else place + data.draw(st.integers(1, 10))
        text[place:end] = b"" if kind == "delete" else piece
    try:
        found = read(tmp_path / "a.idx", bytes(text))
    except SynthfastError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        # Another size within the same blocks is all that an index can say on its own; ``verify`` compares it with the tar.
        assert found.offsets.tolist() == MEMBERS[True].offsets.tolist()
        assert padded(found.sizes).tolist() == padded(SIZES).tolist()


def test_many_lines_take_little_memory_and_time(tmp_path):
    """A shard of ten thousand images: no Python object is kept or made for a line."""
    count = 10_000
    sizes, labels = np.arange(count) % 4000 + 1, np.arange(count) % 1000
    members = Members(Naming(10**7, "png"), 5_000_000, sizes, labels)
    text = index_head(count) + members.index_lines()
    tracemalloc.start()
    found = read(
        tmp_path / "a.idx",
        text,
        naming=members.naming,
        first=members.first,
        count=count,
        labels=labels,
        tar_bytes=members.end + len(END),
    )
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(found.sizes, sizes)
    assert current < 20 * count and peak < 1000 * count
    lines = re.findall(rb"png (\d+) (\d+) \d{9}\.png cls \d+ \d+ \d{9}\.cls\n", text)
    assert len(lines) == count and [int(size) for _, size in lines] == sizes.tolist()
