from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from synthfast.config import ImportConfig
from synthfast.data import ShardSet, open_images
from synthfast.data.formats.tar_members import members
from synthfast.data.sources import tar_images as tar_images_module
from synthfast.data.sources.tar_images import TarImages
from synthfast.data.transfer.importing import import_images
from synthfast.errors import SynthfastError, UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), np.uint8)
LABELS = np.arange(11) % 4


def image(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, files: list[tuple[str, bytes]], change: Callable = lambda info: None, **options) -> Path:
    """A tar with these files; ``change`` may edit each header's TarInfo."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(rows: range, label: str = "cls") -> list[tuple[str, bytes]]:
    files = []
    for i in rows:
        files.append((f"{i:06d}.png", image(PIXELS[i])))
        files.append((f"{i:06d}.{label}", str(LABELS[i]).encode()))
    return files


def webdataset_tar(path: Path, encode: Callable[[int], dict], rows: range = range(11), **options) -> Path:
    """Written by webdataset's own writer."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(path), **options) as writer:
        for i in rows:
            writer.write({"__key__": f"part/{i:06d}", **encode(i)})
    return path


ENCODERS = {
    "png and cls": lambda i: {"png": PIXELS[i], "cls": int(LABELS[i])},
    "png and json number": lambda i: {"png": PIXELS[i], "json": int(LABELS[i])},
    "png and json object": lambda i: {"png": PIXELS[i], "json": {"label": int(LABELS[i]), "caption": "\u00e9" * 300}},
    "a json beside cls": lambda i: {"png": PIXELS[i], "json": {"label": 77}, "cls": int(LABELS[i])},
    "members of other kinds": lambda i: {"png": PIXELS[i], "cls": int(LABELS[i]), "txt": "a caption", "seg.png": b"no"},
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("compress", [False, True])
def test_tars_of_webdataset(tmp_path, kind, compress):
    path = webdataset_tar(tmp_path / f"a.tar{'.gz' if compress else ''}", ENCODERS[kind], compress=compress)
    images = open_images(f"wds:{path}")
    assert (len(images), images.shape, images.classes) == (11, (4, 5, 3), 4)
    np.testing.assert_array_equal(images.labels, LABELS)
    for rows in (np.arange(11), np.array([7, 0, 10, 7]), np.zeros(0, np.int64)):
        np.testing.assert_array_equal(images.read(rows), PIXELS[rows])


@pytest.mark.parametrize("options", [{"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}])
def test_long_names_and_extended_headers(tmp_path, options):
    """pax writes a time with a fraction, and both write long names, in members of their own."""
    long = "folder-" * 30 + "é/"
    files = [(long + name, data) for name, data in samples(range(11))]
    path = tar(tmp_path / "a.tar", files, lambda info: setattr(info, "mtime", 1.5), **options)
    with open(path, "rb") as file:
        found = list(members(file, "a.tar"))
    assert [member.name for member in found] == [name for name, _ in files]
    assert [path.read_bytes()[m.offset : m.offset + m.size] for m in found] == [data for _, data in files]
    np.testing.assert_array_equal(TarImages(str(path), "wds").read(np.arange(11)), PIXELS)


def test_an_extended_header_of_very_many_records_takes_no_time():
    """Tens of times as long as one pass over it would be minutes for a few of them."""
    records = b"6 a=b\n" * 174_000
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    file = io.BytesIO(header + tarfile.TarInfo("y.png").tobuf() + bytes(1024))
    start = time.process_time()
    assert [member.name for member in members(file, "a.tar")] == ["y.png"]
    assert time.process_time() - start < 2


def test_jpg_reads_as_pillow_does_and_is_lossy(tmp_path):
    files = [(f"{i}.JPG", image(PIXELS[i], "JPEG")) for i in range(11)]
    images = TarImages(str(tar(tmp_path / "a.tar", files)), "wds")
    expected = [np.asarray(Image.open(io.BytesIO(data))) for _, data in files]
    np.testing.assert_array_equal(images.read(np.arange(11)), expected)
    assert images.labels is None and images.lossy
    assert not TarImages(str(tar(tmp_path / "b.tar", samples(range(3)))), "wds").lossy


def test_a_folder_and_a_pattern_are_read_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_images_module, "_OPEN_TARS", 2)
    for k, rows in enumerate((range(4), range(4, 5), range(5, 11))):
        tar(tmp_path / f"part-{k}.tar", samples(rows))
    (tmp_path / "part-9.txt").write_text("no tar")
    for path in (tmp_path, tmp_path / "part-*.tar", tmp_path / "part-[0-9].tar"):
        images = open_images(f"wds:{path}")
        np.testing.assert_array_equal(images.labels, LABELS)
        for rows in (np.arange(11), np.array([10, 0, 4, 10, 3])):
            np.testing.assert_array_equal(images.read(rows), PIXELS[rows])


def test_ranges_of_numbers_are_written_out(tmp_path):
    for k in range(11):
        tar(tmp_path / f"part-{k // 6}-{k:02d}.tar", samples(range(k, k + 1)))
    np.testing.assert_array_equal(open_images(f"wds:{tmp_path}/part-1-{{06..10}}.tar").labels, LABELS[6:])
    np.testing.assert_array_equal(open_images(f"wds:{tmp_path}/part-{{0..0}}-{{00..05}}.tar").labels, LABELS[:6])
    np.testing.assert_array_equal(open_images(f"wds:{tmp_path}/part-?-{{00..10}}.tar").labels, LABELS)
    with pytest.raises(
        SynthfastError, match=r"part-1-11\.tar is not there, while others of the range are; check the path$"
    ):
        open_images(f"wds:{tmp_path}/part-1-{{06..11}}.tar")
    for absurd in ("{9..1}", "{0..999999999}", "{0..9999}{0..9999}", "{5..}"):
        with pytest.raises(SynthfastError, match="expected a tar file, a folder of them, or a pattern"):
            open_images(f"wds:{tmp_path}/part-{absurd}.tar")


def test_another_process_opens_the_tars_itself(tmp_path):
    images = TarImages(str(tar(tmp_path / "a.tar", samples(range(11)))), "wds")
    images.read(np.array([3]))
    there = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(there.read(np.arange(11)), PIXELS)
    np.testing.assert_array_equal(images.read(np.arange(11)), PIXELS)
    assert there.fingerprint() == images.fingerprint() and there.labels.tolist() == LABELS.tolist()


def test_resized_as_folders_are(tmp_path):
    (tmp_path / "folder").mkdir()
    for i in range(3):
        (tmp_path / "folder" / f"{i}.png").write_bytes(image(PIXELS[i]))
    path = tar(tmp_path / "a.tar", samples(range(3)))
    resized = open_images(f"wds:{path}", image_size=3)
    expected = open_images(f"folder:{tmp_path / 'folder'}", image_size=3)
    np.testing.assert_array_equal(resized.read(np.arange(3)), expected.read(np.arange(3)))


def test_what_is_no_sample_is_passed_over(tmp_path):
    """Folders, hidden files, notes of macOS and files without an extension."""
    files = [("__MACOSX/._x.png", b"no"), ("README", b"hello"), (".hidden.png", b"no"), *samples(range(11))]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert len(TarImages(str(path), "wds")) == 11


def test_import_keeps_pixels_and_labels_and_goes_on(tmp_path, monkeypatch):
    path = webdataset_tar(tmp_path / "a.tar", ENCODERS["png and cls"], mtime=0)
    config = ImportConfig(source=(f"wds:{path}",), out=str(tmp_path / "out"), shard_size=4, classes=6)
    done = import_images(config)
    assert (done.kept, done.made) == (0, 11)
    found = ShardSet(tmp_path / "out")
    np.testing.assert_array_equal(found.read(np.arange(11)), PIXELS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.classes == 6 and found.manifest.request.values["source"]["name"] == f"wds:{path}"
    assert (import_images(config).kept, import_images(config).made) == (11, 0)
    webdataset_tar(path, lambda i: {"png": PIXELS[i], "cls": int(LABELS[-i])}, mtime=0)
    with pytest.raises(UsageError, match=r"SOURCE \(its images\): .* was made with"):
        import_images(config)


def test_the_fingerprint_follows_names_sizes_and_labels(tmp_path):
    first = TarImages(str(tar(tmp_path / "a.tar", samples(range(11)))), "wds").fingerprint()
    assert first == TarImages(str(tar(tmp_path / "b.tar", samples(range(11)))), "wds").fingerprint()
    renamed = [(f"x{name}", data) for name, data in samples(range(11))]
    relabelled = [(name, b"2" if data == b"1" else data) for name, data in samples(range(11))]
    for files in (renamed, relabelled, samples(range(10))):
        assert first != TarImages(str(tar(tmp_path / "c.tar", files)), "wds").fingerprint()


def refused(path: Path, message: str) -> None:
    """In one line that names the tar; and nothing is written anywhere but into --out."""
    before = sorted(path.parent.rglob("*"))
    out = path.parent / "out"
    with pytest.raises(SynthfastError, match=message) as error:
        import_images(ImportConfig(source=(f"wds:{path}",), out=str(out)))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert sorted(p for p in path.parent.rglob("*") if out not in (p, *p.parents)) == before


@pytest.mark.parametrize(
    "name", ["../000000.png", "a/../../000000.png", "/etc/000000.png", "..\\000000.png", "C:\\000000.png", "a/.."]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    refused(tar(tmp_path / "in" / "a.tar", [(name, image(PIXELS[0]))]), "leads out of its folder")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "of kind b'Z'"),
    ],
)
def test_members_that_are_no_files_are_refused(tmp_path, kind, message):
    def change(info: tarfile.TarInfo) -> None:
        if info.name == "000001.png":
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    path = tar(tmp_path / "a.tar", samples(range(2)), change)
    refused(path, f"'000001.png' is {message}, expected files alone")


HUGE = 1 << 40


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["000000.png", "000000.cls", "000000.txt"])
def test_sizes_that_are_not_there_are_refused(tmp_path, name, compress):
    data = image(PIXELS[0])
    path = tar(tmp_path / "a.tar", [(name, data)], lambda info: setattr(info, "size", len(data)))
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo(name)
    info.size = HUGE
    content[:512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(gzip.compress(content) if compress else content)
    refused(path, "which are not there|expected at most|ends within")


def test_an_image_of_absurd_size_is_refused_though_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_images_module, "_MOST_IMAGE", 100)
    refused(tar(tmp_path / "a.tar", samples(range(1))), "'000000.png' has .* bytes, expected at most 100")


def test_a_bomb_is_not_unfolded(tmp_path):
    """A png of 100 megapixels of one colour, in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    refused(tar(tmp_path / "a.tar", [("0.png", buffer.getvalue())]), "the image at byte 512: too large to be one image")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "an empty tar file"),
        ([("0.txt", b"")], "sample '0' has no image, expected one of png"),
        ([*samples(range(1)), ("1.cls", b"0")], "sample '1' has no image"),
        ([*samples(range(1)), ("1.png", image(PIXELS[1]))], "sample '1' has no label, those before it have one"),
        (
            [("0.png", image(PIXELS[0])), *samples(range(1, 2))],
            "sample '000001' has a label, those before it have none",
        ),
        ([("0.png", image(PIXELS[0])), ("0.jpg", b"")], "sample '0' has two images, expected one"),
        ([("0.cls", b"cat")], "'0.cls' must hold a class from 0 to 999999, found b'cat'"),
        ([("0.cls", b"-1")], "found b'-1'"),
        ([("0.cls", b"1e3")], "found b'1e3'"),
        ([("0.cls", b"1000000")], "found b'1000000'"),
        ([("0.cls", b"")], "found b''"),
        ([("0.cls", b"1" * 300)], "'0.cls' has 300 bytes, expected at most 256"),
        ([("0.json", b"{")], "'0.json' is not valid JSON"),
        ([("0.json", b"[" * 100_000)], "'0.json' is not valid JSON"),
        ([("0.json", b'{"label": "cat"}')], "must hold a class"),
        ([("0.json", b"true")], "must hold a class"),
        ([("0.json", b"1.5")], "must hold a class"),
        ([("0.png", b"no image")], "the image at byte 512: not a readable image"),
        ([("0.png", image(PIXELS[0])[:60])], "the image at byte 512: not a readable image"),
        ([*samples(range(1)), ("x.png", image(PIXELS[1][:3])), ("x.cls", b"0")], "expected 5x4 pixels as in image 0"),
        ([*samples(range(1)), ("x.png", image(PIXELS[1][..., 0])), ("x.cls", b"0")], "expected RGB as in image 0"),
    ],
)
def test_samples_that_cannot_be_used_are_one_line(tmp_path, files, message):
    refused(tar(tmp_path / "a.tar", files), message)


@pytest.mark.parametrize("data", [b"", b"text", b"\x1f\x8bno gzip", b"PK\x03\x04" + bytes(600), b"x" * 2000])
def test_what_is_no_tar_is_one_line(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    refused(tmp_path / "a.tar", "tar file|ends within a header|empty")


@pytest.mark.parametrize("compress", [False, True])
def test_a_tar_cut_anywhere_is_one_line_or_the_first_samples(tmp_path, compress):
    whole = tar(tmp_path / "a.tar", samples(range(3))).read_bytes()
    for cut in range(0, 3 * 2 * 1024, 100):
        data = gzip.compress(whole[:cut]) if compress else whole[:cut]
        (tmp_path / "a.tar").write_bytes(data)
        try:
            images = TarImages(str(tmp_path / "a.tar"), "wds")
            np.testing.assert_array_equal(images.read(np.arange(len(images))), PIXELS[: len(images)])
        except SynthfastError as error:
            assert "\n" not in str(error)


def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_images_module, "_OPEN_TARS", 1)
    for k in range(2):
        tar(tmp_path / f"{k}.tar", samples(range(3 * k, 3 * k + 3)))
    images = TarImages(str(tmp_path), "wds")
    images.read(np.array([5]))
    tar(tmp_path / "0.tar", samples(range(8)))
    with pytest.raises(SynthfastError, match=r"0\.tar: changed while it was read"):
        images.read(np.array([0]))


def test_tars_put_together_by_cat_are_refused(tmp_path):
    """Readers stop at the first end, and would lose the rest without a word."""
    parts = [tar(tmp_path / f"{k}.tar", samples(rows)).read_bytes() for k, rows in enumerate((range(3), range(3, 5)))]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.tar").write_bytes(b"".join(parts))
    refused(tmp_path / "both" / "a.tar", "goes on after the end of the tar file")


@pytest.mark.parametrize("place", [0, 99, 110, 140, 300])
def test_a_header_that_does_not_fit_its_checksum_is_refused(tmp_path, place):
    path = tar(tmp_path / "a.tar", samples(range(3)))
    data = bytearray(path.read_bytes())
    data[1024 + place] ^= 1
    path.write_bytes(data)
    refused(path, "damaged at byte 1024")


def test_nothing_that_fits_is_one_line(tmp_path):
    for path in (tmp_path / "none.tar", tmp_path, tmp_path / "x-*.tar"):
        with pytest.raises(SynthfastError, match="expected a tar file, a folder of them, or a pattern"):
            open_images(f"wds:{path}")
    tar(tmp_path / "a.tar", samples(range(1)))
    with pytest.raises(UsageError, match=r"for a WebDataset tar write wds:.*a\.tar"):
        open_images(str(tmp_path / "a.tar"))


def _whole() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for k, (name, data) in enumerate([*samples(range(2)), *samples(range(2, 3), "json")]):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 + k
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


WHOLE = _whole()


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, len(WHOLE) - 10_000), st.one_of(st.binary(max_size=12), st.just(b"\x80" + b"\xff" * 11))
        ),
        max_size=4,
    ),
    cut=st.integers(0, len(WHOLE)),
    whole=st.booleans(),
    mend=st.booleans(),
)
def test_any_bytes_are_samples_or_one_line(tmp_path_factory, changes, cut, whole, mend):
    """Damaged at random, the headers' checksums mended or not: never another exception, never an image of another shape."""
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place : place + len(value)] = value
    if mend:
        for at in range(0, len(data), 512):
            if WHOLE[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.tar").write_bytes(bytes(data) if whole else bytes(data[:cut]))
    try:
        images = TarImages(str(folder / "a.tar"), "wds")
        pixels = images.read(np.arange(len(images)))
    except SynthfastError as error:
        assert "\n" not in str(error) and str(error).startswith(str(folder / "a.tar"))
    else:
        assert pixels.shape == (len(images), *images.shape)
        assert images.labels is None or images.labels.min() >= 0
    assert [path.name for path in folder.iterdir()] == ["a.tar"]


def test_json_of_webdataset_is_what_json_says(tmp_path):
    files = [("a.png", image(PIXELS[0])), ("a.json", json.dumps({"cls": 3}).encode())]
    assert TarImages(str(tar(tmp_path / "a.tar", files)), "wds").labels.tolist() == [3]
    files[1] = ("a.json", json.dumps({"caption": "no label"}).encode())
    assert TarImages(str(tar(tmp_path / "b.tar", files)), "wds").labels is None
