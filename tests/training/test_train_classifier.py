"""Classifiers from real images, synthetic ones and both: what a batch holds, what is learned, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_checkpoint
from synthfast.config import ClassifierConfig
from synthfast.data import open_images
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation import accuracy, load_classifier, predict
from synthfast.training import classifier, train_classifier

CPU = torch.device("cpu")


def train(out, report=None, **options):
    return train_classifier(ClassifierConfig(**{"out": str(out), "device": "cpu", "steps": 3, **options}), report)


@pytest.fixture
def copies(write_shards, tmp_path):
    """A shard folder with the 500 training digits in it."""
    digits = open_images("digits")
    return write_shards(tmp_path / "copies", digits.read(np.arange(len(digits))), digits.labels)


@pytest.fixture
def batches(monkeypatch):
    """What each step reads: a list of (name of the set, items)."""
    seen = []
    real = classifier.read_batch
    monkeypatch.setattr(
        classifier, "read_batch", lambda images, items: (seen.append((images.name, items)), real(images, items))[1]
    )
    return seen


def test_it_learns_the_digits_and_scores_them(tmp_path):
    reports = []
    result = train(tmp_path, reports.append, steps=60)
    assert (result.steps, result.made) == (60, 60) and result.loss < 0.3
    assert reports[-1].step == 60 and reports[-1].loss == result.loss and reports[-1].images_per_step == 128
    scores = accuracy(tmp_path, open_images("digits:test"), CPU)
    overall = scores["metrics"]["accuracy"]
    assert overall["value"] > 0.95
    assert overall["ci"][0] < overall["value"] < overall["ci"][1]
    assert overall["count"] == 1297
    per_class = scores["groups"]["class"]
    assert list(per_class) == [str(k) for k in range(10)]
    mean = sum(group["accuracy"]["value"] * group["accuracy"]["count"] for group in per_class.values()) / 1297
    assert mean == pytest.approx(overall["value"])


def test_synthetic_images_alone_teach_it_too(tmp_path, copies):
    """The real images are not even looked for."""
    train(tmp_path / "run", synthetic=(copies,), fraction=1.0, steps=40, dataset="not there")
    assert accuracy(tmp_path / "run", open_images("digits:test"), CPU)["metrics"]["accuracy"]["value"] > 0.9


@pytest.mark.parametrize(
    ("fraction", "real", "synthetic"), [(None, 64, 64), (0.7, 38, 90), (0.004, 127, 1), (1.0, 0, 128), (0.0, 128, 0)]
)
def test_every_batch_holds_its_share_of_synthetic_images(tmp_path, copies, batches, fraction, real, synthetic):
    train(tmp_path / "run", synthetic=(copies,), fraction=fraction, steps=2)
    expected = [(name, share) for name, share in (("digits:train", real), (copies, synthetic)) if share]
    assert [(name, len(items)) for name, items in batches] == expected * 2


def test_every_set_is_read_in_passes_of_its_own(tmp_path, write_shards, batches):
    digits = open_images("digits")
    few = write_shards(tmp_path / "few", digits.read(np.arange(20)), digits.labels[:20])
    train(tmp_path / "run", synthetic=(few,), fraction=0.1, batch_size=100, steps=4)
    real = np.concatenate([items for name, items in batches if name == "digits:train"])
    synthetic = np.concatenate([items for name, items in batches if name == few])
    assert len(set(real)) == len(real) == 360  # no image twice within the first pass
    assert sorted(synthetic[:20]) == sorted(synthetic[20:]) == list(range(20))


def test_every_set_has_a_shuffled_order_of_its_own(tmp_path, copies, batches):
    for seed in (0, 1):
        train(tmp_path / "run", synthetic=(copies, copies), fraction=1.0, steps=1, seed=seed)
    orders = [tuple(items) for _, items in batches]
    assert len(orders) == len(set(orders)) == 4 and all(list(items) != sorted(items) for items in orders)


def test_several_folders_share_the_synthetic_part(tmp_path, copies, batches):
    train(tmp_path / "run", synthetic=(copies, copies, copies), fraction=0.5, steps=1)
    assert [len(items) for _, items in batches] == [64, 22, 21, 21]
    with pytest.raises(UsageError, match=r"^--batch-size 4: 3 synthetic folders share 2 images a batch"):
        train(tmp_path / "run", synthetic=(copies, copies, copies), fraction=0.5, batch_size=4)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 0), (0.9, 4)])
def test_a_fraction_that_the_batch_cannot_hold_is_refused(tmp_path, copies, fraction, count):
    with pytest.raises(UsageError, match=rf"^--fraction {fraction}: {count} of 4 images a batch would be synthetic"):
        train(tmp_path / "run", synthetic=(copies,), fraction=fraction, batch_size=4)
    assert not (tmp_path / "run").exists()


def test_equal_seeds_give_equal_weights_and_the_callers_random_state_stays(tmp_path):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", -1)):
        torch.manual_seed(hash(name) % 1000)
        before = torch.get_rng_state()
        train(tmp_path / name, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3


def test_the_checkpoint_says_what_it_was_made_from(tmp_path, copies):
    train(tmp_path / "run", synthetic=(copies,), fraction=0.25)
    config, _ = load_checkpoint(tmp_path / "run", "classifier")
    assert (config["shape"], config["classes"]) == ([8, 8, 1], 10)
    assert config["training"]["data"] == [open_images(name).fingerprint() for name in ("digits", copies)]
    assert (config["training"]["synthetic"], config["training"]["fraction"]) == ([copies], 0.25)


def test_sets_that_do_not_fit_are_refused(tmp_path, write_shards):
    random = np.random.default_rng(0)
    other_size = random.integers(0, 256, (20, 9, 9, 1), dtype=np.uint8)
    digits_size = other_size[:, :8, :8]
    labels = np.arange(20) % 10
    wide = write_shards(tmp_path / "wide", other_size, labels)
    few = write_shards(tmp_path / "few", digits_size, labels % 5, classes=5)
    unlabelled = write_shards(tmp_path / "unlabelled", digits_size, None, classes=None)
    for folder, words in (
        (wide, r"found \[9, 9, 1\] in 10"),
        (few, "in 5; choose sets"),
        (unlabelled, "has no labels"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            train(tmp_path / "run", synthetic=(folder,))
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="has no labels"):
        train(tmp_path / "run", dataset=unlabelled)
    with pytest.raises(SynthfastError, match="no shard manifest here"):
        train(tmp_path / "run", synthetic=(str(tmp_path / "nowhere"),))
    assert not (tmp_path / "run").exists()


def test_more_than_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="expected one process, found 2 ranks; leave torchrun out"):
        train(tmp_path)


def test_a_diverging_run_is_one_line_and_saves_nothing(tmp_path):
    with pytest.raises(SynthfastError, match=r"^step \d+: .*expected finite numbers; lower --lr$"):
        train(tmp_path, lr=1e30, steps=20)
    with pytest.raises(SynthfastError, match=r"^step 1: a weight is not finite, expected finite numbers; lower --lr$"):
        train(tmp_path, lr=1e38, weight_decay=1e10, steps=1)  # the loss of step 1 is from before it
    assert not list(tmp_path.iterdir())


def test_the_rate_rises_for_a_tenth_and_falls_to_zero():
    factors = [classifier._lr_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[99] < 1e-3
    assert all(math.isfinite(classifier._lr_factor(0, steps)) for steps in (1, 2, 3))


def test_predictions_do_not_depend_on_the_batch_size(tmp_path):
    train(tmp_path, steps=20)
    model, _ = load_classifier(tmp_path, CPU)
    digits = open_images("digits:test")
    np.testing.assert_array_equal(predict(model, digits, CPU, 7), predict(model, digits, CPU, 1000))
