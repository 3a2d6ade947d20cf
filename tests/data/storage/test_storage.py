"""Shard folders at URLs, on fsspec's ``memory://``."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from synthfast.config import ExportConfig, ImportConfig, MergeConfig, SampleConfig, SplitConfig, StatsConfig
from synthfast.data import ShardFolder, ShardSet, open_images, summary, verify
from synthfast.data.storage import cache as remote_cache
from synthfast.data.storage import lock as remote_lock
from synthfast.data.storage.cache import fetch
from synthfast.data.storage.lock import RemoteLock, is_claim
from synthfast.data.storage.places import is_url, join, place, remote, sizes
from synthfast.data.transfer.exporting import export_images
from synthfast.data.transfer.importing import import_images
from synthfast.data.transfer.merging import merge
from synthfast.data.transfer.splitting import split
from synthfast.data.transfer.statistics import statistics
from synthfast.errors import SynthfastError, UsageError

URL = "memory://bucket/set"
ALL = np.arange(23)


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """An empty memory:// and an empty cache."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    monkeypatch.setenv("SYNTHFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SYNTHFAST_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(remote_cache, "_asked_for", set())
    monkeypatch.setattr(remote_cache, "_in_use", {})
    monkeypatch.setattr(remote_lock, "_MOST_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield files
    assert not list(tmp_path.glob("synthfast-*")), "staging folders were left"


@pytest.fixture(params=["npy", "wds"])
def format_values(request, request_values) -> dict:
    """The toy request in either format."""
    return request_values if request.param == "npy" else {**request_values, "format": "wds", "codec": "png"}


def there(memory, folder: str = "/bucket/set") -> dict[str, bytes]:
    return {path.removeprefix(f"{folder}/"): memory.cat_file(path) for path in sorted(memory.find(folder))}


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "shards").glob("*/*"))


def test_paths():
    for url in ("memory://x", "s3://bucket/a", "hf://datasets/a", "zip://a::b", "S3://x"):
        assert is_url(url) and place(f"{url}/") == url
    for path in ("runs/a", "/a", "digits:train", "npz:a.npz", "cifar-binary:a", "file:///a", "local:///a", "c:a", ""):
        assert not is_url(path) and isinstance(place(path), Path)
    assert place("file:///a/b") == place("/a/b") == Path("/a/b")
    assert join("memory://a/", "b") == "memory://a/b" and join(Path("/a"), "b") == Path("/a/b")
    assert place("memory://") == "memory://"


def test_a_folder_at_a_url_has_the_bytes_of_a_local_one(tmp_path, memory, write, format_values, contents):
    write(tmp_path / "local", format_values)
    write(URL, format_values)
    assert there(memory) == contents(tmp_path / "local")


def test_reading_is_as_from_the_disk(tmp_path, write, format_values, toy):
    write(URL, format_values)
    pixels, labels = toy(format_values)
    for images in (ShardSet(URL), open_images(URL), ShardSet(f"{URL}/"), pickle.loads(pickle.dumps(ShardSet(URL)))):
        assert (images.name.rstrip("/"), images.path, images.shape, images.classes) == (URL, URL, (4, 5, 3), 7)
        np.testing.assert_array_equal(images.labels, labels)
        rows = np.array([22, 0, 11, 11, 5])
        np.testing.assert_array_equal(images.read(rows), pixels[rows])
    write(tmp_path / "local", format_values)
    assert ShardSet(URL).fingerprint() == ShardSet(tmp_path / "local").fingerprint()
    assert summary(URL) == {**summary(tmp_path / "local"), "path": URL}


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


