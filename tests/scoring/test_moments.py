"""Moments in one pass: of parts, over batches, and in files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.scoring.features import load_features
from synthfast.scoring.moments import (
    PARTS,
    Gathered,
    Moments,
    draw,
    gather,
    merge,
    read_statistics,
    save_statistics,
    together,
)

SHAPE, CPU = (3, 4, 1), torch.device("cpu")


def images(count: int = 100, classes: int = 3) -> ArrayImages:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, *SHAPE), np.uint8)
    return ArrayImages("toy", [pixels], random.integers(0, classes, count), classes)


def collect(toy: ArrayImages, items: np.ndarray | None = None, **options: object) -> Gathered:
    drawn = draw(len(toy), toy.labels, 0)
    items = np.arange(len(toy)) if items is None else items
    with Ranks("cpu") as ranks:
        return gather(load_features("pixels", SHAPE, CPU), toy, items, drawn, ranks, **{"keep": 10, **options})


def same(a: Moments, b: Moments, rel: float = 1e-12) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=rel, atol=rel)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=rel, atol=rel * float(a.scatter.abs().max()))


@pytest.mark.parametrize("cuts", [[], [50], [0, 1, 1, 99], [10, 20, 30]])
def test_moments_of_pieces_are_those_of_the_whole(generator, cuts):
    x = torch.randn(100, 7, generator=generator, dtype=torch.float64) + 1e4  # the mean is far larger than the spread
    pieces = [Moments.of(piece) for piece in np.split(x, cuts)]
    whole = merge([Moments.none(7), *pieces])
    same(whole, Moments.of(x), 1e-10)
    np.testing.assert_allclose(whole.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-10)


def test_merging_changes_neither(generator):
    one, two = (Moments.of(torch.randn(5, 3, generator=generator)) for _ in range(2))
    before = one.scatter.clone(), two.scatter.clone()
    one.merged(two)
    assert torch.equal(one.scatter, before[0]) and torch.equal(two.scatter, before[1])


def test_parts_are_random_equal_and_have_their_share_of_every_class():
    labels = np.arange(1000) % 10  # balanced, in a cycle, as generators sample them
    drawn = draw(1000, labels, 5)
    assert sorted(drawn.place) == list(range(1000))
    for part in range(PARTS):
        mine = drawn.part == part
        assert 83 <= mine.sum() <= 84
        counts = np.bincount(labels[mine], minlength=10)
        assert counts.min() >= 8 and counts.max() <= 9
    again, other, without = draw(1000, labels, 5), draw(1000, labels, 6), draw(1000, None, 5)
    assert np.array_equal(drawn.part, again.part) and np.array_equal(drawn.place, again.place)
    assert (drawn.part == other.part).mean() < 0.2
    assert np.array_equal(drawn.place, without.place)
    # Unlike a part every 12th image, which would hold five of the ten classes.
    assert np.bincount(without.part).max() == 84 and np.bincount(labels[without.part == 0], minlength=10).min() > 0


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_image_counts_once_in_its_part(batch_size):
    toy, seen = images(), []
    drawn = draw(100, toy.labels, 0)
    found = collect(toy, keep=30, batch_size=batch_size, report=seen.append)
    pixels = torch.from_numpy(toy.read(np.arange(100)).reshape(100, -1)).double() / 255
    assert found.count == 100 == sum(seen) and max(seen) <= batch_size
    for part in range(PARTS):
        same(found.parts[part], Moments.of(pixels[drawn.part == part]), 1e-6)
    first = np.argsort(drawn.place)[:30]
    assert torch.allclose(found.features.double(), pixels[first], atol=1e-7)
    assert np.array_equal(found.part, drawn.part[first]) and np.array_equal(found.place, np.arange(30))


def test_classes_together_are_the_whole():
    toy = images()
    whole = collect(toy, keep=25)
    pieces = [collect(toy, np.flatnonzero(toy.labels == label), keep=25) for label in (2, 0, 1)]
    pieces.append(collect(toy, np.arange(0), keep=25))  # a class that has no image
    joined = together(pieces, 25)
    for one, two in zip(joined.parts, whole.parts, strict=True):
        same(one, two, 1e-9)
    order = np.argsort(joined.place)
    assert torch.equal(joined.features[torch.from_numpy(order)], whole.features)
    assert np.array_equal(joined.part[order], whole.part) and np.array_equal(joined.place[order], whole.place)


def test_statistics_in_a_file(tmp_path):
    features = load_features("pixels", SHAPE, CPU)
    moments = merge(collect(images()).parts)
    path = tmp_path / "stats.npz"
    save_statistics(str(path), moments, features)
    same(read_statistics(path, features), moments)
    arrays = np.load(path)
    assert set(arrays) == {"mu", "sigma", "count", "features"} and arrays["count"] == 100
    np.testing.assert_allclose(arrays["sigma"], moments.covariance)
    # As pytorch-fid and EDM publish them.
    np.savez(path, mu=arrays["mu"], sigma=arrays["sigma"])
    torch.testing.assert_close(read_statistics(path, features).covariance, moments.covariance)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"mu": np.zeros(12)}, SynthfastError, "expected an array 'sigma', found mu"),
        (
            {"mu": np.zeros(12), "sigma": np.eye(11)},
            SynthfastError,
            r"expected numbers mu \[d\] and sigma \[d, d\], found",
        ),
        ({"mu": np.zeros(12, int), "sigma": np.eye(12)}, SynthfastError, r"expected numbers mu \[d\] and sigma"),
        ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, SynthfastError, "expected finite numbers, found NaN"),
        (
            {"mu": np.zeros(9), "sigma": np.eye(9)},
            UsageError,
            "expected statistics of 12 features like pixels, found 9",
        ),
        (
            {"mu": np.zeros(12), "sigma": np.eye(12), "count": 1},
            SynthfastError,
            "expected statistics of at least 2 images",
        ),
        (
            {"mu": np.zeros(12), "sigma": np.eye(12), "count": "many"},
            SynthfastError,
            r"expected a whole number 'count', found <U4 \[\]",
        ),
        ({"mu": np.zeros(12), "sigma": np.eye(12), "count": [3, 4]}, SynthfastError, r"'count', found int64 \[2\]"),
        ({"mu": np.zeros(()), "sigma": np.ones(())}, SynthfastError, r"expected numbers mu \[d\]"),
        (
            {"mu": np.zeros(12), "sigma": np.eye(12), "features": "other"},
            UsageError,
            "was made with other features than pixels, or other weights",
        ),
    ],
)
def test_a_file_of_other_statistics_is_refused(tmp_path, arrays, error, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(error, match=message) as caught:
        read_statistics(path, load_features("pixels", SHAPE, CPU))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(SynthfastError, match="no such file of statistics; check the path"):
        read_statistics(tmp_path / "none.npz", load_features("pixels", SHAPE, CPU))
