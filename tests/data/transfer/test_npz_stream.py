from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthfast.config import ExportConfig, ImportConfig
from synthfast.data import ArrayImages, ShardSet, open_images
from synthfast.data.formats.npy import npy_header
from synthfast.data.transfer import copying as copying_module
from synthfast.data.transfer.exporting import export_images
from synthfast.data.transfer.importing import import_images
from synthfast.data.transfer.npz_stream import NpzStream, write_npz
from synthfast.errors import SynthfastError, UsageError

RECORD = {"n": 23, "source": {"name": "toy", "fingerprint": "0"}}


@pytest.fixture
def images(toy, request_values) -> ArrayImages:
    pixels, labels = toy(request_values)
    return ArrayImages("toy", [pixels], labels, 7)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(copying_module, "CHUNK_BYTES", 4 * 60)


def write(images, out: Path, record=RECORD, compress=False, report=lambda done, total: None):
    return write_npz(images, out, record, {"n": "--n", "source.fingerprint": "DIR (its images)"}, report, compress)


@pytest.mark.parametrize("compress", [False, True])
def test_numpy_reads_what_is_written(tmp_path, images, small_chunks, compress):
    write(images, tmp_path / "a.npz", compress=compress)
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found.files) == ["image", "label"]
        assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int64
        np.testing.assert_array_equal(found["image"], images.read(np.arange(23)))
        np.testing.assert_array_equal(found["label"], images.labels)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED if compress else 0}


def test_members_are_zip64_whatever_their_size(tmp_path, images):
    """The header of a member is written before its size is known, so it must have room for 64 bits."""
    write(images, tmp_path / "a.npz")
    data = (tmp_path / "a.npz").read_bytes()
    version, extra = struct.unpack_from("<H", data, 4)[0], struct.unpack_from("<H", data, 28)[0]
    assert data[:4] == b"PK\x03\x04" and version == 45 and extra == 20
    name_end = 30 + len("image.npy")
    assert struct.unpack_from("<HHQQ", data, name_end) == (1, 16, *(2 * [128 + 23 * 60]))


def test_stored_file_stays_on_the_disk_when_opened_as_a_source(tmp_path, images):
    write(images, tmp_path / "a.npz")
    found = open_images(f"npz:{tmp_path / 'a.npz'}")
    assert isinstance(found._parts[0].base, np.memmap)
    np.testing.assert_array_equal(found.read(np.arange(23)), images.read(np.arange(23)))


def test_equal_images_leave_equal_bytes_and_no_labels_no_member(tmp_path, images, monkeypatch):
    write(images, tmp_path / "a.npz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(images, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    write(ArrayImages("toy", images._parts), tmp_path / "c.npz")
    assert np.load(tmp_path / "c.npz").files == ["image"]


class Killed(BaseException):
    pass


def test_interrupted_it_leaves_no_file_and_the_next_run_makes_it(tmp_path, images, small_chunks):
    write(images, tmp_path / "whole.npz")

    def die(done: int, total: int) -> None:
        if done == 12:
            assert (tmp_path / ".tmp-a.npz").exists() and not (tmp_path / "a.npz").exists()
            raise Killed

    with pytest.raises(Killed):
        write(images, tmp_path / "a.npz", report=die)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npz"]
    (tmp_path / ".tmp-a.npz").write_bytes(b"what a killed run left, longer than the result" * 100)
    assert write(images, tmp_path / "a.npz").made == 23
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_finished_file_is_known_again(tmp_path, images):
    write(images, tmp_path / "a.npz")
    again = write(images, tmp_path / "a.npz")
    assert (again.kept, again.made) == (23, 0)
    other = {**RECORD, "source": {"name": "toy", "fingerprint": "1"}}
    with pytest.raises(UsageError, match=r'DIR \(its images\): .*a.npz was made with "0", this command says "1"'):
        write(images, tmp_path / "a.npz", record=other)


@pytest.mark.parametrize("kind", ["text", "npz", "nothing"])
def test_another_file_is_not_overwritten(tmp_path, images, kind):
    path = tmp_path / "a.npz"
    if kind == "npz":
        np.savez(path, image=np.zeros(3))
    else:
        path.write_bytes(b"precious" if kind == "text" else b"")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is there already and no npz file of this command; remove it or choose"):
        write(images, path)
    assert path.read_bytes() == before


def test_two_writers_are_refused(tmp_path, images):
    def second(done: int, total: int) -> None:
        with pytest.raises(SynthfastError, match="another process is writing this file"):
            write(images, tmp_path / "a.npz")

    write(images, tmp_path / "a.npz", report=second)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(23, 4, 5), (23, 4, 5, 1), (23, 4, 5, 3)])