def test_what_loaders_map_is_fetched(tmp_path, write, request_values, toy):
    write(URL, request_values)
    images = ShardSet(URL)
    assert len(images.arrays) == 3 and [len(array) for array in images.arrays] == [10, 10, 3]
    np.testing.assert_array_equal(images.arrays[-1], toy(request_values)[0][20:])
    assert len(images.arrays[1:]) == 2 and images.arrays[1] is images.arrays[1]
    with pytest.raises(IndexError):
        images.arrays[3]
    wds = {**request_values, "format": "wds", "codec": "png"}
    write("memory://bucket/tars", wds)
    tars = ShardSet("memory://bucket/tars")
    assert [path.name for path in tars.tar_paths] == [f"shard-{k:06d}.tar" for k in range(3)]
    assert all(path.is_file() for path in [*tars.tar_paths, *tars.index_paths])
    assert len(tars.encoded(ALL)) == 23


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


def test_verify_reads_what_is_there_and_not_the_cache(memory, write, request_values):
    write(URL, request_values)
    ShardSet(URL).read(ALL)
    data = bytearray(memory.cat_file("/bucket/set/shard-000000.images.npy"))
    data[-1] ^= 1
    memory.pipe_file("/bucket/set/shard-000000.images.npy", bytes(data))
    memory.pipe_file("/bucket/set/shard-000009.images.npy", b"")
    assert [problem.partition(": ")[0] for problem in verify(URL)] == [
        f"{URL}/shard-000000.images.npy",
        f"{URL}/shard-000009.images.npy",
    ]


class Killed(BaseException):
    pass


def kill_at(memory, patch: pytest.MonkeyPatch, step: int | None) -> list[str]:
    """Record every change at the URL, and be killed just before change number ``step``."""
    done: list[str] = []

    def watch(name: str) -> None:
        real = getattr(memory, name)

        def watched(*arguments, **options):
            if len(done) == step:
                raise Killed
            file = str(arguments[-1] if name == "put_file" else arguments[0]).rpartition("/")[2]
            done.append(f"{name} {'the claim' if is_claim(file) else file}")
            return real(*arguments, **options)

        patch.setattr(type(memory), name, lambda self, *arguments, **options: watched(*arguments, **options))

    for name in ("pipe_file", "put_file", "rm_file"):
        watch(name)
    return done


def test_sidecars_come_after_their_files_and_the_manifest_last(memory, write, request_values):
    with pytest.MonkeyPatch.context() as patch:
        done = kill_at(memory, patch, None)
        write(URL, request_values)
    shards = [f"shard-00000{k}{end}" for k in range(3) for end in (".images.npy", ".labels.npy", ".json")]
    assert done == [
        "pipe_file the claim",
        "pipe_file manifest.json",
        *(f"put_file {name}" for name in shards),
        "pipe_file manifest.json",
        *(f"rm_file shard-00000{k}.json" for k in range(3)),
        "rm_file the claim",
    ]


def test_killed_before_any_change_the_next_run_completes(tmp_path, memory, write, format_values):
    """The killed process's lock is left behind; the next run of the same host sees that it is dead."""
    write(URL, format_values)
    expected = there(memory)
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at(memory, patch, None)
        write("memory://bucket/counted", format_values)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for step in range(len(steps) - 1):
        url = f"memory://bucket/killed-{step}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(memory, patch, step)
            patch.setattr(RemoteLock, "close", lambda self: None)
            with pytest.raises(Killed):
                write(url, format_values)
        found = there(memory, f"/bucket/killed-{step}")
        for claim in filter(is_claim, found):
            lock = {**json.loads(found[claim]), "pid": dead.pid}
            memory.pipe_file(f"/bucket/killed-{step}/{claim}", json.dumps(lock).encode())
        if "manifest.json" in found and not json.loads(found["manifest.json"])["complete"]:
            with pytest.raises(SynthfastError, match="incomplete"):
                ShardSet(url)
        with ShardFolder.create_or_resume(url, format_values) as folder:
            finished = sum(name.startswith("put_file") and name.endswith(".json") for name in steps[:step])
            complete = any(name.startswith("rm_file shard") for name in steps[: step + 1])
            assert len(list(folder.pending())) == (0 if complete else 3 - finished)
        write(url, format_values)
        assert there(memory, f"/bucket/killed-{step}") == expected


