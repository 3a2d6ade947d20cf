"""Shard folders of WebDataset tars: written, read, verified, and read by webdataset and DALI."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthfast.data import ShardFolder, ShardSet, summary, verify
from synthfast.errors import SynthfastError, UsageError

WDS = {"format": "wds", "codec": "png"}
SHAPES = [[8, 8, 1], [4, 5, 3], [32, 32, 3], [33, 17, 1], [70, 65, 3]]
FILES = [f"shard-00000{i}.{kind}" for i in range(3) for kind in ("tar", "idx", "labels.npy")]


@pytest.fixture
def wds_request(request_values) -> dict[str, Any]:
    return {**request_values, **WDS}


@pytest.fixture
def tars(tmp_path, wds_request, write) -> Path:
    """A complete folder of three shards: 10, 10 and 3 images."""
    write(tmp_path / "tars", wds_request)
    return tmp_path / "tars"


def rehash(folder: Path, index: int, role: str) -> None:
    """Make the manifest agree with a changed file, as somebody who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = manifest["shards"][index][role]
    data = (folder / file["file"]).read_bytes()
    file.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("classes", [7, 300, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(tmp_path, wds_request, write, toy, shape, classes):
    wds_request.update(shape=shape, classes=classes)
    write(tmp_path / "out", wds_request)
    images, labels = toy(wds_request)
    read = ShardSet(tmp_path / "out")
    assert (read.format, read.codec, read.shape, read.classes, len(read)) == ("wds", "png", tuple(shape), classes, 23)
    assert read.arrays == [] and not read.lossy
    np.testing.assert_array_equal(read.read(np.arange(23)), images)
    order = np.array([22, 0, 11, 11, 9, 10])
    np.testing.assert_array_equal(read.read(order), images[order])
    assert read.read(order[:0]).shape == (0, *shape)
    if classes is None:
        assert read.labels is None and not list((tmp_path / "out").glob("*.npy"))
    else:
        np.testing.assert_array_equal(read.labels, labels)
    assert verify(tmp_path / "out") == []


def test_files_of_a_folder(tars, wds_request, toy):
    assert sorted(path.name for path in tars.iterdir()) == sorted(["manifest.json", *FILES])
    read = ShardSet(tars)
    assert read.tar_paths == [tars / name for name in FILES[::3]]
    assert read.index_paths == [tars / name for name in FILES[1::3]]
    images, labels = toy(wds_request)
    number = 0
    for path, index in zip(read.tar_paths, read.index_paths, strict=True):
        lines = iter(index.read_text().splitlines()[1:])
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name == f"{number:09d}.png" and label.name == f"{number:09d}.cls"
                with Image.open(tar.extractfile(image)) as opened:
                    np.testing.assert_array_equal(np.asarray(opened), images[number])
                assert tar.extractfile(label).read() == str(labels[number]).encode()
                words = [f"{m.name[10:]} {m.offset_data} {m.size} {m.name}" for m in (image, label)]
                assert next(lines) == " ".join(words)
                number += 1
    assert number == 23


def test_encoded_are_the_members(tars, wds_request, toy):
    read, images = ShardSet(tars), toy(wds_request)[0]
    files = read.encoded(np.array([22, 3, 3, 10]))
    for file, number in zip(files, (22, 3, 3, 10), strict=True):
        assert isinstance(file, bytes)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), images[number])
    with pytest.raises(IndexError, match=r"indices must be in \[0, 23\)"):
        read.encoded(np.array([23]))


def test_a_folder_of_arrays_has_no_tars(shards):
    read = ShardSet(shards)
    assert (read.format, read.codec, read.lossy, len(read.arrays)) == ("npy", None, False, 3)
    for ask in (lambda: read.encoded(np.arange(2)), lambda: read.tar_paths, lambda: read.index_paths):
        with pytest.raises(TypeError, match="holds npy arrays, not tars"):
            ask()


