"""The life of a shard folder that is being written."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from synthfast.data import ShardFolder, ShardSet, verify
from synthfast.errors import SynthfastError, UsageError


def test_round_trip(shards, request_values, toy):
    images, labels = toy(request_values)
    read = ShardSet(shards)
    np.testing.assert_array_equal(read.read(np.arange(23)), images)
    np.testing.assert_array_equal(read.labels, labels)
    for file in sorted(shards.glob("*.npy")):  # and plain numpy reads the files
        assert len(np.load(file, allow_pickle=False)) in (10, 3)
    assert sorted(path.name for path in shards.iterdir()) == [
        "manifest.json",
        *(f"shard-00000{i}.{kind}.npy" for i in range(3) for kind in ("images", "labels")),
    ]


def test_set_without_labels(tmp_path, request_values, toy, write):
    request_values["classes"] = None
    write(tmp_path / "out", request_values)
    read = ShardSet(tmp_path / "out")
    assert read.labels is None and read.classes is None
    np.testing.assert_array_equal(read.read(np.arange(23)), toy(request_values)[0])
    assert not list((tmp_path / "out").glob("*labels*"))
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_batches_do_not_show_in_the_files(tmp_path, request_values, write, contents, shards, batch):
    write(tmp_path / "other", request_values, batch=batch)
    assert contents(tmp_path / "other") == contents(shards)


def test_appended_arrays_need_not_be_contiguous(tmp_path, request_values, toy, contents, shards):
    images, labels = toy(request_values)
    with ShardFolder.create_or_resume(tmp_path / "other", request_values) as folder:
        for span in folder.pending():
            rows = slice(span.first, span.first + span.count)
            with folder.writer(span.index) as writer:
                writer.append(np.asfortranarray(images[rows]), np.repeat(labels[rows], 2)[::2])
                writer.append(images[:0], labels[:0])
                writer.commit()
        folder.finish()
    assert contents(tmp_path / "other") == contents(shards)


def test_resume_keeps_finished_shards(tmp_path, request_values, write, contents, shards):
    out = tmp_path / "other"
    write(out, request_values, only=range(1, 2))
    kept = (out / "shard-000001.images.npy").stat()
    with ShardFolder.create_or_resume(out, request_values) as folder:
        assert [span.index for span in folder.pending()] == [0, 2] and not folder.complete
    write(out, request_values)
    assert (out / "shard-000001.images.npy").stat().st_ino == kept.st_ino
    assert contents(out) == contents(shards)


def test_complete_folder_has_nothing_to_do(shards, request_values, contents):
    before = contents(shards)
    with ShardFolder.create_or_resume(shards, request_values) as folder:
        assert folder.complete and list(folder.pending()) == []
        assert folder.finish().complete
    assert contents(shards) == before


@pytest.mark.parametrize("names", [["shard-000001.images.npy"], ["shard-000000.labels.npy", "shard-000002.images.npy"]])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"short")])
def test_lost_shards_of_a_complete_set_are_made_again(shards, request_values, write, contents, names, damage):
    before = contents(shards)
    for name in names:
        damage(shards / name)
    with ShardFolder.create_or_resume(shards, request_values) as folder:
        assert {f"shard-{span.index:06d}" for span in folder.pending()} == {name.partition(".")[0] for name in names}
    with pytest.raises(SynthfastError, match=f"incomplete, {3 - len(names)} of 3 shards are there"):
        ShardSet(shards)
    write(shards, request_values)
    assert contents(shards) == before


def test_finished_shard_whose_file_is_lost_is_made_again(tmp_path, request_values, write, contents, shards):
    out = tmp_path / "other"
    write(out, request_values, only=range(2))
    (out / "shard-000000.labels.npy").unlink()
    with ShardFolder.create_or_resume(out, request_values) as folder:
        assert [span.index for span in folder.pending()] == [0, 2]
    write(out, request_values)
    assert contents(out) == contents(shards)


def test_broken_sidecars_are_not_believed(tmp_path, request_values, write, contents, shards):
    out = tmp_path / "other"
    write(out, request_values, only=range(3))
    (out / "shard-000000.json").write_text("{")
    entry = json.loads((out / "shard-000001.json").read_text())
    entry["count"] = 9
    (out / "shard-000001.json").write_text(json.dumps(entry))
    (out / "shard-000009.json").write_text(json.dumps(entry))
    write(out, request_values)
    assert contents(out) == contents(shards)


def test_one_process_at_a_time(tmp_path, request_values):
    refused = pytest.raises(SynthfastError, match="another process is writing this folder")
    with ShardFolder.create_or_resume(tmp_path / "out", request_values), refused:
        ShardFolder.create_or_resume(tmp_path / "out", request_values)
    ShardFolder.create_or_resume(tmp_path / "out", request_values).close()
    with pytest.raises(UsageError):  # a failed start frees the lock as well
        ShardFolder.create_or_resume(tmp_path / "out", {**request_values, "n": 24})
    ShardFolder.create_or_resume(tmp_path / "out", request_values).close()


def test_file_system_without_locks_is_written_all_the_same(
    tmp_path, request_values, write, contents, shards, monkeypatch
):
    def no_lock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    write(tmp_path / "out", request_values)
    assert contents(tmp_path / "out") == contents(shards)


def test_ranks_share_the_shards(tmp_path, request_values, toy, contents, shards):
    images, labels = toy(request_values)
    out = tmp_path / "out"
    with ShardFolder.create_or_resume(out, request_values) as first, ShardFolder.join(out, request_values) as second:
        for rank, folder in enumerate((first, second)):
            for span in folder.pending():
                if span.index % 2 == rank:
                    rows = slice(span.first, span.first + span.count)
                    with folder.writer(span.index) as writer:
                        writer.append(images[rows], labels[rows])
                        writer.commit()
            if rank == 0:
                with pytest.raises(SynthfastError, match="2 of 3 shards are finished"):
                    first.finish()
        first.finish()
    assert contents(out) == contents(shards)


def test_join_checks_the_request(tmp_path, request_values):
    with pytest.raises(SynthfastError, match="no shard manifest here"):
        ShardFolder.join(tmp_path, request_values)
    ShardFolder.create_or_resume(tmp_path / "out", request_values).close()
    with pytest.raises(UsageError, match="seed"):
        ShardFolder.join(tmp_path / "out", {**request_values, "seed": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"^--seed: .*out was made with 0, this command says 1; repeat the command .* another --out"),
        ({"n": 24, "seed": 1}, "^n: .* was made with 23, this command says 24"),
        ({"solver": {"name": "heun", "steps": 19, "rho": 7.0}}, r"^solver\.steps: .* with 18, this command says 19"),
        ({"solver": {"name": "heun", "rho": 7.0}}, r"^solver\.steps: .* with 18, this command says nothing"),
        ({"guidance": 1.5}, r"^guidance: .* with nothing, this command says 1\.5"),
        ({"solver": "heun"}, r'^solver: .* with {"name": "heun", .*this command says "heun"'),
        ({"seed": False}, "^--seed: .* with 0, this command says false"),
        ({"classes": None}, "^classes: .* with 7, this command says nothing"),
    ],
)
@pytest.mark.parametrize("only", [None, range(1)])
def test_different_request_is_refused_and_changes_nothing(
    tmp_path, request_values, write, contents, change, message, only
):
    write(tmp_path / "out", request_values, only=only)
    (tmp_path / "out" / ".tmp-shard-000002.images.npy").write_bytes(b"half")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=message) as error:
        ShardFolder.create_or_resume(tmp_path / "out", {**request_values, **change}, options={"seed": "--seed"})
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "out") == before


def test_equal_requests_are_the_same_whatever_the_container(shards, request_values):
    request_values["shape"] = tuple(request_values["shape"])
    request_values["solver"] = dict(reversed(request_values["solver"].items()))
    request_values["solver"]["rho"] = 7
    with ShardFolder.create_or_resume(shards, request_values) as folder:
        assert folder.complete


def test_folder_with_other_files_is_refused(tmp_path, request_values):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / ".tmp-thesis.tex").write_text("also precious")
    with pytest.raises(UsageError, match=r"holds files \(.*thesis\.tex\) but no manifest\.json"):
        ShardFolder.create_or_resume(tmp_path, request_values)
    assert sorted(os.listdir(tmp_path)) == [".tmp-thesis.tex", "thesis.tex"]
    with pytest.raises(SynthfastError, match=r"thesis\.tex: .*another --out"):
        ShardFolder.create_or_resume(tmp_path / "thesis.tex", request_values)
    with pytest.raises(SynthfastError, match="another --out"):
        ShardFolder.create_or_resume(tmp_path / "thesis.tex" / "out", request_values)


def test_disk_full_while_writing(tmp_path, request_values, write, contents, shards):
    """A real limit on the file size stands for a full disk: the kernel refuses the write."""
    images = np.zeros((10, 4, 5, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ShardFolder.create_or_resume(tmp_path / "out", {**request_values, "n": 5000, "shard_size": 5000}) as folder:
        writer = folder.writer(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(
                SynthfastError, match=r"shard-000000\.images\.npy: .*limit.* run the same command again"
            ):
                for _ in range(500):
                    writer.append(images, np.zeros(10, np.int64))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "out") == ["manifest.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_file_system_error_at_any_commit_step(
    tmp_path, request_values, write, contents, shards, monkeypatch, code, function
):
    out, real = tmp_path / "out", getattr(os, function)
    ShardFolder.create_or_resume(out, request_values).close()
    for failing in range(3):
        calls = iter(range(100))

        def fail(*arguments, calls=calls, failing=failing):
            if next(calls) == failing:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(SynthfastError, match="run the same command again") as error:
                write(out, request_values)
        assert str(out) in str(error.value) and "\n" not in str(error.value)
        assert not list(out.glob(".tmp-*"))
    write(out, request_values)
    assert contents(out) == contents(shards)


def test_no_permission_is_one_line(tmp_path, request_values, monkeypatch):
    """Monkeypatched, because tests may run as root, who is never refused."""

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(SynthfastError, match="out: permission denied; choose another --out"):
            ShardFolder.create_or_resume(tmp_path / "out", request_values)
    with ShardFolder.create_or_resume(tmp_path / "out", request_values) as folder:
        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(SynthfastError, match=r"shard-000001\.images\.npy: permission denied"):
            folder.writer(1)


def test_wrong_calls_are_programmer_errors(tmp_path, request_values):
    images, labels = np.zeros((2, 4, 5, 3), np.uint8), np.zeros(2, np.int64)
    with ShardFolder.create_or_resume(tmp_path / "out", request_values) as folder:
        for index in (-1, 3):
            with pytest.raises(IndexError):
                folder.writer(index)
        with folder.writer(2) as writer:
            for bad in (
                (images.astype(np.float32), labels),
                (images[:, :3], labels),
                (images, None),
                (images, labels[:1]),
                (images, labels.astype(np.int32)),
                (images, labels - 1),
                (images, labels + 7),
                (np.zeros((4, 4, 5, 3), np.uint8), np.zeros(4, np.int64)),
            ):
                with pytest.raises(ValueError):
                    writer.append(*bad)
            writer.append(images, labels)
            with pytest.raises(ValueError, match="needs 3 images, 2 were appended"):
                writer.commit()
        assert os.listdir(folder.path) == ["manifest.json"]  # the writer was aborted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "'n' must be at least 1, found 0"),
        ({"shape": [4, 5]}, r"'shape' must be three positive integers \[H, W, C\], found \[4, 5\]"),
        ({"classes": 0}, "'classes' must be null or 1 to 1000000, found 0"),
        ({"shard_size": "10"}, "'shard_size' must be an integer, found \"10\""),
    ],
)
def test_request_without_sense_is_refused(tmp_path, request_values, change, message):
    with pytest.raises(SynthfastError, match=message):
        ShardFolder.create_or_resume(tmp_path / "out", {**request_values, **change})
    assert not list(tmp_path.glob("out/*"))


def test_memory_is_bounded(tmp_path, request_values):
    """Appending leaves nothing behind in the writer: what is on disk grows as it goes."""
    request_values.update(n=1000, shard_size=1000)
    with ShardFolder.create_or_resume(tmp_path / "out", request_values) as folder, folder.writer(0) as writer:
        for _ in range(99):
            writer.append(np.zeros((10, 4, 5, 3), np.uint8), np.zeros(10, np.int64))
        written = (tmp_path / "out" / ".tmp-shard-000000.images.npy").stat().st_size
        assert written > 990 * 60 - 2 * 8192
