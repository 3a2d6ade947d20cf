from __future__ import annotations

import numpy as np
import pytest

from synthfast.assets.make_digits import DIGITS, build_digits, digits_bytes
from synthfast.data import open_images


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(DIGITS, allow_pickle=False) as file:
        return dict(file)


def test_pixels_and_labels_are_those_of_scikit_learn(arrays):
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    np.testing.assert_array_equal(arrays["image"], np.floor(raw.images * 255 / 16 + 0.5).astype(np.uint8))
    np.testing.assert_array_equal(np.rint(arrays["image"] * (16 / 255)), raw.images)
    np.testing.assert_array_equal(arrays["label"], raw.target)
    assert arrays["image"].shape == (1797, 8, 8)


def test_split_is_stratified_disjoint_and_whole(arrays):
    train, test = arrays["train"], arrays["test"]
    assert np.bincount(arrays["label"][train]).tolist() == [50] * 10
    assert len(train) == 500 and len(test) == 1297
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))


def test_shipped_file_is_what_the_script_builds(arrays):
    pytest.importorskip("sklearn")
    assert digits_bytes() == digits_bytes()
    built = build_digits()
    assert list(built) == list(arrays)
    for name, array in built.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_open_images_gives_each_part_of_the_split(arrays):
    for split, count in (("train", 500), ("test", 1297)):
        images = open_images("digits", split=split)
        assert (len(images), images.shape, images.classes) == (count, (8, 8, 1), 10)
        rows = arrays[split]
        np.testing.assert_array_equal(images.read(np.arange(count))[..., 0], arrays["image"][rows])
        np.testing.assert_array_equal(images.labels, arrays["label"][rows])
    assert open_images("digits").fingerprint() == open_images("digits:train").fingerprint()
    assert open_images("digits").fingerprint() != open_images("digits:test").fingerprint()
