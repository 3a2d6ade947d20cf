from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.data import open_images
from synthfast.errors import SynthfastError, UsageError


def save(path: Path, pixels: np.ndarray, **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_class_folders_give_labels_in_name_order(tmp_path):
    expected = [
        save(tmp_path / "bird" / "2.png", noise(5, 6, 3, seed=1)),
        save(tmp_path / "bird" / "deep" / "1.bmp", noise(5, 6, 3, seed=2)),
        save(tmp_path / "cat" / "9.WEBP", noise(5, 6, 3, seed=3), lossless=True),
    ]
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    save(tmp_path / "cat" / ".hidden.png", noise(9, 9))
    images = open_images(f"folder:{tmp_path}")
    assert images.class_names == ("bird", "cat") and images.classes == 2
    assert images.labels.tolist() == [0, 0, 1] and images.labels.dtype == np.int64
    np.testing.assert_array_equal(images.read(np.arange(3)), expected)
    np.testing.assert_array_equal(images.read(np.array([2, 0, 2])), [expected[2], expected[0], expected[2]])


def test_flat_grey_folder_has_no_labels(tmp_path):
    expected = [save(tmp_path / f"{i:02d}.png", noise(4, 4, seed=i)) for i in range(20)]
    (tmp_path / "empty").mkdir()
    images = open_images(f"folder:{tmp_path}")
    assert (images.labels, images.classes, images.class_names, images.shape) == (None, None, None, (4, 4, 1))
    np.testing.assert_array_equal(images.read(np.arange(20))[..., 0], expected)


def test_jpeg_is_decoded(tmp_path):
    pixels = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    save(tmp_path / "a.jpg", pixels, quality=95)
    read = open_images(f"folder:{tmp_path}").read(np.array([0]))[0]
    assert np.abs(read.astype(int) - pixels).max() <= 4


def test_image_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)  # the middle third is what is kept
    save(tmp_path / "wide.png", wide)
    tall = np.zeros((30, 10, 3), np.uint8)
    tall[10:20] = (0, 255, 0)
    save(tmp_path / "tall.png", tall)
    images = open_images(f"folder:{tmp_path}", image_size=10)
    assert images.shape == (10, 10, 3)
    read = images.read(np.arange(2))
    assert (read[0, 3:7, 3:7] == (0, 255, 0)).all() and (read[1, 3:7, 3:7] == (255, 0, 0)).all()
    np.testing.assert_array_equal(read[0], tall[10:20])  # already 10 wide: cut, not resampled


def test_resizing_averages_what_it_drops(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "a.png", stripes)
    read = open_images(f"folder:{tmp_path}", image_size=8).read(np.array([0]))
    assert 110 <= read[0, 2:6, 2:6].min() <= read[0, 2:6, 2:6].max() <= 145  # without antialiasing: 0 or 255


def test_mixed_sizes_are_named(tmp_path):
    save(tmp_path / "a.png", noise(4, 4, 3))
    save(tmp_path / "b.png", noise(4, 5, 3))
    images = open_images(f"folder:{tmp_path}")
    with pytest.raises(
        SynthfastError, match=r"b\.png: expected 4x4 pixels as in a\.png, found 5x4; give an image size"
    ):
        images.read(np.arange(2))


@pytest.mark.parametrize(("first", "second"), [((4, 4), (4, 4, 3)), ((4, 4, 3), (4, 4))])
def test_mixed_grey_and_colour_is_named(tmp_path, first, second):
    save(tmp_path / "a.png", noise(*first))
    save(tmp_path / "b.png", noise(*second))
    with pytest.raises(SynthfastError, match=r"b\.png: expected (grey|RGB) as in a\.png, found (grey|RGB)"):
        open_images(f"folder:{tmp_path}", image_size=4).read(np.arange(2))


