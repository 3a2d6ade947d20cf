"""Which files every decoder takes for the same pixels, and what becomes of the others."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from synthfast.data import open_images
from synthfast.data.loaders import Augment, Wanted, open_loader
from synthfast.data.loaders.encoded import bare_png, encoded_images, is_plain
from synthfast.errors import SynthfastError

CPU = torch.device("cpu")
SHAPE = (16, 24, 3)


def pixels(channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (16, 24, channels), np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(seed=0):
    return Image.fromarray(pixels(seed=seed))


def text():
    note = PngImagePlugin.PngInfo()
    note.add_text("author", "nobody")
    return note


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return exif


PLAIN = {
    "png": lambda: saved(rgb()),
    "png with text": lambda: saved(rgb(), pnginfo=text()),
    "bare png": lambda: bare_png(pixels()),
    "jpg": lambda: saved(rgb(), "JPEG", quality=70),
    "jpg 4:4:4": lambda: saved(rgb(), "JPEG", quality=95, subsampling=0),
    "jpg 4:2:2": lambda: saved(rgb(), "JPEG", subsampling=1),
    "progressive jpg": lambda: saved(rgb(), "JPEG", progressive=True),
    "jpg with optimized tables": lambda: saved(rgb(), "JPEG", optimize=True, comment=b"\xff\xc0\xff\xda"),
    "jpg to be turned": lambda: saved(rgb(), "JPEG", exif=oriented()),
}
NOT_PLAIN = {
    "palette": lambda: saved(rgb().quantize(16)),
    "opaque": lambda: saved(rgb().convert("RGBA")),
    "gamma": lambda: saved(rgb(), pnginfo=gamma()),
    "bmp": lambda: saved(rgb(), "BMP"),
    "webp": lambda: saved(rgb(), "WEBP", lossless=True),
    "cmyk": lambda: saved(rgb().convert("CMYK"), "JPEG"),
    "jpg with a tail": lambda: saved(rgb(), "JPEG") + b"tail",
}
# Files that read refuses, and words of its message.
REFUSED = {
    "grey": (lambda: saved(rgb().convert("L")), "expected RGB as in .*, found grey"),
    "grey jpg": (lambda: saved(rgb().convert("L"), "JPEG"), "expected RGB as in .*, found grey"),
    "16 bits": (lambda: saved(Image.fromarray(np.zeros((16, 24), np.uint16))), "expected 8 bits per channel"),
    "another size": (lambda: saved(rgb().crop((0, 0, 16, 24))), "expected 24x16 pixels"),
    "another size jpg": (lambda: saved(rgb().crop((0, 0, 16, 24)), "JPEG"), "expected 24x16 pixels"),
    "transparent": (lambda: saved(rgb(), transparency=tuple(pixels()[0, 0].tolist())), "has transparent pixels"),
    "cut png": (lambda: saved(rgb())[:-200], "not a readable image"),
    "cut jpg": (lambda: saved(rgb(), "JPEG")[:-200], "not a readable image"),
    "flipped png": (lambda: flipped(saved(rgb()), 300), "not a readable image"),
    "empty": (lambda: b"", "not a readable image"),
    "text": (lambda: b"not an image" * 9, "not a readable image"),
}


def gamma():
    note = PngImagePlugin.PngInfo()
    note.add(b"gAMA", (200_000).to_bytes(4, "big"))
    return note


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def folder(path, *files):
    """A first image to compare with, then these."""
    path.mkdir(exist_ok=True)
    for number, data in enumerate((saved(rgb(9)), *files)):
        (path / f"{number:03d}.png").write_bytes(data)
    return open_images(f"folder:{path}")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files(name):
    data = PLAIN[name]()
    assert is_plain(data, SHAPE)
    assert not is_plain(data, (24, 16, 3)) and not is_plain(data, (16, 24, 1))
    for end in (*range(0, 60), len(data) // 2, len(data) - 1):
        assert not is_plain(data[:end], SHAPE)


@pytest.mark.parametrize("name", [*NOT_PLAIN, *REFUSED])
def test_other_files(name):
    data = NOT_PLAIN[name]() if name in NOT_PLAIN else REFUSED[name][0]()
    assert not is_plain(data, SHAPE)


def test_grey_files():
    grey = Image.fromarray(pixels()).convert("L")
    assert is_plain(saved(grey), (16, 24, 1)) and is_plain(saved(grey, "JPEG"), (16, 24, 1))
    assert is_plain(bare_png(pixels(1)), (16, 24, 1))


@pytest.mark.parametrize("place", [8, 12, 16, 20, 25, 29, 40, 300, -13, -9, -5, -1])
def test_a_changed_bit_of_a_png_is_seen(place):
    data = saved(rgb())
    assert not is_plain(flipped(data, place % len(data)), SHAPE)


@pytest.mark.parametrize("name", ["jpg", "jpg 4:4:4", "jpg 4:2:2", "progressive jpg", "jpg to be turned"])
def test_a_jpg_whose_headers_end_before_its_pixels_is_seen(name):
    data = PLAIN[name]()
    at = next(at for at in (data.find(bytes((0xFF, frame))) for frame in (0xC0, 0xC1, 0xC2)) if at > 0)
    after = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    for change in (b"\xff" * 30, bytes(30), data[at:after]):
        assert not is_plain(data[:after] + change + data[after + len(change) :], SHAPE)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_bare_png_is_a_png(channels):
    with Image.open(io.BytesIO(bare_png(pixels(channels)))) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image).reshape(16, 24, channels), pixels(channels))


@pytest.mark.parametrize("name", [*PLAIN, *NOT_PLAIN])
def test_dali_gives_what_read_gives(name, tmp_path):
    """Of jpg too, on a CPU: both decode with libjpeg-turbo, and with smooth colours."""
    pytest.importorskip("nvidia.dali")
    images = folder(tmp_path, {**PLAIN, **NOT_PLAIN}[name]())
    items = np.array([1, 0, 1])
    found = open_loader("dali", [images], CPU).batch(Wanted((items,))).images
    assert np.array_equal(found.numpy(), images.read(items))


@pytest.mark.parametrize("kind", ["dali", "torch"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_read_refuses_is_refused_in_its_words(name, kind, tmp_path, capfd):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    make, words = REFUSED[name]
    images = folder(tmp_path, saved(rgb(1)), make(), saved(rgb(2)))
    loader = open_loader(kind, [images], CPU, Augment(0, 2, True), workers=2)
    with pytest.raises(SynthfastError, match=rf"002\.png: .*{words}") as caught:
        list(loader.batches(lambda step: Wanted((np.array([0, step % 4]),), np.arange(2)), 0, 9))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_sets_without_files_and_parts_of_those_with(made):
    assert (
        encoded_images(made("memory"))
        is encoded_images(made("shards"))
        is encoded_images(made("chosen shards"))
        is None
    )
    whole, part = (encoded_images(made(kind)) for kind in ("png", "chosen png"))
    assert part(np.array([2, 0])) == whole(np.array([9, 5]))
