"""Files of folders at URLs: fetched once, checked, kept, removed at the limit."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from synthfast.data import ShardSet, verify
from synthfast.data.storage import cache as remote_cache
from synthfast.data.storage.cache import fetch
from synthfast.errors import SynthfastError, UsageError

URL = "memory://bucket/set"


ALL = np.arange(23)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "shards").glob("*/*"))


def test_files_are_fetched_when_they_are_first_read_and_kept(tmp_path, memory, write, format_values):
    write(URL, format_values)
    images = ShardSet(URL)
    labels = [f"shard-{k:06d}.labels.npy" for k in range(3)]
    assert cached(tmp_path) == labels
    images.read(np.array([12, 15]))
    data = ["images.npy"] if "format" not in format_values else ["idx", "tar"]
    assert cached(tmp_path) == sorted([*labels, *(f"shard-000001.{kind}" for kind in data)])
    for file in memory.find("/bucket/set"):
        if not file.endswith("manifest.json"):
            memory.rm_file(file)
    again = ShardSet(URL)
    np.testing.assert_array_equal(again.read(np.array([12, 15])), images.read(np.array([12, 15])))
    with pytest.raises(
        SynthfastError, match=r"memory://bucket/set/shard-000000\..*: missing, though the manifest names it"
    ):
        again.read(np.array([0]))


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "too long", "missing", "swapped"])
@pytest.mark.parametrize("name", ["shard-000001.images.npy", "shard-000001.labels.npy"])
def test_damage_is_found_on_arrival_and_by_verify(tmp_path, memory, write, request_values, damage, name):
    write(URL, request_values)
    assert verify(URL) == []
    path = f"/bucket/set/{name}"
    data = bytearray(memory.cat_file(path))
    if damage == "missing":
        memory.rm_file(path)
    elif damage == "swapped":
        memory.pipe_file(path, memory.cat_file(path.replace("000001", "000000")))
    else:
        data[-1] ^= 1
        changed = {"a flipped bit": data, "cut short": data[:-1], "too long": data + b"x"}[damage]
        memory.pipe_file(path, bytes(changed))
    with pytest.raises(SynthfastError, match=rf"memory://bucket/set/{name}: ") as error:
        ShardSet(URL).read(ALL)
    assert "\n" not in str(error.value)
    assert name not in cached(tmp_path)
    [problem] = verify(URL)
    assert problem.startswith(f"{URL}/{name}: ")
    expected = {"missing": "missing", "swapped": "holds what belongs in shard-000000", "a flipped bit": "SHA-256"}
    assert expected.get(damage, "bytes") in problem


def test_one_file_fetched_by_many_at_once(tmp_path, memory, write, request_values):
    """Threads here; each fetch has a name of its own until the file is whole and right."""
    from concurrent.futures import ThreadPoolExecutor

    write(URL, request_values)
    entry = ShardSet(URL).manifest.shards[0].parts["images"]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: fetch(URL, entry), range(32)))
    [path] = paths
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
    assert [file.name for file in path.parent.iterdir()] == [entry.file]


def _fetch_slowly(folder: Path, cache: Path) -> None:
    os.environ["SYNTHFAST_CACHE"] = str(cache)
    files = fsspec.filesystem("memory")
    for file in folder.iterdir():
        files.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    images = ShardSet(URL)
    for _ in range(3):
        images.read(np.arange(len(images)))
    os._exit(0 if len(images) == 23 else 1)


def test_processes_fetch_into_one_cache(tmp_path, write, request_values):
    write(tmp_path / "local", request_values)
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "local", tmp_path / "shared")
    workers = [context.Process(target=_fetch_slowly, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    found = sorted(path.name for path in (tmp_path / "shared" / "shards").glob("*/*"))
    assert found == sorted(f"shard-{k:06d}.{kind}.npy" for k in range(3) for kind in ("images", "labels"))


def test_what_killed_fetches_left_is_removed_after_a_day(tmp_path, write, request_values):
    write(URL, request_values)
    entry = ShardSet(URL).manifest.shards[0].parts["images"]
    folder = tmp_path / "cache" / "shards" / entry.sha256
    folder.mkdir(parents=True)
    for name, age in ((".tmp-1-a", 2 * 24 * 3600), (".tmp-2-b", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    fetch(URL, entry)
    assert sorted(path.name for path in folder.iterdir()) == [".tmp-2-b", entry.file]


@pytest.mark.parametrize("limit", ["1300", "1.3K", "0.0000013 GB"])
def test_the_limit_removes_what_was_not_used_for_longest(tmp_path, monkeypatch, write, request_values, limit):
    """A shard of 10 toy images takes 728 bytes; what this process has asked for stays."""
    write(URL, {**request_values, "classes": None})
    files = [entry.parts["images"] for entry in ShardSet(URL).manifest.shards]
    for age, file in ((300, files[0]), (900, files[1])):
        path = fetch(URL, file)
        os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(remote_cache, "_asked_for", set())  # as in a new process
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", limit)
    fetch(URL, files[2])
    assert cached(tmp_path) == ["shard-000000.images.npy", "shard-000002.images.npy"]
    fetch(URL, files[1])
    assert cached(tmp_path) == ["shard-000001.images.npy", "shard-000002.images.npy"]
    fetch(URL, files[0])
    assert len(cached(tmp_path)) == 3  # all in use


def test_a_file_that_was_used_again_is_kept_longer(tmp_path, monkeypatch, write, request_values):
    write(URL, {**request_values, "classes": None})
    files = [entry.parts["images"] for entry in ShardSet(URL).manifest.shards]
    for age, file in ((300, files[0]), (900, files[1])):
        path = fetch(URL, file)
        os.utime(path, (time.time() - age,) * 2)
    fetch(URL, files[1])
    monkeypatch.setattr(remote_cache, "_asked_for", set())
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "1300")
    fetch(URL, files[2])
    assert cached(tmp_path) == ["shard-000001.images.npy", "shard-000002.images.npy"]


@pytest.fixture
def files_of(memory):
    """``files_of(40)``: as many files of 1,000 bytes at the URL."""

    def make(count: int) -> list[SimpleNamespace]:
        found = []
        for number in range(count):
            data = number.to_bytes(4, "big") * 250
            memory.pipe_file(f"/bucket/set/{number}", data)
            found.append(SimpleNamespace(file=str(number), sha256=hashlib.sha256(data).hexdigest(), bytes=1000))
        return found

    return make


def test_the_cache_is_listed_only_when_the_limit_is_passed(tmp_path, monkeypatch, files_of):
    """And not at every fetch where all of it is in use, nor where it is full."""

    def kept() -> int:
        return sum(len(names) for where, _, names in os.walk(root) if where != str(root))

    root = tmp_path / "cache" / "shards"
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "64K")
    listings, glob = [], Path.glob

    def listed(self, pattern):
        listings.append(pattern)
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", listed)
    files = files_of(300)
    for file in files[:64]:
        fetch(URL, file)
    assert listings.count("*/*") == 1  # the first fetch of an empty cache
    for file in files[64:100]:
        fetch(URL, file)
    assert kept() == 100 and listings.count("*/*") <= 2 + 36 // 4  # all in use
    monkeypatch.setattr(remote_cache, "_in_use", {})
    listings.clear()
    for file in files[100:]:
        monkeypatch.setattr(remote_cache, "_asked_for", set())  # each as a process of its own, that keeps nothing
        fetch(URL, file)
        assert kept() <= 64 and (root / file.sha256 / file.file).exists()
    assert listings.count("*/*") <= 1 + 200 // 4


@pytest.mark.parametrize("text", ["", "x", "-3", "9" * 40, "0"])
def test_a_count_that_is_wrong_is_right_after_the_next_listing(tmp_path, monkeypatch, files_of, text):
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "8000")
    files = files_of(40)
    for file in files[:6]:
        fetch(URL, file)
    count = tmp_path / "cache" / "shards" / ".bytes"
    assert count.read_text() == "6000"
    count.write_text(text)
    for file in files[6:]:
        monkeypatch.setattr(remote_cache, "_asked_for", set())
        fetch(URL, file)
    assert int(count.read_text()) == 1000 * len(cached(tmp_path)) <= 8000


def test_what_is_fetched_without_a_limit_counts_for_who_has_one(tmp_path, monkeypatch, files_of):
    files = files_of(20)
    fetch(URL, files[0])
    assert not (tmp_path / "cache" / "shards" / ".bytes").exists()
    for number, file in enumerate(files[1:]):
        monkeypatch.setattr(remote_cache, "_asked_for", set())
        if number % 9 == 0:
            monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "9000")
        fetch(URL, file)
        monkeypatch.delenv("SYNTHFAST_CACHE_LIMIT", raising=False)
    assert len(cached(tmp_path)) <= 9


def test_a_folder_that_another_process_removes_meanwhile_is_made_again(tmp_path, monkeypatch, files_of):
    [file] = files_of(1)
    real, made = remote_cache.make_folder, []

    def make_folder(path, *hint):
        real(path, *hint)
        if not made:
            path.rmdir()
        made.append(path)

    monkeypatch.setattr(remote_cache, "make_folder", make_folder)
    assert fetch(URL, file).stat().st_size == 1000 and len(made) == 2


def _fetch_many(files: list[SimpleNamespace]) -> None:
    for file in files:
        remote_cache._asked_for.clear()
        fetch(URL, file)
    os._exit(0)


def test_several_processes_keep_one_limit(tmp_path, monkeypatch, files_of):
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "40K")
    files = files_of(200)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fetch_many, args=(files[k::4],)) for k in range(4)]
    for worker in workers:
        worker.start()
    most, root = 0, tmp_path / "cache" / "shards"
    while any(worker.is_alive() for worker in workers):
        most = max(most, sum(len(names) for where, _, names in os.walk(root) if where != str(root)))
        time.sleep(0.005)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert most <= 40 + 4 * 2  # and what arrives at that moment
    counted, held = int((root / ".bytes").read_text()), 1000 * len(cached(tmp_path))
    assert held <= 40_000
    assert (
        held <= counted <= held + 4 * 1000
    )  # a file may be listed before it is counted: too much, until the next listing


def test_a_file_without_end_is_not_fetched_to_its_end(monkeypatch, write, request_values):
    write(URL, request_values)
    entry = ShardSet(URL).manifest.shards[0].parts["images"]

    def endless(folder, name):
        yield from (b"x" * 100 for _ in range(10))
        raise AssertionError("read on, though more has come than there may be")

    monkeypatch.setattr(remote_cache, "_chunks", endless)
    with pytest.raises(SynthfastError, match=f"expected {entry.bytes} bytes, found more than {entry.bytes}"):
        fetch(URL, entry)


def test_a_cache_that_cannot_be_made_names_its_variable(tmp_path, monkeypatch, write, request_values):
    write(URL, request_values)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SYNTHFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(SynthfastError, match=r"file/shards/.*set SYNTHFAST_CACHE to a folder elsewhere"):
        fetch(URL, ShardSet(URL).manifest.shards[0].parts["images"])


def test_a_limit_that_is_no_size_is_one_line(monkeypatch, write, request_values):
    write(URL, request_values)
    monkeypatch.setenv("SYNTHFAST_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="SYNTHFAST_CACHE_LIMIT=much: expected bytes, or a size such as 200GB"):
        ShardSet(URL)
