"""Copies of training images are found, and new images are flagged at the rate that is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.data import open_images
from synthfast.errors import UsageError
from synthfast.scoring.memorization import Memorization, check_null_share


def pixels(source, count=None):
    images = open_images(source)
    read = images.read(np.arange(count or len(images)))
    return torch.from_numpy(read.reshape(len(read), -1).astype(np.float32) / 255)


def normal(seed, count, dimensions=8):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32))


@pytest.fixture(scope="module")
def digits():
    return Memorization(pixels("digits"), 5, "digits")


def test_distance_and_ratio_by_their_definition():
    train, images = normal(0, 40), normal(1, 25)
    found = Memorization(train, 3, "toy")(images)
    all_pairs = torch.cdist(images.double(), train.double()).numpy()
    own = np.sort(torch.cdist(train.double(), train.double()).numpy(), 1)[:, 3]  # itself is the first
    assert found.index.tolist() == all_pairs.argmin(1).tolist()
    assert np.allclose(found.distance, all_pairs.min(1), rtol=1e-6)
    assert np.allclose(found.ratio, all_pairs.min(1) / own[found.index], rtol=1e-5)


def test_a_training_image_is_compared_as_if_it_were_new():
    train = normal(2, 30, 3)
    null = Memorization(train, 3, "toy")
    for i in (0, 7, 29):
        rest = torch.cat([train[:i], train[i + 1 :]])
        found = Memorization(rest, 3, "toy")(train[i : i + 1])
        assert null.null_distance[i] == found.distance[0]
        assert null.null_ratio[i] == pytest.approx(found.ratio[0], rel=1e-6)


def test_p_values_of_new_images_are_uniform():
    rates = []
    for seed in range(30):
        points = normal(seed, 900)
        p = Memorization(points[:300], 5, "toy")(points[300:]).p
        rates.append([(p <= share).mean() for share in (0.02, 0.1, 0.5)])
    # A rate scatters by sqrt(s (1 - s) (1 / 300 + 1 / 600)) from set to set, 0.003, 0.006 and 0.010 of the mean of 30.
    assert (abs(np.mean(rates, 0) - (0.02, 0.1, 0.5)) < (0.006, 0.012, 0.025)).all()


def test_real_test_images_are_flagged_at_the_null_rate_and_copies_always(digits):
    new = digits(pixels("digits:test"))
    for share in (0.01, 0.05, 0.1):
        scatter = 3 * np.sqrt(share * (1 - share) * (1 / 500 + 1 / 1297))
        assert abs((new.p <= share).mean() - share) < scatter
    train = pixels("digits")
    assert (digits(train).p <= 0.01).all() and (digits(train).index == np.arange(500)).all()
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 4 / 255, train.shape).astype(np.float32))
    near = digits((train + noise).clamp(0, 1))
    assert (near.p <= 0.01).all() and (near.index == np.arange(500)).mean() > 0.99


def test_the_ratio_keeps_plain_regions_from_being_flagged():
    """Half of the images lie a hundred times as close together: a distance alone would flag all new ones there first."""
    points = normal(3, 1200)
    points[::2] *= 0.01
    found = Memorization(points[:400], 5, "toy")(points[400:])
    dense = np.arange(800) % 2 == 0
    flagged = found.p <= 0.05
    assert 0.02 < flagged.mean() < 0.09
    # All of the flagged are in the dense half, for both tests must agree, but they are few of it.
    assert flagged[dense].mean() < 0.16 and found.distance[dense].max() < found.distance[~dense].min()


@pytest.mark.parametrize("share", [0.01, 0.02, 0.1, 0.5, 0.9])
def test_the_threshold_says_what_is_flagged(digits, share):
    threshold = digits.thresholds(share)
    for images in (pixels("digits:test"), pixels("digits", 50)):
        found = digits(images)
        below = (found.distance < threshold["distance"]) & (found.ratio < threshold["ratio"])
        assert below.tolist() == (found.p <= np.float32(share)).tolist()


def test_what_does_not_depend_on_other_images(digits):
    images = pixels("digits:test", 30)
    whole = digits(images)
    parts = [digits(images[first : first + 7]) for first in range(0, 30, 7)]
    for name in ("index", "distance", "ratio", "p"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()


def test_copies_among_the_training_images():
    points = normal(4, 100)
    points[50:] = points[:50]  # all have a copy: a copy is nothing special
    twins = Memorization(points, 3, "toy")
    assert twins.thresholds(0.05) == {"distance": 0.0, "ratio": 0.0}
    assert (twins(points).p == 1).all() and np.isfinite(twins(points).ratio).all()
    points = normal(4, 100)
    points[:10] = points[0]  # ten alike, more than k: regions of size 0
    same = Memorization(points, 3, "toy")
    found = same(torch.cat([points[:1], points[:1] + 1e-3, points[20:21]]))
    assert np.isfinite(found.ratio).all() and found.ratio[0] == 0 and found.ratio[1] > 1e30
    assert found.p[2] > 0.1  # copies are flagged less readily where a tenth of the training images are copies
    assert Memorization(normal(4, 100), 3, "toy")(points[20:21]).p[0] == pytest.approx(1 / 101)


def test_a_share_that_so_few_images_cannot_tell():
    check_null_share(0.01, 99)
    with pytest.raises(
        UsageError, match=r"^--null-share 0\.01: 98 training images tell shares from 0\.0101 on; raise it$"
    ):
        check_null_share(0.01, 98)
    with pytest.raises(UsageError, match=r"^-k 5: toy has 6 images, expected at least k \+ 2; lower it$"):
        Memorization(normal(0, 6), 5, "toy")
    assert len(Memorization(normal(0, 7), 5, "toy")(normal(1, 3)).p) == 3
