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


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, "L")])
def test_the_file_is_a_picture(tmp_path, channels, mode):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    write_grid(tmp_path / "sheet.png", images, 3)
    picture = Image.open(tmp_path / "sheet.png")
    assert picture.mode == mode
    assert picture.size == (3 * 54 + 6, 2 * 54 + 6)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
