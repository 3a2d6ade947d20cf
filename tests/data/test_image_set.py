from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthfast.data import ArrayImages
from synthfast.errors import SynthfastError

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 3), np.uint8)
LABELS = np.arange(50) % 4


@settings(max_examples=50, deadline=None)
@given(cuts=st.sets(st.integers(1, 49), max_size=6), indices=st.lists(st.integers(0, 49), max_size=30))
def test_parts_read_as_one_array(cuts, indices):
    images = ArrayImages("toy", np.split(IMAGES, sorted(cuts)), LABELS)
    read = images.read(np.array(indices, np.int64))
    np.testing.assert_array_equal(read, IMAGES[indices])
    assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable
    assert not np.shares_memory(read, IMAGES)


def test_planar_parts_read_as_pixels():
    planar = IMAGES.transpose(0, 3, 1, 2).reshape(50, -1)
    images = ArrayImages("toy", [planar[:20], planar[20:]], LABELS, planar=(3, 4, 3))
    np.testing.assert_array_equal(images.read(np.arange(50)), IMAGES)
    assert images.read(np.arange(5)).flags.c_contiguous
    assert images.fingerprint() == ArrayImages("other", [IMAGES], LABELS).fingerprint()


def test_fingerprint_sees_pixels_labels_and_order():
    prints = {ArrayImages("toy", [IMAGES], LABELS).fingerprint()}
    changed = IMAGES.copy()
    changed[-1, -1, -1, -1] ^= 1
    prints.add(ArrayImages("toy", [changed], LABELS).fingerprint())
    prints.add(ArrayImages("toy", [IMAGES[::-1]], LABELS).fingerprint())
    prints.add(ArrayImages("toy", [IMAGES], LABELS[::-1]).fingerprint())
    prints.add(ArrayImages("toy", [IMAGES]).fingerprint())
    prints.add(ArrayImages("toy", [IMAGES], LABELS, classes=5).fingerprint())
    assert len(prints) == 6


def test_labels_become_int64_and_say_the_classes():
    images = ArrayImages("toy", [IMAGES], LABELS.astype(np.uint8))
    assert images.labels.dtype == np.int64 and images.classes == 4
    assert ArrayImages("toy", [IMAGES]).classes is None
    assert "50 images 3x4x3, 4 classes" in repr(images)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (LABELS[:-1], None, r"integers \[50\], one per image, found int64 \[49\]"),
        (LABELS.astype(np.float32), None, r"found float32 \[50\]"),
        (LABELS - 1, None, "0 or more, found -1 to 2"),
        (LABELS, 3, r"in \[0, 2\], found 0 to 3"),
    ],
)
def test_wrong_labels_are_refused(labels, classes, message):
    with pytest.raises(SynthfastError, match=message):
        ArrayImages("toy", [IMAGES], labels, classes)


def test_empty_set_is_refused():
    with pytest.raises(SynthfastError, match="holds no images"):
        ArrayImages("toy", [IMAGES[:0]])


@pytest.mark.parametrize("indices", [[-1], [50], [0, 99]])
def test_index_outside_is_refused(indices):
    with pytest.raises(IndexError, match=r"\[0, 50\)"):
        ArrayImages("toy", [IMAGES]).read(np.array(indices))


@pytest.mark.parametrize("indices", [np.array([0.0]), np.array([[1]]), np.array(3)])
def test_indices_must_be_integers_in_a_row(indices):
    with pytest.raises(TypeError, match="integers"):
        ArrayImages("toy", [IMAGES]).read(indices)


def test_threads_read_at_once():
    images = ArrayImages("toy", np.split(IMAGES, [7, 30]))
    wrong = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            indices = random.integers(0, 50, 20)
            if not np.array_equal(images.read(indices), IMAGES[indices]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