def test_arrays_are_written_as_before(tmp_path, request_values, write, contents):
    """The bytes that were written when npy was the only format."""
    expected = {
        7: "b2039d67c3cc764651cab30db785a3a8df4e9e57e0161a0f014050e21df70397",
        None: "a4491195ac67ec5297f7e3185154ddd09e1cc76f4a6ffc3f97495740c4a1adf3",
    }
    for classes, digest in expected.items():
        write(tmp_path / str(classes), {**request_values, "classes": classes})
        found = hashlib.sha256()
        for name, data in sorted(contents(tmp_path / str(classes)).items()):
            found.update(name.encode() + data)
        assert found.hexdigest() == digest


def test_jpg(tmp_path, wds_request, write, toy):
    wds_request.update(codec="jpg", quality=95, shape=[32, 32, 3])
    write(tmp_path / "out", wds_request)
    read, images = ShardSet(tmp_path / "out"), toy(wds_request)[0]
    assert (read.codec, read.lossy) == ("jpg", True)
    expected = [np.asarray(Image.open(io.BytesIO(file))) for file in read.encoded(np.arange(23))]
    found = read.read(np.arange(23))
    np.testing.assert_array_equal(found, expected)
    assert 0 < np.abs(found.astype(int) - images).mean() < 5
    assert verify(tmp_path / "out") == []
    with pytest.raises(UsageError, match=r"^quality: .* was made with 95, this command says 90"):
        write(tmp_path / "out", {**wds_request, "quality": 90})


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_batches_do_not_show_in_the_files(tmp_path, wds_request, write, contents, tars, batch):
    write(tmp_path / "other", wds_request, batch=batch)
    assert contents(tmp_path / "other") == contents(tars)


def test_resume_and_lost_files(tmp_path, wds_request, write, contents, tars):
    before = contents(tars)
    write(tmp_path / "other", wds_request, only=range(1, 2))
    write(tmp_path / "other", wds_request)
    assert contents(tmp_path / "other") == before
    for name in FILES:
        (tars / name).unlink()
        with pytest.raises(SynthfastError, match=f"{name}: missing; run the command that made the folder again"):
            ShardSet(tars)
        with ShardFolder.create_or_resume(tars, wds_request) as folder:
            assert [f"shard-{span.index:06d}" for span in folder.pending()] == [name.partition(".")[0]]
        write(tars, wds_request)
        assert contents(tars) == before


def test_formats_do_not_mix(tmp_path, shards, tars, request_values, wds_request, contents):
    before = contents(shards), contents(tars)
    with pytest.raises(UsageError, match=r'^--format: .* was made with "npy", this command says "wds"'):
        ShardFolder.create_or_resume(shards, wds_request, options={"format": "--format"})
    with pytest.raises(UsageError, match=r'^--format: .* was made with "wds", this command says "npy"'):
        ShardFolder.create_or_resume(tars, request_values, options={"format": "--format"})
    with pytest.raises(UsageError, match=r'^codec: .* was made with "png", this command says "jpg"'):
        ShardFolder.create_or_resume(tars, {**wds_request, "codec": "jpg", "quality": 95})
    assert (contents(shards), contents(tars)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "npy"}, '\'format\' must be "wds", or absent for npy, found "npy"'),
        ({"format": "zip"}, '\'format\' must be "wds", or absent for npy, found "zip"'),
        ({"format": None}, "'format' must be .*, found null"),
        ({"codec": "gif"}, "'codec' must be one of png, jpg, found \"gif\""),
        ({"codec": 3}, "'codec' must be a string, found 3"),
        ({"quality": 90}, "'quality' is for jpg, found it beside png; leave it out"),
        ({"codec": "jpg"}, "key 'quality' is missing"),
        ({"codec": "jpg", "quality": 0}, "'quality' must be 1 to 100, found 0"),
        ({"codec": "jpg", "quality": 95.0}, "'quality' must be an integer, found 95.0"),
        ({"shape": [4, 5, 2]}, r"must have 1 or 3 channels and sides up to 16384, found \[4, 5, 2\]"),
        ({"shape": [4, 16385, 3]}, "must have 1 or 3 channels and sides up to 16384"),
        ({"n": 10**15 + 1}, "'n' must be at most 1000000000000000"),
    ],
)
def test_request_without_sense_is_refused(tmp_path, wds_request, tars, change, message):
    with pytest.raises(SynthfastError, match=message):
        ShardFolder.create_or_resume(tmp_path / "out", {**wds_request, **change})
    assert not list(tmp_path.glob("out/*"))
    manifest = json.loads((tars / "manifest.json").read_text())
    manifest["request"].update(change)
    (tars / "manifest.json").write_text(json.dumps(manifest))
    for look in (ShardSet, verify, summary):
        with pytest.raises(SynthfastError, match=message):
            look(tars)


