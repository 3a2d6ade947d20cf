"""PNG files that numpy and igzip make: what is in them, and what other files are read as."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from synthfast.data.formats import codec as codec_module
from synthfast.data.formats.codec import Codec
from synthfast.data.formats.png import decode_png, encode_png
from synthfast.errors import SynthfastError

# Stored and deflated ones, the largest that is stored (444 bytes of rows) and the next, one pixel, one row, one column.
SHAPES = [
    *(
        (8, 8, 1),
        (8, 8, 3),
        (1, 1, 1),
        (1, 1, 3),
        (28, 28, 1),
        (32, 32, 3),
        (33, 17, 1),
        (5, 64, 3),
        (1, 500, 3),
        (500, 1, 1),
    ),
    *((12, 36, 1), (12, 37, 1), (4, 110, 1), (4, 111, 1), (2, 70, 3), (64, 64, 3), (300, 301, 3)),
]


def images(shape: tuple[int, int, int], count: int = 5) -> np.ndarray:
    """Noise, a constant, ramps along rows and columns, and a smooth surface: each filter is best somewhere."""
    height, width, channels = shape
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    surfaces = [random.integers(0, 256, (height, width)), np.full((height, width), 200), 3 * x, 5 * y, x * y // 7 + x]
    grey = np.stack([surfaces[k % 5] for k in range(count)])[..., None]
    return (grey + 40 * np.arange(channels)).astype(np.uint8)


def pillow(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        return np.asarray(image).reshape(image.height, image.width, -1)


def saved(pixels: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    (image if mode is None else image.convert(mode)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def decoded(files: list[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    return Codec("png", shape).decode(files, lambda k: f"file {k}")


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_and_pillow_sees_the_same(shape):
    pixels = images(shape)
    files = encode_png(pixels)
    assert all(np.array_equal(pillow(file), image) for file, image in zip(files, pixels, strict=True))
    out = np.zeros_like(pixels)
    assert decode_png(files, out) == [] and np.array_equal(out, pixels)
    assert decode_png([memoryview(file) for file in files], out) == []
    assert np.array_equal(decoded(files, shape), pixels)
    most = Codec("png", shape).most_bytes
    assert all(len(file) <= most for file in files)


def test_rows_that_fit_into_a_block_are_stored():
    sizes = {
        shape: {len(file) for file in encode_png(images(shape))} for shape in ((8, 8, 1), (4, 110, 1), (4, 111, 1))
    }
    assert sizes[8, 8, 1] == {140} and sizes[4, 110, 1] == {512}
    assert len(sizes[4, 111, 1]) > 1


def test_both_filters_are_used_and_files_are_about_as_small_as_pillows():
    digits = np.random.default_rng(0).integers(0, 256, (9, 9, 1), np.uint8)
    smooth = np.asarray(Image.fromarray(digits[:, :, 0]).resize((96, 96), Image.Resampling.BICUBIC))
    windows = np.lib.stride_tricks.sliding_window_view(smooth, (32, 32))[::4, ::4].reshape(-1, 32, 32, 1)
    pixels = np.ascontiguousarray(windows)
    rows = [np.frombuffer(zlib.decompress(file[41:-16]), np.uint8).reshape(32, 33) for file in encode_png(pixels)]
    assert set(np.unique(np.stack(rows)[:, :, 0])) == {1, 2}
    ours = sum(map(len, encode_png(pixels)))
    assert ours < 1.12 * sum(len(saved(image)) for image in pixels)
    assert ours < 0.8 * pixels.size


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_bytes_depend_on_the_pixels_alone(shape, monkeypatch):
    pixels = images(shape, 700)
    whole = Codec("png", shape).encode(pixels)
    assert [file for k in range(0, 700, 7) for file in encode_png(pixels[k : k + 7])] == whole
    assert encode_png(np.asfortranarray(pixels)) == whole
    for cpus in (1, 2, 5):
        monkeypatch.setattr("synthfast.data.machine.usable_cpus", lambda cpus=cpus: cpus)
        assert Codec("png", shape).encode(pixels) == whole
        assert np.array_equal(decoded(whole, shape), pixels)


def test_nothing_makes_nothing():
    for shape in ((8, 8, 1), (32, 32, 3)):
        assert encode_png(np.zeros((0, *shape), np.uint8)) == []
        assert decoded([], shape).shape == (0, *shape)


@pytest.mark.parametrize("shape", [(8, 8, 1), (20, 31, 3), (20, 31, 1)])
def test_valid_files_of_other_programs_are_read(shape):
    pixels = images(shape)
    others = [saved(image) for image in pixels]  # Pillow's filters are chosen from all five
    mixed = [file for pair in zip(others, encode_png(pixels), strict=True) for file in pair]
    assert np.array_equal(decoded(mixed, shape), np.repeat(pixels, 2, 0))
    out = np.empty_like(pixels)
    assert decode_png([rewritten(file, extra=b"tEXt") for file in others], out) == list(range(len(pixels)))
    split = [rewritten(file, cut=True, extra=b"tEXt") for file in others]
    assert np.array_equal(decoded(split, shape), pixels)


@pytest.mark.parametrize("shape", [(6, 9, 1), (20, 31, 3)])
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [0, 1, 2], [2, 3, 1], [1, 4]])
def test_every_filter_is_read(shape, filters):
    """Files in our form whose rows another program filtered."""
    pixels = images(shape)
    files = [filtered(image, np.resize(filters, shape[0])) for image in pixels]
    assert np.array_equal(decoded(files, shape), pixels)
    assert decode_png(files, np.empty_like(pixels)) == ([] if max(filters) < 3 else list(range(len(files))))


def filtered(image: np.ndarray, filters: np.ndarray) -> bytes:
    """A PNG whose row y has filter ``filters[y]``, byte by byte as the standard says."""
    height, width, channels = image.shape
    raw = image.reshape(height, -1).astype(int)
    rows = []
    for y, kind in enumerate(filters):
        row = bytearray([kind])
        for x in range(width * channels):
            a = raw[y, x - channels] if x >= channels else 0
            b = raw[y - 1, x] if y else 0
            c = raw[y - 1, x - channels] if y and x >= channels else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row.append((raw[y, x] - [0, a, b, (a + b) // 2, paeth][kind]) % 256)
        rows.append(bytes(row))
    file = encode_png(image[None])[0]
    return file[:33] + chunk(b"IDAT", zlib.compress(b"".join(rows))) + file[-12:]


def rewritten(file: bytes, cut: bool = False, extra: bytes = b"") -> bytes:
    """The same image with its data in several chunks, or with another chunk in front of them."""
    data = b"".join(body for kind, body in chunks(file) if kind == b"IDAT")
    bodies = [data[:10], b"", data[10:]] if cut else [data]
    head = next(body for kind, body in chunks(file) if kind == b"IHDR")
    parts = [(b"IHDR", head)] + ([(extra, b"Comment\0hello")] if extra else [])
    parts += [(b"IDAT", body) for body in bodies] + [(b"IEND", b"")]
    return file[:8] + b"".join(chunk(*part) for part in parts)


def chunks(file: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(file):
        size, kind = struct.unpack_from(">I4s", file, place)
        found.append((kind, file[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(shape: tuple[int, int, int], size: int) -> bytes:
    """Our form, with rows that inflate to ``size`` bytes."""
    file = encode_png(images(shape, 1))[0]
    return file[:33] + chunk(b"IDAT", zlib.compress(bytes(size), 9)) + file[-12:]


GREY, RGB = (9, 70, 1), (9, 70, 3)


@pytest.mark.parametrize(
    ("shape", "file", "message"),
    [
        (GREY, saved(images((70, 9, 1))[0]), "expected grey 70x9, found grey 9x70; restore or remake the folder"),
        (GREY, saved(images(RGB)[0]), "expected grey 70x9, found RGB 70x9"),
        (RGB, saved(images(GREY)[0]), "expected RGB 70x9, found grey 70x9"),
        (RGB, saved(images(RGB)[0], "RGBA"), "expected RGB 70x9, found mode RGBA 70x9"),
        (RGB, saved(images(RGB)[0], "P"), "expected RGB 70x9, found mode P 70x9"),
        (GREY, saved(images(GREY)[0], "1"), "expected grey 70x9, found mode 1 70x9"),
        (GREY, saved(images(GREY)[0], transparency=3), "expected grey 70x9, found grey 70x9 with transparency"),
        (GREY, b"", "not a readable png"),
        (GREY, b"\x89PNG\r\n\x1a\n", "not a readable png"),
        (GREY, b"\xff\xd8\xff", "not a readable png"),
        (GREY, encode_png(images(GREY))[0][:-1], "not a readable png"),
    ],
)
def test_files_that_do_not_belong_are_named(shape, file, message):
    good = encode_png(images(shape))[0]
    with pytest.raises(SynthfastError, match=message) as error:
        decoded([good, file, good], shape)
    assert str(error.value).startswith("file 1: ") and "\n" not in str(error.value) and "0x7f" not in str(error.value)


@pytest.mark.parametrize("shape", [(8, 8, 1), (20, 31, 3)])
def test_no_changed_byte_passes(shape):
    """Every byte is covered by one of PNG's checksums, or is one."""
    file = encode_png(images(shape, 1))[0]
    for place in range(0, len(file), 1 if len(file) < 300 else 7):
        changed = bytearray(file)
        changed[place] ^= 0x10
        out = np.empty((1, *shape), np.uint8)
        assert decode_png([bytes(changed)], out) == [0], place
        with pytest.raises(SynthfastError, match=r"^file 0: "):
            decoded([bytes(changed)], shape)


