"""Which images are selected, and with which weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import rankdata

from synthfast.config import SelectConfig
from synthfast.data.selection import read_selection
from synthfast.errors import SynthfastError, UsageError
from synthfast.selection.choose import best, low_density_weights, ranks, select


@pytest.fixture
def chosen(images, tmp_path):
    """``select`` from the 60 images by options; returns the selection and its manifest."""

    def choose(source=images, **options):
        config = SelectConfig(folder=(str(source.path),), out=str(tmp_path / "chosen.npy"), **options)
        manifest = select(config)
        assert json.loads((tmp_path / "chosen.json").read_text()) == manifest
        return read_selection(config.out, source), manifest

    return choose


def best_of(values, count):
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


@pytest.mark.parametrize(
    ("by", "column", "sign"),
    [("discriminator", "discriminator", 1), ("density", "density_distance", -1), ("confidence", "confidence", 1)],
)
def test_the_best_by_one_score(images, give, chosen, by, column, sign):
    values = np.random.default_rng(1).random(60).astype(np.float32)
    give(images, {"density": "density", "confidence": "confidence"}.get(by, "discriminator"), **{column: values})
    selection, manifest = chosen(by=(by,), keep=0.25, balanced=False)
    assert selection.indices.tolist() == best_of(sign * values, 15) and selection.weights is None
    assert manifest["criteria"]["by"] == [by] and list(manifest["criteria"]["scores"]) == [column]
    selection, manifest = chosen(by=(by,), keep=0.25)  # balanced, as there are labels
    expected = [np.flatnonzero(images.labels == k)[best_of(sign * values[images.labels == k], 3)] for k in range(5)]
    assert selection.indices.tolist() == sorted(np.concatenate(expected).tolist())
    assert manifest["images_per_class"] == [3] * 5 and manifest["criteria"]["wanted"] == 15


def test_keep_is_a_fifth_if_not_given(images, give, chosen):
    give(images, "density", density_distance=np.arange(60))
    assert len(chosen(by=("density",), balanced=False)[0].indices) == 12
    assert len(chosen(by=("density",))[0].indices) == 10  # 2 of each class, for 3 would be more than a fifth
    assert len(chosen(by=("density",), keep=1.0)[0].indices) == 60


def test_several_scores_count_by_their_mean_ranks(images, give, chosen):
    random = np.random.default_rng(2)
    margin, distance = random.normal(size=60).astype(np.float32), random.integers(0, 6, 60).astype(np.float32)
    give(images, "discriminator", discriminator=margin * 1e6)  # whatever their scale
    give(images, "density", density_distance=distance)
    mean = rankdata(margin) + rankdata(-distance)
    selection, _ = chosen(by=("discriminator", "density"), keep=0.3, balanced=False)
    assert selection.indices.tolist() == best_of(mean, 18)
    assert chosen(by=("density,discriminator",), keep=0.3, balanced=False)[0].sha256 == selection.sha256
    labels = images.labels
    inside = [rankdata(margin[labels == k]) + rankdata(-distance[labels == k]) for k in range(5)]
    expected = [np.flatnonzero(labels == k)[best_of(inside[k], 3)] for k in range(5)]
    selection, _ = chosen(by=("discriminator", "density"), keep=0.3)
    assert selection.indices.tolist() == sorted(np.concatenate(expected).tolist())


def test_what_is_memorized_goes_first(images, give, chosen):
    p = np.full(60, 0.5)
    p[:20] = 0.01  # as improbable as the threshold, which is flagged
    p[20:40] = 0.0101
    give(images, "memorization", {"null_share": 0.01}, memorization_p=p)
    give(images, "density", density_distance=np.arange(60))
    selection, manifest = chosen(by=("not-memorized",), balanced=False)
    assert selection.indices.tolist() == list(range(20, 60)) and manifest["criteria"]["keep"] == 1.0
    assert (manifest["criteria"]["left"], manifest["criteria"]["wanted"]) == (40, 60)
    selection, _ = chosen(by=("not-memorized", "density"), balanced=False)
    assert selection.indices.tolist() == list(range(20, 32))  # a fifth of all 60
    give(images, "memorization", {"null_share": 0.02}, memorization_p=p)
    assert chosen(by=("not-memorized",), balanced=False)[0].indices.tolist() == list(range(40, 60))
    first, _ = chosen(by=("not-memorized",), keep=0.2, balanced=False)
    again, _ = chosen(by=("not-memorized", "random"), balanced=False)
    assert len(first.indices) == 12 and first.sha256 == again.sha256 and first.indices.min() >= 40
    assert first.indices.tolist() != list(range(40, 52))


def test_ranks_are_among_those_that_are_left(images, give, chosen):
    random = np.random.default_rng(5)
    p = np.where(random.random(60) < 0.5, 0.001, 1)
    margin, distance = random.normal(size=60).astype(np.float32), random.random(60).astype(np.float32)
    distance[p < 1] += 0.3  # so that ranks among all would differ
    give(images, "memorization", {"null_share": 0.01}, memorization_p=p)
    give(images, "discriminator", discriminator=margin)
    give(images, "density", density_distance=distance)
    left = np.flatnonzero(p == 1)
    among_left = best_of(rankdata(margin[left]) + rankdata(-distance[left]), 6)
    among_all = best_of((rankdata(margin) + rankdata(-distance))[left], 6)
    selection, _ = chosen(by=("not-memorized", "discriminator", "density"), keep=0.1, balanced=False)
    assert selection.indices.tolist() == left[among_left].tolist() != left[among_all].tolist()
    selection, _ = chosen(by=("not-memorized", "density"), keep=0.1, balanced=False)
    assert selection.indices.tolist() == left[best_of(-distance[left], 6)].tolist()


def test_a_class_with_few_left_lowers_all(images, give, chosen):
    p = np.where((images.labels == 3) & (np.arange(60) > 20), 0.001, 1)
    left = int(((images.labels == 3) & (p == 1)).sum())
    give(images, "memorization", {"null_share": 0.01}, memorization_p=p)
    _, manifest = chosen(by=("not-memorized",))  # alone it keeps all that it leaves
    assert manifest["images_per_class"] == [12, 12, 12, left, 12]
    selection, manifest = chosen(by=("not-memorized",), balanced=True)
    assert manifest["images_per_class"] == [left] * 5 and manifest["criteria"]["wanted"] == 60
    assert (p[selection.indices] == 1).all()
    give(images, "memorization", {"null_share": 0.01}, memorization_p=np.where(images.labels == 3, 0.001, 1))
    with pytest.raises(UsageError, match=r"leaves no image of some class of .*; give --no-balanced$"):
        chosen(by=("not-memorized",), balanced=True)
    assert len(chosen(by=("not-memorized",), balanced=False)[0].indices) == 48
    give(images, "memorization", {"null_share": 0.01}, memorization_p=np.zeros(60))
    with pytest.raises(UsageError, match=r"^--by not-memorized: all 60 images of .* are flagged; nothing to keep$"):
        chosen(by=("not-memorized",), balanced=False)


def test_classes_that_do_not_occur_do_not_count(make, give, chosen, tmp_path):
    two = make(tmp_path / "two", np.where(np.arange(60) < 50, 1, 4))
    give(two, "density", density_distance=np.arange(60)[::-1])
    selection, manifest = chosen(two, by=("density",))
    assert manifest["images_per_class"] == [0, 6, 0, 0, 6]
    assert selection.indices.tolist() == [*range(44, 50), *range(54, 60)]


def test_random_is_a_baseline_that_needs_no_scores(images, chosen):
    first, manifest = chosen(by=("random",), seed=1)
    assert manifest["images_per_class"] == [2] * 5 and manifest["criteria"]["scores"] == {}
    assert chosen(by=("random",), seed=1)[0].sha256 == first.sha256
    assert chosen(by=("random",), seed=2)[0].sha256 != first.sha256


def test_images_without_labels(make, give, chosen, tmp_path):
    plain = make(tmp_path / "plain", None)
    values = np.random.default_rng(3).random(60).astype(np.float32)
    give(plain, "confidence", confidence_max=values)
    selection, manifest = chosen(plain, by=("confidence",))
    assert selection.indices.tolist() == best_of(values, 12)
    assert manifest["images_per_class"] is None and manifest["criteria"]["balanced"] is False
    with pytest.raises(UsageError, match=r"^--balanced: .*plain has no labels to balance; give --no-balanced$"):
        chosen(plain, by=("confidence",), balanced=True)


def test_missing_scores_name_the_command(images, chosen):
    command = f"run synthfast score samples --synthetic {images.path} --scores "
    for by, score in (("density", "density"), ("not-memorized", "memorization"), ("confidence", "confidence")):
        with pytest.raises(
            SynthfastError, match=rf"^{images.path}/scores: expected {score} scores, found none; {command}{score}$"
        ):
            chosen(by=(by,))
    with pytest.raises(SynthfastError, match="expected density scores, found none"):
        chosen(by=("random",), low_density=1.0)


def test_a_threshold_that_is_none(images, give, chosen):
    for notes in ({}, {"null_share": "1"}, {"null_share": None}):
        give(images, "memorization", notes)
        with pytest.raises(
            SynthfastError, match=rf"^{images.path}/scores/scores.json: memorization has no threshold; run"
        ):
            chosen(by=("not-memorized",))


def test_keep_that_leaves_nothing(images, give, chosen):
    give(images, "density", density_distance=np.arange(60))
    with pytest.raises(
        UsageError, match=r"^--keep 0\.05: would keep none of the 60 images of .* of each of its 5 classes; raise"
    ):
        chosen(by=("density",), keep=0.05)
    assert len(chosen(by=("density",), keep=0.05, balanced=False)[0].indices) == 3
    with pytest.raises(UsageError, match=r"^--keep 0\.001: would keep none of the 60 images of [^ ]*; raise it$"):
        chosen(by=("density",), keep=0.001, balanced=False)


def test_low_density_weights_in_the_selection(images, give, chosen):
    distance = np.random.default_rng(4).uniform(0.5, 2, 60).astype(np.float32)
    give(images, "density", density_distance=distance)
    selection, manifest = chosen(by=("random",), keep=0.5, low_density=2.0)
    expected = distance[selection.indices] ** 2
    assert np.allclose(selection.weights, expected / expected.mean(), rtol=1e-5)
    assert manifest["criteria"]["low_density"] == 2.0 and list(manifest["criteria"]["scores"]) == ["density_distance"]


def test_weights_are_bounded_and_have_mean_1():
    distance = np.r_[0.0, 1e-30, np.linspace(0.9, 1.1, 50), 1e30, 3e38].astype(np.float32)
    for power in (0.5, 1, 10):
        weights = low_density_weights(distance, power)
        assert weights.dtype == np.float32 and abs(weights.mean() - 1) < 1e-5
        assert weights.max() / weights.min() <= 100.01 and (np.diff(weights) >= 0).all()
    assert low_density_weights(np.zeros(4), 2).tolist() == [1] * 4
    copies = low_density_weights(np.r_[np.zeros(9), 1.0], 2)
    assert copies[9] / copies[0] == pytest.approx(10) and (copies[:9] == copies[0]).all()


@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_ranks_are_scipys(distinct):
    values = np.random.default_rng(distinct).integers(0, distinct, 200).astype(np.float32)
    assert ranks(values).tolist() == rankdata(values).tolist()


def test_of_equals_the_first_are_taken():
    assert best([np.zeros(9)], np.arange(9), 4).tolist() == [0, 1, 2, 3]
    assert sorted(best([np.array([1.0, 5, 1, 5, 5])], np.arange(5), 2).tolist()) == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": ()}, "expected one folder of synthetic shards, found 0; name one"),
        ({"folder": ("a", "b")}, "expected one folder of synthetic shards, found 2; name one"),
        ({"by": ()}, "--by: expected one of discriminator, density, confidence, not-memorized, random, found none"),
        ({"by": ("density,beauty",)}, "--by beauty: expected one of discriminator"),
        ({"keep": 0.0}, "--keep 0.0: expected a share above 0 and up to 1"),
        ({"keep": 1.5}, "--keep 1.5: expected a share above 0 and up to 1"),
        ({"keep": float("nan")}, "--keep nan: expected a share above 0"),
        ({"low_density": 0.0}, "--low-density 0.0: expected a power above 0 and up to 10"),
        ({"low_density": float("inf")}, "--low-density inf: expected a power"),
        ({"seed": 2**63}, "--seed 9223372036854775808: expected a whole number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        SelectConfig(**{"folder": ("a",), "by": ("density",), **options})