def test_the_manifest_says_which_version_it_is(tars):
    manifest = json.loads((tars / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert {role: file["file"] for role, file in manifest["shards"][1].items() if isinstance(file, dict)} == {
        "tar": "shard-000001.tar",
        "tar_index": "shard-000001.idx",
        "labels": "shard-000001.labels.npy",
    }
    for version, message in ((1, "'format' must be 2 for wds shards, found 1"), (3, "format 3 is newer")):
        (tars / "manifest.json").write_text(json.dumps({**manifest, "format": version}))
        with pytest.raises(SynthfastError, match=message):
            ShardSet(tars)
    assert summary_of(tars, manifest)["format"] == "wds"


def summary_of(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return summary(folder)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-000001.tar", "shard-000000.tar/../x"])
def test_files_have_their_names(tars, name):
    manifest = json.loads((tars / "manifest.json").read_text())
    manifest["shards"][0]["tar"]["file"] = name
    (tars / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SynthfastError, match=r"shards\[0\]\.tar: the file must be called shard-000000\.tar"):
        ShardSet(tars)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("size", [0, -1, 1])
def test_files_that_are_cut_or_grown_are_named(tars, name, size):
    data = (tars / name).read_bytes()
    (tars / name).write_bytes(b"" if size == 0 else data[:-1] if size < 0 else data + b"x")
    problems = verify(tars)
    assert len(problems) == 1 and problems[0].startswith(f"{tars / name}: expected {len(data)} bytes, found")
    with pytest.raises(SynthfastError, match="bytes, found"):
        ShardSet(tars)


def test_any_changed_byte_is_found(tars):
    random = np.random.default_rng(0)
    for name in FILES[3:6]:
        whole = (tars / name).read_bytes()
        for place in random.integers(0, len(whole), 20):
            changed = bytearray(whole)
            changed[place] ^= 1 << random.integers(8)
            (tars / name).write_bytes(changed)
            problems = verify(tars)
            assert len(problems) == 1 and problems[0].startswith(f"{tars / name}: ") and "delete it" in problems[0]
        (tars / name).write_bytes(whole)


def test_links_must_stay_in_the_folder(tmp_path, tars):
    for name in FILES[:2]:
        (tars / name).rename(tmp_path / name)
        (tars / name).symlink_to(tmp_path / name)
        with pytest.raises(SynthfastError, match=f"{name}: a link that leads out of the folder"):
            ShardSet(tars)
        (tars / name).unlink()
        (tmp_path / name).rename(tars / name)


def test_strangers_are_named(tars, shards):
    for name in ("shard-000003.tar", "shard-000000.images.npy", "shard-000000.tar.gz"):
        (tars / name).write_bytes(b"?")
    (shards / "shard-000000.tar").write_bytes(b"?")
    assert len(verify(tars)) == 3 and all("does not belong to this set" in problem for problem in verify(tars))
    assert verify(shards) == [f"{shards / 'shard-000000.tar'}: does not belong to this set; remove it"]


# Of the tar of shard 1: member 2 k is image 10 + k, member 2 k + 1 its label.
def member(data: bytearray, number: int) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        return tar.getmembers()[number]


def header(data: bytearray, number: int, **change: object) -> None:
    """Rewrite the header of a member, with a right checksum."""
    info = member(data, number)
    place = info.offset
    for key, value in change.items():
        setattr(info, key, value)
    data[place : place + 512] = info.tobuf(tarfile.USTAR_FORMAT)


def put(data: bytearray, number: int, place: int, value: bytes) -> None:
    start = member(data, number).offset_data + place
    data[start : start + len(value)] = value


def after(data: bytearray, number: int) -> None:
    info = member(data, number)
    data[info.offset_data + info.size] = 1


def swap(data: bytearray) -> None:
    one, other = (member(data, number).offset_data for number in (3, 5))
    data[one], data[other] = data[other], data[one]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: header(data, 4, name="../../etc/passwd"),
            r"\(000000012\.png\): its header is not what the index",
        ),
        (lambda data: header(data, 4, name="/000000012.png"), r"\(000000012\.png\): its header is not what the index"),
        (lambda data: header(data, 4, name="000000011.png"), r"\(000000012\.png\): its header is not what the index"),
        (lambda data: header(data, 4, type=tarfile.SYMTYPE, linkname="/etc"), r"\(000000012\.png\): its header"),
        (lambda data: header(data, 0, type=tarfile.LNKTYPE, linkname="x"), r"\(000000010\.png\): its header"),
        (lambda data: header(data, 0, mode=0o777), r"\(000000010\.png\): its header"),
        (lambda data: header(data, 0, size=8 * 2**30 - 1), r"\(000000010\.png\): its header"),
        (lambda data: header(data, 18, size=1), r"\(000000019\.png\): its header"),
        (lambda data: header(data, 3, size=2), r"\(000000011\.png\): its label is not that of the labels' file"),
        (lambda data: put(data, 3, 0, b"6"), r"\(000000011\.png\): its label is not that of the labels' file"),
        (lambda data: put(data, 3, 5, b"6"), r"\(000000011\.png\): its label is not that of the labels' file"),
        (swap, r"\(000000011\.png\): its label is not that of the labels' file"),
        (lambda data: after(data, 2), r"\(000000011\.png\): what follows it is not zeros"),
        (lambda data: put(data, 2, 19, b"\x09"), r"\(000000011\.png\): not a png of the set's size"),
        (lambda data: put(data, 2, 0, b"\xff\xd8\xff"), r"\(000000011\.png\): not a png of the set's size"),
        (lambda data: data.__setitem__(-1, 1), r"its end is not zeros"),
    ],
)
def test_a_tar_that_was_forged_is_found(tars, damage, message):
    path = tars / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    rehash(tars, 1, "tar")
    problems = verify(tars)
    assert len(problems) == 1 and problems[0].startswith(str(path)) and re.search(message, problems[0])
    ShardSet(tars).read(np.arange(10))  # the other shards are read


