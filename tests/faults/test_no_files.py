"""Pipes, sockets, devices and links under the names of files: nothing waits for them, nothing is written through them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.artifacts import Lock, load_kept, read_json, sha256_file
from synthfast.data import ShardSet, open_images, summary, verify
from synthfast.data.formats.npy import map_npy
from synthfast.data.transfer.importing import open_in_order
from synthfast.errors import SynthfastError
from synthfast.scoring.groups import read_groups

REFUSED = "expected a file, found a pipe, a socket or a device; remove it"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"waited for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # the whole path may be too long for an address
    os.close(folder)


def device(path: Path) -> None:
    path.symlink_to(os.devnull)


KINDS = {"pipe": pipe, "socket": bound, "device": device}


def one_line(function, *arguments: object) -> str:
    with at_most(20), pytest.raises(SynthfastError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.mark.parametrize("name", ["0.png", "2.png"])
def test_in_a_folder_of_images(make, tmp_path, name):
    """As the first file, from which the set takes its shape, and as another."""
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    make(tmp_path / name)
    place = np.array([name > "1.png"], np.int64)

    def read() -> None:
        open_images(f"folder:{tmp_path}").read(place)

    def files() -> None:
        open_images(f"folder:{tmp_path}").encoded(place)

    assert one_line(read) == one_line(files) == f"{tmp_path / name}: {REFUSED}"


@pytest.mark.parametrize("kind", ["npz", "cifar-binary", "wds"])
def test_as_the_path_of_a_source(make, tmp_path, kind):
    names = {"npz": "a.npz", "cifar-binary": "data_batch_1.bin", "wds": "a.tar"}
    make(tmp_path / names[kind])
    for path in (tmp_path / names[kind], *(() if kind == "npz" else (tmp_path,))):
        for open_source in (open_images, lambda source: open_in_order(source, "data")):
            assert str(path) in one_line(open_source, f"{kind}:{path}")


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.images.npy", "shard-000001.labels.npy"])
def test_in_a_shard_folder(make, copy, name):
    path = copy / "shards" / name
    path.unlink()
    make(path)
    expected = "a link that leads out" if path.is_symlink() and name != "manifest.json" else "expected a file, found"
    assert expected in one_line(ShardSet, copy / "shards")
    if name == "manifest.json":
        for look in (summary, verify):
            assert one_line(look, copy / "shards") == f"{path}: {REFUSED}"
    else:
        with at_most(20):
            assert [line for line in verify(copy / "shards") if str(path) in line and expected in line]


def test_where_files_are_read_whole(make, tmp_path):
    readers = {
        "a.safetensors": (sha256_file, load_kept, lambda path: read_json(path, "thing")),
        "a.npy": (lambda path: map_npy(path, "<i8", (3,)), lambda path: read_groups(path, 3)),
        "a.csv": (lambda path: read_groups(path, 3),),
    }
    for name, reads in readers.items():
        make(tmp_path / name)
        for read in reads:
            assert one_line(read, tmp_path / name) == f"{tmp_path / name}: {REFUSED}"


def test_an_image_that_the_system_refuses_is_not_called_unreadable(tmp_path, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    images = open_images(f"folder:{tmp_path}")

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Image, "open", refuse)
    assert "1.png: this process has too many files open" in one_line(images.read, np.arange(1))


# Where a link or a pipe lies when a command starts, for each command that would write there.
TEMPORARY = {
    "sample": "out/.tmp-manifest.json",
    "sample-wds": "out/.tmp-manifest.json",
    "classifier": "out/.tmp-model.safetensors",
    "arc": "out.json.progress/.tmp-facts.json",
    "robust": "out.json.progress/.tmp-facts.json",
    "samples": "mine/.tmp-density_distance.npy",
    "select": ".tmp-out.npy",
    "report": ".tmp-out.html",
    "export-npz": ".tmp-out.npz",
    "export-folder": "out/.tmp-export.json",
}


@pytest.mark.parametrize("name", TEMPORARY)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_under_a_temporary_name(start, commands, reference, copy, name, kind):
    outside, place = copy.parent / "outside", copy / TEMPORARY[name]
    outside.write_text("untouched")
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside) if kind == "link" else os.mkfifo(place)
    running = start(copy, *commands[name].line)
    with at_most(120):
        running.wait()
    assert running.status == 0, running.err
    assert outside.read_text() == "untouched"
    assert reference(name).differing(copy) == []


def test_links_in_place_of_folders_are_not_followed(run, commands, copy):
    outside = copy.parent / "outside"
    outside.mkdir()
    assert run(copy, *commands["export-folder"].line).status == 0
    shutil.rmtree(copy / "out" / "1")
    (copy / "out" / "1").symlink_to(outside)
    ran = run(copy, *commands["export-folder"].line)
    assert ran.status == 1 and ran.error == "out/1: a link that leads out of the folder; remove it"
    shutil.rmtree(copy / "shards" / "scores")
    (copy / "shards" / "scores").symlink_to(outside)
    words = ("score", "samples", "--synthetic", "shards", "--scores", "density", "--device", "cpu")
    ran = run(copy, *words)
    assert ran.status == 1 and "scores: a link that leads elsewhere; remove it" in ran.error
    assert list(outside.iterdir()) == []


def test_the_lock_of_a_file_is_not_made_through_a_link(tmp_path):
    (tmp_path / ".tmp-out.npz.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SynthfastError, match=r"out\.npz: .*; choose another --out"):
        Lock(tmp_path / "out.npz")
    assert not (tmp_path / "elsewhere").exists()