def test_an_upload_that_fails_is_one_line_and_the_next_run_goes_on(memory, write, request_values):
    with pytest.MonkeyPatch.context() as patch:

        def refuse(self, local, path, **options):
            if "000001" in str(path):
                raise RuntimeError("AccessDenied: quota\nexceeded")
            return fsspec.AbstractFileSystem.put_file(self, local, path, **options)

        patch.setattr(type(memory), "put_file", refuse)
        with pytest.raises(SynthfastError, match="memory://bucket/set: AccessDenied: quota exceeded; check the URL"):
            write(URL, request_values)
    assert sorted(there(memory)) == [
        "manifest.json",
        "shard-000000.images.npy",
        "shard-000000.json",
        "shard-000000.labels.npy",
    ]
    write(URL, request_values)
    assert verify(URL) == []


def test_a_shard_that_was_lost_is_made_again(memory, write, request_values):
    write(URL, request_values)
    expected = there(memory)
    memory.rm_file("/bucket/set/shard-000001.labels.npy")
    memory.pipe_file("/bucket/set/shard-000002.images.npy", b"cut")
    with ShardFolder.create_or_resume(URL, request_values) as folder:
        assert [span.index for span in folder.pending()] == [1, 2]
    write(URL, request_values)
    assert there(memory) == expected


def test_ranks_join_and_share_the_work(memory, write, request_values):
    write("memory://bucket/whole", request_values)
    with ShardFolder.create_or_resume(URL, request_values) as first:
        with ShardFolder.join(URL, request_values) as second:
            assert [span.index for span in second.pending()] == [0, 1, 2]
        with pytest.raises(SynthfastError, match="another process is writing this folder"):
            write(URL, request_values)
        assert not first.complete
    write(URL, request_values)
    assert there(memory) == there(memory, "/bucket/whole")


def test_another_request_or_strangers_are_refused(memory, write, request_values):
    write(URL, request_values)
    with pytest.raises(UsageError, match="--seed: memory://bucket/set was made with 0, this command says 1"):
        write(URL, {**request_values, "seed": 1})
    memory.pipe_file("/bucket/full/letter.txt", b"dear")
    with pytest.raises(UsageError, match=r"memory://bucket/full: holds files \(letter.txt\) but no manifest.json"):
        write("memory://bucket/full", request_values)
    assert there(memory, "/bucket/full") == {"letter.txt": b"dear"}


def test_the_lock_says_who_holds_it_and_how_to_be_rid_of_it(memory):
    lock = RemoteLock(URL)
    message = (
        rf"memory://bucket/set: another process is writing this folder \(process {os.getpid()} on {socket.gethostname()} since "
        r"\d{4}-.*Z\); wait for it to end, or if it is dead remove memory://bucket/set/"
    )
    with pytest.raises(SynthfastError, match=message) as error:
        RemoteLock(URL)
    assert [str(error.value).rpartition("/")[2]] == list(there(memory))
    lock.close()
    lock.close()
    RemoteLock(URL).close()
    assert there(memory) == {}


CLAIM = "/bucket/set/.synthfast-lock-0123456789abcdef.json"


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_a_lock_of_another_host_is_not_taken_over(memory, key):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = {**remote_lock._process(), "pid": dead.pid, "time": "2026-01-01T00:00:00Z"}
    memory.pipe_file(CLAIM, json.dumps({**lock, key: "elsewhere"}).encode())
    with pytest.raises(SynthfastError, match=f"process {dead.pid} on .* since 2026-01-01T00:00:00Z"):
        RemoteLock(URL)
    memory.pipe_file(CLAIM, json.dumps(lock).encode())
    RemoteLock(URL).close()
    assert there(memory) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"pid": "1"}', b'{"pid": -1}', b'{"pid": 1e400}'])
