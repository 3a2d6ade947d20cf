"""The images of an ARC: balanced, stratified, split without overlap, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages, Chosen
from synthfast.errors import UsageError
from synthfast.scoring.arc_sets import split_sets

CPU = torch.device("cpu")


def numbered(name: str, count: int, labels: np.ndarray | None = None, first: int = 0, classes: int | None = None):
    """Images of 2 pixels that hold their own number."""
    numbers = np.arange(first, first + count)
    pixels = np.stack([numbers // 256, numbers % 256], 1).astype(np.uint8).reshape(count, 1, 2, 1)
    return ArrayImages(name, [pixels], labels, classes)


def numbers(images: torch.Tensor) -> np.ndarray:
    pair = images.reshape(len(images), 2).numpy().astype(np.int64)
    return pair[:, 0] * 256 + pair[:, 1]


def split(real, synthetic, n=None, held_out=0.25, seed=0):
    return split_sets(real, synthetic, n=n, held_out=held_out, seed=seed, device=CPU)


def parts(sets):
    return {
        "real": [sets.training.real, sets.training.real_validation, sets.real],
        "synthetic": [sets.training.synthetic, sets.training.synthetic_validation, sets.synthetic],
    }


def test_parts_are_balanced_and_share_no_image():
    sets = split(numbered("a", 1000), numbered("b", 3000, first=5000))
    assert sets.counts == {"training": 600, "validation": 150, "held_out": 250}
    for kind, first, count in (("real", 0, 1000), ("synthetic", 5000, 3000)):
        cut = parts(sets)[kind]
        assert [len(part) for part in cut] == [600, 150, 250]
        everything = np.concatenate([numbers(part) for part in cut])
        assert len(np.unique(everything)) == 1000 and everything.min() >= first and everything.max() < first + count
    chosen = np.concatenate([numbers(part) for part in parts(sets)["synthetic"]]) - 5000
    assert 1350 < chosen.mean() < 1650  # from the whole set, not its first images
    assert sets.classes is None and sets.warning is None


@pytest.mark.parametrize(("n", "held_out", "expected"), [(100, 0.25, (60, 15, 25)), (40, 0.5, (14, 6, 20))])
def test_the_number_of_images_and_the_share_held_out(n, held_out, expected):
    assert tuple(split(numbered("a", 300), numbered("b", 400, first=1000), n, held_out).counts.values()) == expected


def test_classes_are_as_frequent_in_one_kind_as_in_the_other():
    rng = np.random.default_rng(0)
    real = rng.choice(3, 900, p=[0.5, 0.3, 0.2])
    synthetic = np.arange(1200) % 3
    sets = split(numbered("a", 900, real), numbered("b", 1200, synthetic, first=2000))
    for ours, theirs in zip(parts(sets)["real"], parts(sets)["synthetic"], strict=True):
        of_real = np.bincount(real[numbers(ours)], minlength=3)
        assert (of_real == np.bincount(synthetic[numbers(theirs) - 2000], minlength=3)).all()
        assert np.allclose(of_real / of_real.sum(), np.bincount(real) / 900, atol=0.01)
    assert (sets.classes == real[numbers(sets.real)]).all()
    assert (sets.classes == synthetic[numbers(sets.synthetic) - 2000]).all()
    # Class 0 is half of the real images, and there are 400 synthetic ones of it.
    assert sum(sets.counts.values()) == int(400 / (np.bincount(real)[0] / 900))


def test_classes_in_very_different_proportions_are_drawn_as_they_come_with_a_warning():
    real, synthetic = np.arange(600) % 3, np.repeat([0, 0, 0, 1], 150)  # class 2 is missing
    sets = split(numbered("a", 600, real, classes=3), numbered("b", 600, synthetic, first=1000, classes=3))
    assert sets.classes is None and "in different proportions" in sets.warning
    assert sum(sets.counts.values()) == 600


def test_labels_of_other_classes_do_not_count():
    sets = split(numbered("a", 300, np.arange(300) % 3), numbered("b", 300, np.arange(300) % 5, first=1000))
    assert sets.classes is None and sets.warning is None


def test_the_split_depends_on_the_seed_alone():
    sets = [split(numbered("a", 100), numbered("b", 100, first=1000), seed=seed) for seed in (0, 0, 1, -1)]
    cut = [numbers(s.real).tolist() for s in sets]
    assert cut[0] == cut[1] and cut[0] != cut[2] != cut[3]
    assert sorted(numbers(sets[0].real)) != sorted(numbers(sets[0].synthetic) - 1000)  # a stream for each kind


def test_two_halves_of_a_set_are_different_sets():
    images = numbered("a", 100)
    split(Chosen(images, np.arange(0, 100, 2)), Chosen(images, np.arange(1, 100, 2)))


@pytest.mark.parametrize(
    ("real", "synthetic", "n", "message"),
    [
        (numbered("a", 50), numbered("b", 50), None, "b: holds the same images as a, so nothing could tell them apart"),
        (
            numbered("a", 19),
            numbered("b", 50, first=99),
            None,
            "a and b: expected at least 20 images of each, found 19",
        ),
        (
            numbered("a", 90),
            numbered("b", 50, first=99),
            60,
            "--n 60: b holds 50 images; lower it or take a larger set",
        ),
        (
            numbered("a", 90),
            ArrayImages("c", [np.zeros((50, 2, 1, 1), np.uint8)]),
            None,
            r"c: expected images [1, 2, 1] as a has, found [2, 1, 1]; choose sets of one size",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(real, synthetic, n, message):
    with pytest.raises(UsageError) as caught:
        split(real, synthetic, n)
    assert str(caught.value).startswith(message)