def test_files_with_the_wrong_number_of_rows_and_bombs_are_refused():
    size = GREY[0] * (1 + GREY[1])
    for wrong in (size - 1, size + 1, 100_000_000):
        out, file = np.empty((1, *GREY), np.uint8), bomb(GREY, wrong)
        tracemalloc.start()
        assert decode_png([file], out) == [0], wrong
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
    assert decode_png([bomb(GREY, size)], np.empty((1, *GREY), np.uint8)) == []
    with pytest.raises(SynthfastError, match="not a readable png"):
        decoded([bomb(GREY, size // 2)], GREY)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_file_raises_anything_else(data):
    whole = data.draw(st.sampled_from([encode_png(images(GREY, 1))[0], saved(images(GREY)[0]), b""]))
    file = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        if file:
            file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    file = bytes(file)[: data.draw(st.integers(0, len(file)))] + data.draw(st.binary(max_size=30))
    try:
        assert decoded([file], GREY).shape == (1, *GREY)
    except SynthfastError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (17, 33, 3)])
@pytest.mark.parametrize("quality", [50, 89, 90, 100])
def test_jpg_is_pillows(shape, quality):
    pixels = images(shape)
    coder = Codec("jpg", shape, quality)
    files = coder.encode(pixels)
    for image, file in zip(pixels, files, strict=True):
        expected = io.BytesIO()
        source = Image.fromarray(image[:, :, 0] if shape[2] == 1 else image)
        source.save(expected, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
        assert file == expected.getvalue() and file.startswith(coder.start) and len(file) <= coder.most_bytes
    assert np.array_equal(coder.decode(files, str), np.stack([pillow(file) for file in files]))
    with pytest.raises(SynthfastError, match=r"^1: not a readable jpg"):
        coder.decode([files[0], encode_png(pixels)[0]], str)


def test_png_files_begin_as_the_codec_says():
    for shape in SHAPES:
        assert all(file.startswith(Codec("png", shape).start) for file in encode_png(images(shape)))
    assert codec_module.CODECS == ("png", "jpg")