def test_a_lock_that_says_nothing_is_respected(memory, content):
    here = json.dumps(remote_lock._process())[:-1] + ", "
    if content.startswith(b'{"pid"'):
        content = here.encode() + content[1:]
    memory.pipe_file(CLAIM, content)
    with pytest.raises(SynthfastError, match="another process is writing this folder"):
        RemoteLock(URL)


def steps_of_two(memory, order: list[int]) -> list[bool]:
    """Two processes that want the lock at once, each stopped before every step at the storage; ``order`` says whose turn it is,
    until one is through. Who has got it?"""
    turn, got = [threading.Semaphore(0) for _ in range(2)], [False, False]
    arrived, mine = [threading.Event(), threading.Event()], threading.local()
    real = {name: getattr(type(memory), name) for name in ("ls", "pipe_file", "rm_file", "cat_file")}

    def stop() -> None:
        arrived[mine.number].set()
        turn[mine.number].acquire()

    def stopping(name: str):
        def step(self, *arguments, **options):
            stop()
            return real[name](self, *arguments, **options)

        return step

    def want(number: int) -> None:
        mine.number = number
        try:
            RemoteLock(URL)
            got[number] = True
        except SynthfastError:
            pass
        finally:
            arrived[number].set()

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(type(memory), name, stopping(name))
        threads = [threading.Thread(target=want, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for number in order:
            arrived[number].wait(10)
            if threads[number].is_alive():
                arrived[number].clear()
                turn[number].release()
        for number in range(2):  # then each to its end
            for _ in range(100):
                turn[number].release()
            threads[number].join(10)
            assert not threads[number].is_alive()
    return got


@pytest.mark.parametrize("dead", [False, True])
def test_of_two_at_once_at_most_one_gets_it_in_whatever_order_they_go(memory, dead):
    """Every order of the first six steps of each; with a claim that a killed process left, or without."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = json.dumps({**remote_lock._process(), "pid": gone.pid}).encode()
    orders = [[int(k in first) for k in range(12)] for first in itertools.combinations(range(12), 6)]
    results = []
    for order in random.Random(0).sample(orders, 150):
        memory.store.clear()
        if dead:
            memory.pipe_file(CLAIM, left)
        results.append(sum(steps_of_two(memory, order)))
    assert max(results) == 1 and results.count(0) < 15


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


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://a/b", "foo://a/b: the protocol 'foo' is not known; expected a local path, or one such as s3://"),
        ("memory://", "memory://: not a URL of one protocol and a path; expected"),
        ("zip://a::memory://b", "zip://a::memory://b: not a URL of one protocol and a path; expected a local path"),
        ("memory://none", "memory://none/manifest.json: no shard manifest here; check the path"),
    ],
)
def test_urls_that_lead_nowhere_are_one_line(url, message):
    for act in (ShardSet, verify, summary, open_images):
        with pytest.raises(SynthfastError) as error:
            act(url)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SynthfastError, match=r"s3:// needs a package that is not installed \(Install s3fs"):
        ShardSet("s3://bucket/set")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SynthfastError, match="needs the package fsspec; install it with pip install fsspec"):
        ShardSet(URL)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "no such file, folder or bucket; check the URL"),
        (PermissionError("Access Denied"), r"permission denied \(Access Denied\); check the credentials"),
        (OSError(28, "No space left on device"), "the disk is full; free some space"),
        (RuntimeError("two\nlines"), "two lines; check the URL, the connection and the credentials"),
        (NotImplementedError(), "this storage can not be written to; take another"),
    ],
)
def test_what_a_storage_raises_is_one_line(memory, monkeypatch, write, request_values, error, message):
    def fail(self, *arguments, **options):
        raise error

    monkeypatch.setattr(type(memory), "makedirs", fail)
    with pytest.raises(SynthfastError, match=f"^{URL}: {message}$"):
        write(URL, request_values)


def test_mistakes_of_the_program_and_interruptions_are_not_hidden():
    for error in (KeyboardInterrupt, Killed, MemoryError):
        with pytest.raises(error), remote(URL):
            raise error


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format": 99}'])
def test_a_hostile_manifest_is_one_line(memory, content):
    memory.pipe_file("/bucket/set/manifest.json", content)
    with pytest.raises(SynthfastError, match=f"^{URL}/manifest.json: ") as error:
        ShardSet(URL)
    assert "\n" not in str(error.value)


def test_file_urls_are_local_paths(tmp_path, write, request_values):
    write(f"file://{tmp_path}/set", request_values)
    assert ShardSet(f"file://{tmp_path}/set").path == tmp_path / "set"
    assert open_images(f"file://{tmp_path}/set").path == tmp_path / "set"
    export_images(ExportConfig(source=(f"file://{tmp_path}/set",), to="npz", out=f"file://{tmp_path}/a.npz"))
    assert (tmp_path / "a.npz").is_file() and (tmp_path / "set" / "manifest.json").is_file()
    assert sizes(place(f"file://{tmp_path}/none")) == {}


def test_a_folder_that_is_being_written_is_listed_without_what_is_gone_again(tmp_path, monkeypatch):
    """Temporary files get their names at any moment: also between the listing and the look at their size."""
    for name in ("a", ".tmp-b", "c"):
        (tmp_path / name).write_bytes(b"123")
    scandir = os.scandir

    class Listing(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def listed(path):
        with scandir(path) as entries:
            found = Listing(entries)
        os.replace(tmp_path / ".tmp-b", tmp_path / "b")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", listed)
        assert sizes(tmp_path) == {"a": 3, "c": 3}


@pytest.mark.parametrize("format", ["npy", "wds"])
def test_sample_writes_to_a_url(tmp_path, memory, format):
    from synthfast.distributed import Ranks
    from synthfast.sampling.generate import generate

    options = {"n": 23, "shard_size": 10, "steps": 1, "batch_size": 8, "device": "cpu", "format": format}
    results = []
    for out in (URL, str(tmp_path / "local"), URL):
        with Ranks("cpu") as ranks:
            results.append(generate(SampleConfig(out=out, **options), ranks))
    assert [(result.kept, result.made) for result in results] == [(0, 23), (0, 23), (23, 0)]
    assert results[0].preview == f"{URL}/preview.png"
    assert there(memory) == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def test_every_command_of_shards_takes_urls(tmp_path, memory, write, request_values, toy):
    write(URL, request_values)
    pixels, labels = toy(request_values)
    export_images(ExportConfig(source=(URL,), to="wds", out="memory://bucket/wds", shard_size=10))
    import_images(ImportConfig(source=("memory://bucket/wds",), out="memory://bucket/back", shard_size=10))
    merge(MergeConfig(parts=(URL, "memory://bucket/back"), out="memory://bucket/two"))
    split(SplitConfig(source=("memory://bucket/two",), parts=2, out="memory://bucket/part"))
    for url in ("memory://bucket/back", "memory://bucket/part-0", "memory://bucket/part-1"):
        images = ShardSet(url)
        np.testing.assert_array_equal(images.read(ALL), pixels)
        np.testing.assert_array_equal(images.labels, labels)
        assert verify(url) == []
    assert statistics(StatsConfig(source=("memory://bucket/two",)))["duplicate_images"] == 23
    export_images(ExportConfig(source=(URL,), to="npz", out=str(tmp_path / "a.npz")))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["image"], pixels)
    for to, out in (("npz", "memory://a.npz"), ("folder", "memory://a"), ("cifar", "memory://a")):
        with pytest.raises(UsageError, match="only shards are written to URLs; export to a local path"):
            export_images(ExportConfig(source=(URL,), to=to, out=out))


def test_scores_need_a_folder_here(write, request_values):
    from synthfast.selection.score_files import ScoreFolder

    write(URL, request_values)
    with pytest.raises(UsageError, match="scores are not kept at URLs; give --scores-folder"):
        ScoreFolder(ShardSet(URL))