def test_stream_reads_in_any_order(tmp_path, save, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    save(tmp_path / "a.npz", image=pixels, label=np.arange(23, dtype=np.int16) % 4)
    found = NpzStream(tmp_path / "a.npz", "npz")
    assert found.shape == (4, 5, shape[3] if len(shape) == 4 else 1) and found.classes == 4
    np.testing.assert_array_equal(found.labels, np.arange(23) % 4)
    pixels = pixels.reshape(23, *found.shape)
    for rows in ([0, 1, 2], [2, 3, 9], [22], [5, 4, 22, 4], [], np.random.default_rng(1).permutation(23)):
        np.testing.assert_array_equal(found.read(np.array(rows, np.int64)), pixels[np.array(rows, np.int64)])


def test_fingerprint_is_of_the_content_and_independent_of_the_compression(tmp_path):
    pixels, labels = np.arange(60, dtype=np.uint8).reshape(5, 4, 3), np.arange(5)
    np.savez(tmp_path / "a.npz", image=pixels, label=labels)
    np.savez_compressed(tmp_path / "b.npz", image=pixels, label=labels)
    np.savez(tmp_path / "c.npz", image=pixels, label=labels[::-1])
    np.savez(tmp_path / "d.npz", image=pixels[::-1], label=labels)
    prints = [NpzStream(tmp_path / f"{name}.npz", "npz").fingerprint() for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path, save):
    """A stored member that is memory-mapped would not be checked; one that is imported is."""
    path = tmp_path / "a.npz"
    save(path, image=np.random.default_rng(0).integers(0, 256, (1000, 4, 4), np.uint8))
    data = bytearray(path.read_bytes())
    data[8000] ^= 1
    path.write_bytes(data)
    with pytest.raises(SynthfastError, match=r"a\.npz: not a valid npz file \(.*\); restore or remake it"):
        import_images(ImportConfig(source=(f"npz:{path}",), out=str(tmp_path / "out")))
    with pytest.raises(SynthfastError, match="incomplete"):
        ShardSet(tmp_path / "out")


@pytest.mark.parametrize("member", ["image", "label"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("n", [3, 1000, 200_000])
def test_the_checksum_counts_up_to_the_last_byte(tmp_path, save, member, n):
    """The content is as it was, its checksum in the directory is another: found when the last image is read."""
    path = tmp_path / "a.npz"
    save(path, image=np.zeros((n, 4, 4), np.uint8), label=np.zeros(n, np.int64))
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo(f"{member}.npy").CRC
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", crc), struct.pack("<I", crc ^ 1)))
    with pytest.raises(SynthfastError, match="Bad CRC-32"):
        NpzStream(path, "npz").read(np.arange(n))


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PIXELS = npy_header("|u1", (3, 2, 2, 1)) + bytes(12)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "expected an array 'image', found none"),
        ({"images.npy": PIXELS}, "expected an array 'image', found images.npy"),
        ({"image.npy": npy_header("<f4", (3, 2, 2, 1)) + bytes(48)}, "must be uint8 .*, found float32"),
        ({"image.npy": npy_header("|u1", (3, 2)) + bytes(6)}, r"found uint8 \[3, 2\]"),
        ({"image.npy": npy_header("|u1", (0, 2, 2))}, "holds no images"),
        ({"image.npy": npy_header("|u1", (3, 0, 2))}, "found uint8"),
        ({"image.npy": npy_header("|u1", (2, 3, 4, 4)) + bytes(96)}, r"C 1 or 3, found \[2, 3, 4, 4\]"),
        ({"image.npy": npy_header("|O", (3, 2, 2)) + bytes(96)}, "plain numbers"),
        ({"image.npy": npy_header("|u1", (1 << 45, 1, 1)) + b"abc"}, f"expected {1 << 45} bytes of data, found 3"),
        ({"image.npy": b"\x80\x04pickle"}, "not a valid npy file"),
        ({"image.npy": PIXELS.replace(b"False", b"True ")}, "Fortran order"),
        (
            {"image.npy": PIXELS, "label.npy": npy_header("<f8", (3,)) + bytes(24)},
            r"'label' must be integers \[3\], one",
        ),
        ({"image.npy": PIXELS, "label.npy": npy_header("<i8", (3, 1)) + bytes(24)}, r"found int64 \[3, 1\]"),
        (
            {"image.npy": PIXELS, "label.npy": npy_header("<i8", (4,)) + bytes(32)},
            r"integers \[3\], one per image, found int64 \[4\]",
        ),
        ({"image.npy": PIXELS, "label.npy": npy_header("|i1", (3,)) + b"\xff\0\0"}, "0 or more, found -1"),
    ],
)
def test_what_cannot_be_images_is_one_line(tmp_path, members, message):
    path = zipped(tmp_path / "a.npz", members)
    with pytest.raises(SynthfastError, match=message) as error:
        NpzStream(path, "npz:a")
    assert "\n" not in str(error.value)


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path):
    """A directory may claim any size: none is believed that the bytes which are there cannot unfold to."""
    path = zipped(tmp_path / "a.npz", {"image.npy": npy_header("|u1", (1 << 30, 1, 1)) + bytes(100)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 128 + (1 << 30))
    path.write_bytes(data)
    with pytest.raises(SynthfastError, match=f"cannot hold {128 + (1 << 30)}; restore or remake"):
        NpzStream(path, "npz:a")


def test_labels_of_no_image_are_not_read(tmp_path):
    """A member of a few kilobytes unfolds to as many labels as it likes."""
    path = zipped(
        tmp_path / "a.npz", {"image.npy": PIXELS, "label.npy": npy_header("|i1", (1 << 24,)) + bytes(1 << 24)}
    )
    tracemalloc.start()
    with pytest.raises(SynthfastError, match=rf"integers \[3\], one per image, found int8 \[{1 << 24}\]"):
        NpzStream(path, "npz:a")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 << 20


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unfold_without_bound_are_refused(tmp_path, compression):
    path = zipped(tmp_path / "a.npz", {"image.npy": PIXELS}, compression)
    with pytest.raises(SynthfastError, match="expected a stored or deflated member; save it with"):
        NpzStream(path, "npz:a")


def _whole() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 4, (40, 4, 4, 1), np.uint8)
    np.savez_compressed(buffer, image=pixels, label=np.arange(40) % 3)
    return buffer.getvalue()


