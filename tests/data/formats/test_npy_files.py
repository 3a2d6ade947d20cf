from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest

from synthfast.data.formats.npy import map_npy, npy_header, read_header, read_npz
from synthfast.errors import SynthfastError


@pytest.mark.parametrize("shape", [(1,), (7, 3), (10000, 32, 32, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["|u1", "<i8"])
def test_header_is_what_numpy_reads(dtype, shape):
    header = npy_header(dtype, shape)
    assert len(header) % 64 == 0
    file = io.BytesIO(header)
    assert read_header(file, "x") == (np.dtype(dtype), shape, False)
    assert file.tell() == len(header)
    if np.prod(shape) < 1000:
        array = np.lib.format.read_array(io.BytesIO(header + bytes(int(np.prod(shape)) * 8)), allow_pickle=False)
        assert array.shape == shape and array.dtype == dtype


def test_map_npy_reads_what_numpy_saved(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    np.save(tmp_path / "a.npy", array)
    mapped = map_npy(tmp_path / "a.npy", "|u1", (4, 3, 2))
    np.testing.assert_array_equal(mapped, array)
    assert not mapped.flags.writeable


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3), np.int8), r"expected uint8 \[4, 3\], found int8 \[4, 3\]"),
        (np.zeros((3, 4), np.uint8), r"found uint8 \[3, 4\]"),
        (np.asfortranarray(np.zeros((4, 3), np.uint8)), "Fortran order"),
    ],
)
def test_map_npy_refuses_another_array(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(SynthfastError, match=message):
        map_npy(tmp_path / "a.npy", "|u1", (4, 3))


@pytest.mark.parametrize("change", [-1, 1])
def test_map_npy_refuses_another_size(tmp_path, change):
    data = npy_header("|u1", (4, 3)) + bytes(12 + change)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(SynthfastError, match=f"expected {len(data) - change} bytes, found {len(data)}"):
        map_npy(tmp_path / "a.npy", "|u1", (4, 3))


def header_of(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"not an npy file at all, but a long enough text to be one",
        header_of(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4,"),
        header_of(b"{[]: 1}\n"),
        header_of(b"__import__('os').system('true')\n"),
        header_of(b"(" * 5000 + b"\n"),
        header_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 3), }\n"),
        header_of(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -3), }\n"),
        b"\x93NUMPY\x03\x00" + struct.pack("<I", 3) + b"{}\n",
    ],
)
def test_hostile_header_is_one_line(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(SynthfastError, match=r"a\.npy") as error:
        map_npy(tmp_path / "a.npy", "|u1", (4, 3))
    assert "\n" not in str(error.value)


def test_stored_npz_is_mapped_and_deflated_is_read(tmp_path):
    arrays = {
        "image": np.arange(60, dtype=np.uint8).reshape(5, 4, 3),
        "f": np.asfortranarray(np.eye(3)),
        "e": np.zeros(0),
    }
    np.savez(tmp_path / "stored.npz", **arrays)
    np.savez_compressed(tmp_path / "deflated.npz", **arrays)
    for file in ("stored.npz", "deflated.npz"):
        found = read_npz(tmp_path / file, ("image", "f"), ("e", "absent"))
        assert list(found) == ["image", "f", "e"]
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name])
    mapped = read_npz(tmp_path / "stored.npz", ("image",))["image"]
    assert isinstance(mapped.base, np.memmap)


def test_npz_without_the_array_lists_what_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(SynthfastError, match="expected an array 'image', found images, labels"):
        read_npz(tmp_path / "a.npz", ("image",))


def test_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.array([{"a": 1}], object))
    with pytest.raises(SynthfastError, match="plain numbers"):
        read_npz(tmp_path / "a.npz", ("image",))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_member_shorter_than_its_header_says_is_refused(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("image.npy", npy_header("|u1", (1 << 40,)) + b"abc")
    with pytest.raises(SynthfastError, match=f"expected {1 << 40} bytes of data, found 3"):
        read_npz(tmp_path / "a.npz", ("image",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_is_one_line(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, image=np.random.default_rng(0).integers(0, 256, 5000, np.uint8))
    whole = path.read_bytes()
    flipped = whole[:2000] + bytes([whole[2000] ^ 255]) + whole[2001:]
    damages = [b"", whole[: len(whole) // 2], whole[:-30], b"text"] + ([flipped] if save is np.savez_compressed else [])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(SynthfastError, match=r"a\.npz") as error:
            read_npz(path, ("image",))
        assert "\n" not in str(error.value)
