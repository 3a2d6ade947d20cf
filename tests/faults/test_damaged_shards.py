"""Shard folders that are damaged or hostile: every command that reads them says so in one line, and makes nothing of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HALF_A_GIGABYTE = 1 << 29
IMAGES, LABELS = "shard-000000.images.npy", "shard-000001.labels.npy"


def cut(folder: Path) -> None:
    (folder / IMAGES).write_bytes((folder / IMAGES).read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / LABELS).write_bytes(b"")


def flipped(folder: Path) -> None:
    """In the header, where it changes the shape."""
    data = bytearray((folder / IMAGES).read_bytes())
    data[data.index(b"40")] ^= 1
    (folder / IMAGES).write_bytes(data)


def swapped(folder: Path) -> None:
    """40 images and 20."""
    first, second = folder / IMAGES, folder / IMAGES.replace("0.", "1.")
    kept = first.read_bytes()
    os.replace(second, first)
    second.write_bytes(kept)


def of_shape(folder: Path) -> None:
    np.save(folder / IMAGES, np.zeros((40, 8, 4, 2), np.uint8))


def of_dtype(folder: Path) -> None:
    np.save(folder / LABELS, np.zeros(20, np.float64))


def of_label(folder: Path) -> None:
    labels = np.load(folder / LABELS)
    labels[7] = 10
    np.save(folder / LABELS, labels)


def with_objects(folder: Path) -> None:
    """A pickle, which is not loaded; padded to the size that the manifest names."""
    size = (folder / LABELS).stat().st_size
    np.save(folder / LABELS, np.array([Trap(str(folder / "trap"))] * 3, object), allow_pickle=True)
    data = (folder / LABELS).read_bytes()
    (folder / LABELS).write_bytes((data + bytes(size))[:size])


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def linked(folder: Path) -> None:
    os.replace(folder / IMAGES, folder.parent / "elsewhere.npy")
    (folder / IMAGES).symlink_to(folder.parent / "elsewhere.npy")


def manifest(*keys: object, to: object) -> Callable[[Path], None]:
    """Set a key of the manifest; to None: remove it."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        inner = values
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        if to is None:
            del inner[keys[-1]]
        (folder / "manifest.json").write_text(json.dumps(values))

    return change


HUGE = 10**18
DAMAGES = {
    "cut": (cut, f"{IMAGES}: expected 2688 bytes, found 2687"),
    "empty": (empty, f"{LABELS}: expected 288 bytes, found 0"),
    "flipped": (flipped, f"{IMAGES}"),
    "swapped": (swapped, f"{IMAGES}: expected 2688 bytes, found 1408"),
    "another shape": (of_shape, IMAGES),
    "another dtype": (of_dtype, LABELS),
    "a label outside": (of_label, "labels must be in [0, 9], found 0 to 10"),
    "objects": (with_objects, LABELS),
    "a link that leads out": (linked, f"{IMAGES}: a link that leads out of the folder"),
    "from the future": (manifest("format", to=99), "format 99 is newer than this synthfast reads"),
    "no request": (manifest("request", to=None), "key 'request' is missing"),
    "no digest": (manifest("shards", 0, "images", "sha256", to=None), "key 'sha256' is missing"),
    "a path upwards": (manifest("shards", 0, "images", "file", to=f"../{IMAGES}"), f"must be called {IMAGES}"),
    "an absolute path": (manifest("shards", 0, "images", "file", to=f"/{IMAGES}"), f"must be called {IMAGES}"),
    "absurdly many": (manifest("request", "n", to=HUGE), "'shards' must have"),
    "an absurd shard": (manifest("request", "shard_size", to=HUGE), "'shards' must have 1 entries, found 2"),
    "an absurd shape": (manifest("request", "shape", to=[HUGE, HUGE, 3]), "expected"),
    "absurdly many classes": (manifest("request", "classes", to=HUGE), "'classes' must be null or 1 to 1000000"),
}
READERS = {
    "verify": ("shards", "verify", "shards"),
    "export": ("shards", "export", "shards", "--to", "npz", "--out", "out.npz"),
    "fid": ("score", "fid", "--real", "npz:real.npz", "--synthetic", "shards", "--out", "out.json"),
    "select": ("select", "shards", "--by", "random", "--out", "out.npy"),
    "classifier": ("train", "classifier", "--synthetic", "shards", "--steps", 1, "--out", "out", "--device", "cpu"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(run, copy, left_in, damage, reader):
    change, message = DAMAGES[damage]
    change(copy / "shards")
    before = left_in(copy)
    ran = run(copy, *READERS[reader], memory=HALF_A_GIGABYTE)
    if reader == "verify":  # a line for each file that is wrong
        lines = ran.err.splitlines()
        assert ran.status == 1 and lines and all("shards/" in line for line in lines), ran.err
        assert "Traceback" not in ran.err and any("shard-0" in line or message in line for line in lines)
    else:
        assert ran.status == 1 and message in ran.error and "shards" in ran.error
    assert left_in(copy) == before
    assert not (copy / "shards" / "trap").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "swapped", "a label outside", "linked away"])
def test_the_sampler_mends_what_is_damaged(run, commands, reference, copy, damage):
    """A file of another size is seen at once; one of the same size once verify has named it and it was deleted."""
    expected = reference("sample")
    for name, data in expected.left.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    out = copy / "out"
    images, labels = out / "shard-000003.images.npy", out / "shard-000003.labels.npy"
    if damage == "cut":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "empty":
        labels.write_bytes(b"")
    elif damage == "swapped":
        images.write_bytes((out / "shard-000004.images.npy").read_bytes())
    elif damage == "linked away":
        os.replace(images, copy / "elsewhere.npy")
        images.symlink_to("../elsewhere.npy")
    else:
        data = bytearray(labels.read_bytes())
        data[-8] = 99
        labels.write_bytes(data)
    named = {line.partition(":")[0] for line in run(copy, "shards", "verify", "out").err.splitlines()}
    assert named == {str((images if damage in ("cut", "swapped", "linked away") else labels).relative_to(copy))}
    for name in named:
        (copy / name).unlink()
    assert run(copy, *commands["sample"].line).status == 0
    (copy / "elsewhere.npy").unlink(missing_ok=True)
    assert expected.differing(copy) == []