WHOLE = _whole()


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(WHOLE)),
    whole=st.booleans(),
)
def test_any_damage_is_found_or_harmless(tmp_path_factory, changes, cut, whole):
    """Whatever the bytes: one line, or images and labels that pass their checksums and are the right ones."""
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.npz"
    path.write_bytes(bytes(data) if whole else bytes(data[:cut]))
    try:
        found = NpzStream(path, "npz:a")
        pixels = found.read(np.arange(len(found)))
    except SynthfastError as error:
        assert "\n" not in str(error)
        return
    expected = np.load(io.BytesIO(WHOLE))
    assert zlib.crc32(pixels) == zlib.crc32(expected["image"]) and found.shape == (4, 4, 1)
    assert found.labels is None or found.labels.tolist() == expected["label"].tolist()


def test_memory_stays_flat_whatever_the_number_of_images(tmp_path):
    """15 MB of deflated pixels in and out again in chunks of 8 MB at most; a whole copy would be seen."""
    import tracemalloc

    n = 15_000
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("image.npy", "w") as member,
    ):
        member.write(npy_header("|u1", (n, 32, 32, 1)))
        for _ in range(15):
            member.write(bytes(1_024_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying_module, "CHUNK_BYTES", 1 << 20)
        tracemalloc.start()
        import_images(ImportConfig(source=(f"npz:{tmp_path / 'a.npz'}",), out=str(tmp_path / "shards")))
        config = ExportConfig(source=(str(tmp_path / "shards"),), to="npz", compress=True, out=str(tmp_path / "b.npz"))
        export_images(config)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6e6
    assert NpzStream(tmp_path / "b.npz", "b").read(np.arange(n)).max() == 0
