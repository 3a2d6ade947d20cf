"""Contact sheets: where images stand, how large they are drawn, which colours a file has."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from synthfast.data.grids import grid, write_grid


def test_images_stand_in_rows_with_white_between():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1).repeat(4, 2)
    sheet = grid(images, columns=2, scale=1)
    assert sheet.shape == (2 * 3 + 1, 2 * 5 + 1, 1)
    assert (sheet[1:3, 1:5] == 0).all()
    assert (sheet[1:3, 6:10] == 1).all()
    assert (sheet[4:6, 1:5] == 2).all()
    assert (sheet[4:6, 6:10] == 255).all()
    assert (sheet[0] == 255).all() and (sheet[:, 5] == 255).all() and (sheet[3] == 255).all()


def test_scale_repeats_pixels():
    images = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    sheet = grid(images, columns=1, scale=3)[3:-3, 3:-3, 0]
    np.testing.assert_array_equal(sheet, images[0, :, :, 0].repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(("width", "scale"), [(1, 48), (8, 6), (16, 3), (28, 2), (48, 1), (64, 1), (1000, 1)])
def test_images_are_drawn_about_48_pixels_wide_and_never_smaller_than_they_are(width, scale):
    sheet = grid(np.zeros((2, 1, width, 3), np.uint8), columns=2)
    assert sheet.shape == (3 * scale, 2 * width * scale + 3 * scale, 3)


def test_colours_and_rectangles_keep_their_order():
    images = np.random.default_rng(0).integers(0, 255, (6, 2, 3, 3), dtype=np.uint8)
    sheet = grid(images, columns=3, scale=2, gap=2)
    assert sheet.shape == (2 * 4 + 3 * 4, 3 * 6 + 4 * 4, 3)
    for k, image in enumerate(images):
        top, left = 4 + k // 3 * 8, 4 + k % 3 * 10
        np.testing.assert_array_equal(sheet[top : top + 4 : 2, left : left + 6 : 2], image)
        np.testing.assert_array_equal(sheet[top + 1 : top + 4 : 2, left + 1 : left + 6 : 2], image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, "L")])
def test_the_file_is_a_picture(tmp_path, channels, mode):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    write_grid(tmp_path / "sheet.png", images, 3)
    picture = Image.open(tmp_path / "sheet.png")
    assert picture.mode == mode
    assert picture.size == (3 * 54 + 6, 2 * 54 + 6)
    pixels = np.asarray(picture).reshape(114, 168, -1)
    np.testing.assert_array_equal(pixels[60:108:6, 60:108:6], images[4, ..., : pixels.shape[2]])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
