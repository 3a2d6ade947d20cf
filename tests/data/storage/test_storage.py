"""Shard folders at URLs, on fsspec's ``memory://``."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from synthfast.config import ExportConfig, ImportConfig, MergeConfig, SampleConfig, SplitConfig, StatsConfig
from synthfast.data import ShardFolder, ShardSet, open_images, summary, verify
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


def test_paths():
    for url in ("memory://x", "s3://bucket/a", "hf://datasets/a", "zip://a::b", "S3://x"):
        assert is_url(url) and place(f"{url}/") == url
    for path in ("runs/a", "/a", "digits:train", "npz:a.npz", "cifar-binary:a", "file:///a", "local:///a", "c:a", ""):
        assert not is_url(path) and isinstance(place(path), Path)
    assert place("file:///a/b") == place("/a/b") == Path("/a/b")
    assert join("memory://a/", "b") == "memory://a/b" and join(Path("/a"), "b") == Path("/a/b")
    assert place("memory://") == "memory://"


def test_a_folder_at_a_url_has_the_bytes_of_a_local_one(tmp_path, memory, write, format_values, contents, there):
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


def test_killed_before_any_change_the_next_run_completes(tmp_path, memory, write, format_values, there):
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


def test_an_upload_that_fails_is_one_line_and_the_next_run_goes_on(memory, write, request_values, there):
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


def test_a_shard_that_was_lost_is_made_again(memory, write, request_values, there):
    write(URL, request_values)
    expected = there(memory)
    memory.rm_file("/bucket/set/shard-000001.labels.npy")
    memory.pipe_file("/bucket/set/shard-000002.images.npy", b"cut")
    with ShardFolder.create_or_resume(URL, request_values) as folder:
        assert [span.index for span in folder.pending()] == [1, 2]
    write(URL, request_values)
    assert there(memory) == expected


def test_ranks_join_and_share_the_work(memory, write, request_values, there):
    write("memory://bucket/whole", request_values)
    with ShardFolder.create_or_resume(URL, request_values) as first:
        with ShardFolder.join(URL, request_values) as second:
            assert [span.index for span in second.pending()] == [0, 1, 2]
        with pytest.raises(SynthfastError, match="another process is writing this folder"):
            write(URL, request_values)
        assert not first.complete
    write(URL, request_values)
    assert there(memory) == there(memory, "/bucket/whole")


def test_another_request_or_strangers_are_refused(memory, write, request_values, there):
    write(URL, request_values)
    with pytest.raises(UsageError, match="--seed: memory://bucket/set was made with 0, this command says 1"):
        write(URL, {**request_values, "seed": 1})
    memory.pipe_file("/bucket/full/letter.txt", b"dear")
    with pytest.raises(UsageError, match=r"memory://bucket/full: holds files \(letter.txt\) but no manifest.json"):
        write("memory://bucket/full", request_values)
    assert there(memory, "/bucket/full") == {"letter.txt": b"dear"}


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
def test_sample_writes_to_a_url(tmp_path, memory, format, there):
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
