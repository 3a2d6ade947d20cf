"""Which images a classifier is trained and validated on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_tensors
from synthfast.config import ClassifierConfig
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.training import mixture
from synthfast.training.batches import EpochOrder, read_batch, to_unit
from synthfast.training.mixture import open_mixture

CPU = torch.device("cpu")


@pytest.fixture
def opened(tmp_path):
    """``open_mixture`` with batches of 32, in one process."""

    def open_one(**options):
        config = ClassifierConfig(**{"out": str(tmp_path / "run"), "batch_size": 32, "device": "cpu", **options})
        with Ranks("cpu") as ranks:
            return open_mixture(config, ranks)

    return open_one


def keys(images):
    """Each image as bytes."""
    return [image.tobytes() for image in images.read(np.arange(len(images)))]


@pytest.mark.parametrize("validation", [0.2, 100, 1])
def test_what_is_held_out_is_not_trained_on_and_no_test_image(opened, validation):
    digits = open_images("digits")
    data = opened(validation=validation)
    ((training, _),) = data.parts
    count = 100 if validation != 1 else 1
    assert (len(data.validation), len(training)) == (count, 500 - count)
    # An image is known by pixels and label; the digits have no two alike.
    everything = sorted(keys(digits))
    assert len(set(everything)) == 500
    assert sorted(keys(training) + keys(data.validation)) == everything
    assert not set(keys(data.validation)) & set(keys(open_images("digits:test")))
    labels = dict(zip(keys(digits), digits.labels, strict=True))
    for part in (training, data.validation):
        assert [labels[key] for key in keys(part)] == part.labels.tolist()


def test_what_is_held_out_depends_on_the_seed(opened):
    parts = [keys(opened(validation=50, seed=seed).validation) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] and len(set(parts[0]) & set(parts[2])) < 25
    assert len(set(opened(validation=50).validation.labels)) == 10


def test_the_draw_of_what_is_held_out_is_no_pass_of_training():
    orders = [EpochOrder(500, 3, stream) for stream in (mixture._HELD_OUT_STREAM, 0, 1)]
    passes = {order[first : first + 500].tobytes() for order in orders for first in (0, 500, 1000)}
    assert len(passes) == 9


def test_real_images_serve_for_validation_alone_where_all_training_images_are_synthetic(opened, copies):
    data = opened(validation=30, synthetic=(copies,), fraction=1.0)
    assert [(images.name, count) for images, count in data.parts] == [(copies, 32)]
    assert (data.validation.name, len(data.validation)) == ("digits:train", 30)
    assert len(data.facts["data"]) == 2


@pytest.mark.parametrize(("validation", "count"), [(500, 500), (1000, 1000), (0.999, 500), (0.0009, 0)])
def test_a_part_that_cannot_be_held_out_is_refused(opened, validation, count):
    with pytest.raises(UsageError, match=rf"^--validation {validation:g}: {count} of the 500 images of digits:train"):
        opened(validation=validation)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_every_image_of_a_batch_once_and_each_its_share_of_every_part(opened, copies, ranks):
    data = opened(synthetic=(copies, copies), fraction=0.5)
    for step in (0, 7):
        whole, labels = data.read(step, np.arange(32))
        for rank in range(ranks):
            mine = np.arange(rank, 32, ranks)
            pixels, own = data.read(step, mine)
            assert torch.equal(pixels, whole[mine]) and torch.equal(own, labels[mine])
            assert [int(((mine >= a) & (mine < b)).sum()) for a, b in ((0, 16), (16, 24), (24, 32))] == [
                16 // ranks, 8 // ranks, 8 // ranks,
            ]  # fmt: skip


def test_a_batch_is_the_next_part_of_each_order(opened, copies):
    data = opened(synthetic=(copies,), fraction=0.25)
    (real, _), (synthetic, _) = data.parts
    for step in (0, 3):
        pixels, labels = data.read(step, np.arange(32))
        for images, order, rows, count in (
            (real, data.orders[0], slice(0, 24), 24),
            (synthetic, data.orders[1], slice(24, 32), 8),
        ):
            expected, expected_labels = read_batch(images, order[step * count : (step + 1) * count])
            assert torch.equal(pixels[rows], expected) and torch.equal(labels[rows], expected_labels)


def test_only_the_first_synthetic_images(opened, copies):
    data = opened(synthetic=(copies,), synthetic_n=40, fraction=1.0)
    ((images, _),) = data.parts
    assert keys(images) == keys(open_images("digits"))[:40]
    assert len(opened(synthetic=(copies,), synthetic_n=500).parts[1][0]) == 500
    with pytest.raises(UsageError, match=r"^--synthetic-n 501: .*copies holds 500 images; lower it or sample more$"):
        opened(synthetic=(copies,), synthetic_n=501)


@pytest.fixture
def unlabelled(write_shards, tmp_path):
    """A shard folder with 700 test digits and no labels."""
    return write_shards(tmp_path / "unlabelled", open_images("digits:test").read(np.arange(700)), None, classes=None)


@pytest.fixture
def labeller(fit, tmp_path):
    fit(tmp_path / "labeller", steps=40, batch_size=64)
    return str(tmp_path / "labeller")


def test_pseudo_labels_are_what_the_classifier_says(opened, copies, unlabelled, labeller, tmp_path):
    options = {"synthetic": (copies, unlabelled), "fraction": 0.5, "pseudo_labels": labeller}
    data = opened(**options)
    model, description = load_classifier(labeller, CPU)
    images = open_images(unlabelled)
    pixels, _ = read_batch(images, np.arange(len(images)))
    with torch.no_grad():
        expected = model(to_unit(pixels, CPU)).argmax(1).numpy()
    parts = [part for part, _ in data.parts]
    assert (parts[2].labels == expected).mean() > 0.995  # a near tie may fall otherwise in another batch
    assert (expected == open_images("digits:test").labels[:700]).mean() > 0.7
    assert parts[2].classes == 10 and keys(parts[2]) == keys(images)
    assert parts[1].labels.tolist() == open_images("digits").labels.tolist()  # given labels stay
    assert data.facts["pseudo_labels"] == description["sha256"]
    few = opened(**options, synthetic_n=100).parts[2][0]
    assert len(few) == 100 and few.labels.tolist() == parts[2].labels[:100].tolist()


def test_pseudo_labels_are_computed_once_and_kept(opened, unlabelled, labeller, tmp_path, monkeypatch):
    options = {"synthetic": (unlabelled,), "pseudo_labels": labeller}
    first = opened(**options).parts[1][0].labels
    (file,) = (tmp_path / "run").iterdir()
    assert load_tensors(file)["labels"].tolist() == first.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "read_batch", None)
        assert opened(**options).parts[1][0].labels.tolist() == first.tolist()


def test_labels_of_another_classifier_are_not_taken(opened, unlabelled, labeller, fit, tmp_path):
    first = opened(synthetic=(unlabelled,), pseudo_labels=labeller)
    fit(tmp_path / "other", steps=2, seed=3)
    second = opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path / "other"))
    assert first.facts != second.facts
    assert first.parts[1][0].labels.tolist() != second.parts[1][0].labels.tolist()


def test_pseudo_labels_that_do_not_fit(opened, copies, unlabelled, labeller, fit, write_shards, write_npz, tmp_path):
    with pytest.raises(UsageError, match=r"has no labels, training a classifier needs them; .*--pseudo-labels"):
        opened(synthetic=(unlabelled,))
    with pytest.raises(UsageError, match=r"^--pseudo-labels .*: all synthetic folders have labels; leave it out$"):
        opened(synthetic=(copies,), pseudo_labels=labeller)
    weights = str(tmp_path / "labeller" / "model.safetensors")  # a file does not tell what network it is of
    for path in (str(tmp_path / "nowhere"), weights):
        with pytest.raises(
            UsageError, match=rf"^--pseudo-labels {path}: expected the checkpoint folder of a classifier"
        ):
            opened(synthetic=(unlabelled,), pseudo_labels=path)
    with pytest.raises(SynthfastError, match="no checkpoint here"):
        opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path))
    wide = write_shards(tmp_path / "wide", np.zeros((20, 9, 9, 1), np.uint8), None, classes=None)
    with pytest.raises(UsageError, match=r"was trained on images \[8, 8, 1\], .*wide has \[9, 9, 1\]"):
        opened(synthetic=(wide,), pseudo_labels=labeller)
    fit(tmp_path / "three", dataset=write_npz(tmp_path / "set.npz"), batch_size=8)
    with pytest.raises(UsageError, match=r"unlabelled: expected images .* in 10 classes .*, found .* in 3; choose"):
        opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path / "three"))
    with pytest.raises(UsageError, match="has no labels"):  # real images are not labelled by a classifier
        opened(dataset=unlabelled, synthetic=(unlabelled,), pseudo_labels=labeller)