def test_transparency_is_refused_unless_opaque(tmp_path):
    opaque = noise(4, 4, 4)
    opaque[..., 3] = 255
    save(tmp_path / "a.png", opaque)
    images = open_images(f"folder:{tmp_path}")
    np.testing.assert_array_equal(images.read(np.array([0]))[0], opaque[..., :3])
    opaque[0, 0, 3] = 254
    save(tmp_path / "a.png", opaque)
    with pytest.raises(SynthfastError, match=r"a\.png: has transparent pixels"):
        images.read(np.array([0]))


def test_palette_and_bilevel_images_are_read(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "b").mkdir()
    palette = Image.fromarray(noise(4, 4, 3) // 128 * 255).quantize(8)
    palette.save(tmp_path / "p" / "a.png")
    np.testing.assert_array_equal(
        open_images(f"folder:{tmp_path / 'p'}").read(np.array([0]))[0], np.asarray(palette.convert("RGB"))
    )
    Image.fromarray(noise(4, 4) > 127).save(tmp_path / "b" / "a.png")
    read = open_images(f"folder:{tmp_path / 'b'}").read(np.array([0]))
    np.testing.assert_array_equal(read[0, ..., 0], (noise(4, 4) > 127) * 255)


def test_sixteen_bits_are_refused(tmp_path):
    save(tmp_path / "a.png", noise(4, 4).astype(np.uint16) * 256)
    with pytest.raises(SynthfastError, match=r"a\.png: expected 8 bits per channel"):
        open_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_broken_file_is_named(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", noise(32, 32, 3))
    save(tmp_path / f"b.{suffix}", noise(32, 32, 3))
    images = open_images(f"folder:{tmp_path}")
    broken = tmp_path / f"b.{suffix}"
    whole = broken.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        broken.write_bytes(damaged)
        with pytest.raises(SynthfastError, match=rf"b\.{suffix}: not a readable image") as error:
            images.read(np.arange(2))
        assert "\n" not in str(error.value)
    broken.unlink()
    with pytest.raises(SynthfastError, match=rf"b\.{suffix}: no such file"):
        images.read(np.arange(2))


def test_folders_that_cannot_be_a_set(tmp_path):
    with pytest.raises(SynthfastError, match="expected a folder of images, found nothing"):
        open_images(f"folder:{tmp_path / 'absent'}")
    with pytest.raises(SynthfastError, match=r"holds no images \(\.png, "):
        open_images(f"folder:{tmp_path}")
    save(tmp_path / "cat" / "a.png", noise(4, 4))
    (tmp_path / "dog").mkdir()
    with pytest.raises(SynthfastError, match="dog: a class folder without images"):
        open_images(f"folder:{tmp_path}")
    save(tmp_path / "dog" / "a.png", noise(4, 4))
    assert len(open_images(f"folder:{tmp_path}")) == 2
    save(tmp_path / "stray.png", noise(4, 4))
    with pytest.raises(SynthfastError, match=r"both images \(stray\.png\) and class folders \(cat\)"):
        open_images(f"folder:{tmp_path}")
    with pytest.raises(SynthfastError, match="found a file"):
        open_images(f"folder:{tmp_path / 'stray.png'}")
    with pytest.raises(UsageError, match="at least 1, found 0"):
        open_images(f"folder:{tmp_path / 'cat'}", image_size=0)


def test_fingerprint_follows_names_sizes_and_times(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    first = open_images(f"folder:{tmp_path}").fingerprint()
    assert first == open_images(f"folder:{tmp_path}").fingerprint()
    os.utime(tmp_path / "a.png", ns=(1, 1))
    touched = open_images(f"folder:{tmp_path}").fingerprint()
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    renamed = open_images(f"folder:{tmp_path}").fingerprint()
    resized = open_images(f"folder:{tmp_path}", image_size=2).fingerprint()
    assert len({first, touched, renamed, resized}) == 4


def test_a_shard_folder_is_no_image_folder(shards):
    save(shards / "preview.png", noise(4, 5, 3))
    with pytest.raises(UsageError, match=r"is a shard folder, .* write .*shards$"):
        open_images(f"folder:{shards}")