def test_images_of_another_size_are_named_when_read(tmp_path, tars, wds_request, write, toy):
    """The manifest is made to say that images are 5x4."""
    manifest = json.loads((tars / "manifest.json").read_text())
    manifest["request"]["shape"] = [5, 4, 3]
    (tars / "manifest.json").write_text(json.dumps(manifest))
    message = r"shard-000001\.tar \(000000017\.png\): expected RGB 4x5, found RGB 5x4; restore or remake the folder"
    with pytest.raises(SynthfastError, match=message):
        ShardSet(tars).read(np.array([17, 3]))
    problems = verify(tars)
    assert len(problems) == 3 and all("not a png of the set's size" in problem for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"png 512 ", b"png 513 ", r"line 2: expected 'png 512 "),
        (b"000000012.png", b"../../12.png", r"line 4: expected .*000000012\.png"),
        (b"000000012.png", b"000000011.png", r"line 4: expected .*000000012\.png"),
        (b"v1.2 10", b"v1.2 11", "line 1: expected 'v1.2 10', found 'v1.2 11'"),
    ],
)
def test_an_index_that_was_forged_is_found(tars, old, new, message):
    path = tars / "shard-000001.idx"
    path.write_bytes(path.read_bytes().replace(old, new))
    rehash(tars, 1, "tar_index")
    problems = verify(tars)
    assert len(problems) == 1 and re.match(f"{re.escape(str(path))}: {message}", problems[0])
    read = ShardSet(tars)
    read.read(np.arange(10))
    for ask in (lambda: read.read(np.array([0, 10])), lambda: read.encoded(np.array([10])), lambda: read.index_paths):
        with pytest.raises(SynthfastError, match=message):
            ask()


def test_labels_that_were_forged_are_found(tars):
    path = tars / "shard-000001.labels.npy"
    data = bytearray(path.read_bytes())
    data[-8] = 6 - data[-8]
    path.write_bytes(data)
    rehash(tars, 1, "labels")
    problems = verify(tars)
    assert len(problems) == 1 and "(000000019.png): its label is not that of the labels' file" in problems[0]


def test_a_set_is_handed_to_other_processes_by_its_path(tars, shards):
    for folder in (tars, shards):
        read = ShardSet(folder)
        again = pickle.loads(pickle.dumps(read))
        assert len(pickle.dumps(read)) < 300
        np.testing.assert_array_equal(again.read(np.arange(23)), read.read(np.arange(23)))


def test_fingerprint_follows_the_content(tmp_path, tars, wds_request, write):
    write(tmp_path / "same", {**wds_request, "solver": {"name": "ddim"}})
    write(tmp_path / "other", {**wds_request, "seed": 1})
    prints = [ShardSet(path).fingerprint() for path in (tars, tmp_path / "same", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("storage", [{}, WDS])
def test_more_shards_than_open_files(tmp_path, request_values, write, storage):
    """Ten million images in shards of ten thousand are as many files as a process may usually have open; of two sets, more."""
    write(tmp_path / "many", {**request_values, **storage, "n": 120, "shard_size": 1})
    program = f"""
import resource, numpy as np
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from synthfast.data import ShardSet, machine
machine._OTHER_FILES = 40
sets = [ShardSet({str(tmp_path / "many")!r}) for _ in range(3)]
for read in sets:
    assert read.read(np.arange(120)).shape == (120, 4, 5, 3)
assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_webdataset_reads_the_same_in_order(tars, wds_request, toy):
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in ShardSet(tars).tar_paths]
    images, labels = toy(wds_request)
    pipeline = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(pipeline.to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in samples] == [f"{number:09d}" for number in range(23)]
    assert [label for _, _, label in samples] == labels.tolist()
    np.testing.assert_array_equal(np.stack([image for _, image, _ in samples]), images)


@pytest.fixture
def through_dali() -> Callable[..., list[tuple[np.ndarray, str]]]:
    dali = pytest.importorskip("nvidia.dali")

    def read(folder: Path, batch: int = 4) -> list[tuple[np.ndarray, str]]:
        from nvidia.dali import fn, types

        images = ShardSet(folder)
        parts = ["png" if images.codec == "png" else "jpg", *(["cls"] if images.labels is not None else [])]

        @dali.pipeline_def(batch_size=batch, num_threads=1, device_id=None)
        def pipeline():
            found = fn.readers.webdataset(
                paths=[str(path) for path in images.tar_paths],
                index_paths=[str(path) for path in images.index_paths],
                ext=parts,
                missing_component_behavior="error",
                pad_last_batch=True,
                name="reader",
            )
            found = found if isinstance(found, (list, tuple)) else [found]
            grey = images.shape[2] == 1
            pixels = fn.decoders.image(found[0], output_type=types.GRAY if grey else types.RGB)
            return (pixels, fn.pad(found[1], fill_value=0)) if len(found) > 1 else pixels

        made = pipeline()
        made.build()
        samples = []
        while len(samples) < len(images):
            out = made.run()
            for k in range(batch):
                label = bytes(out[1].at(k)).rstrip(b"\0").decode() if len(out) > 1 else ""
                samples.append((np.asarray(out[0].at(k)), label))
        return samples[: len(images)]

    return read


@pytest.mark.parametrize("classes", [7, 300, None])
@pytest.mark.parametrize("shape", [[8, 8, 1], [32, 32, 3]])
def test_dali_reads_the_same_in_order(tmp_path, wds_request, write, toy, through_dali, shape, classes):
    wds_request.update(shape=shape, classes=classes)
    write(tmp_path / "out", wds_request)
    images, labels = toy(wds_request)
    samples = through_dali(tmp_path / "out")
    np.testing.assert_array_equal(np.stack([image for image, _ in samples]), images)
    assert [label for _, label in samples] == ([""] * 23 if classes is None else [str(label) for label in labels])
