from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_checkpoint
from synthfast.config import ClassifierConfig
from synthfast.data import ShardFolder, open_images
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation import accuracy, load_classifier, predict
from synthfast.training import train_classifier
from synthfast.training.classifier import _parts

CPU = torch.device("cpu")


def write_shards(path, images, labels, classes=10):
    request = {"n": len(images), "shape": list(images.shape[1:]), "classes": classes, "shard_size": len(images)}
    with ShardFolder.create_or_resume(path, request) as folder:
        with folder.writer(0) as writer:
            writer.append(images, labels)
            writer.commit()
        folder.finish()
    return str(path)


@pytest.fixture
def copies(tmp_path):
    """A shard folder with the real training digits in it."""
    digits = open_images("digits")
    return write_shards(tmp_path / "copies", digits.read(np.arange(len(digits))), digits.labels)


def train(out, **options):
    return train_classifier(ClassifierConfig(**{"out": str(out), "device": "cpu", "steps": 3, **options}))


def test_it_learns_the_digits_and_scores_them(tmp_path):
    result = train(tmp_path, steps=120)
    assert result.loss < 0.3
    scores = accuracy(tmp_path, open_images("digits:test"), CPU)
    overall = scores["metrics"]["accuracy"]
    assert overall["value"] > 0.93
    assert overall["ci"][0] < overall["value"] < overall["ci"][1]
    assert overall["count"] == 1297
    per_class = scores["groups"]["class"]
    assert list(per_class) == [str(k) for k in range(10)]
    mean = sum(group["accuracy"]["value"] * group["accuracy"]["count"] for group in per_class.values()) / 1297
    assert mean == pytest.approx(overall["value"])


def test_synthetic_images_alone_teach_it_too(tmp_path, copies):
    train(tmp_path / "run", synthetic=(copies,), fraction=1.0, steps=120)
    assert accuracy(tmp_path / "run", open_images("digits:test"), CPU)["metrics"]["accuracy"]["value"] > 0.93


@pytest.mark.parametrize(("fraction", "shares"), [(None, [64, 64]), (0.7, [38, 90]), (1.0, [128]), (0.0, [128])])
def test_the_share_of_synthetic_images_in_a_batch(copies, fraction, shares):
    parts = _parts(ClassifierConfig(synthetic=(copies,), fraction=fraction))
    assert [share for _, share in parts] == shares
    names = [images.name for images, _ in parts]
    assert (
        names
        == {None: ["digits:train", copies], 0.7: ["digits:train", copies], 1.0: [copies], 0.0: ["digits:train"]}[
            fraction
        ]
    )


def test_several_folders_share_the_synthetic_part(copies):
    parts = _parts(ClassifierConfig(synthetic=(copies, copies, copies), fraction=0.5))
    assert [share for _, share in parts] == [64, 22, 21, 21]
    with pytest.raises(UsageError, match="--batch-size 4"):
        _parts(ClassifierConfig(synthetic=(copies, copies, copies), fraction=0.5, batch_size=4))


def test_equal_seeds_give_equal_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    config, _ = load_checkpoint(tmp_path / "a", "classifier")
    assert (config["shape"], config["classes"]) == ([8, 8, 1], 10)


def test_sets_that_do_not_fit_are_refused(tmp_path):
    random = np.random.default_rng(0)
    other_size = random.integers(0, 256, (20, 9, 9, 1), dtype=np.uint8)
    digits_size = other_size[:, :8, :8]
    labels = np.arange(20) % 10
    wide = write_shards(tmp_path / "wide", other_size, labels)
    few = write_shards(tmp_path / "few", np.ascontiguousarray(digits_size), labels % 5, classes=5)
    unlabelled = write_shards(tmp_path / "unlabelled", np.ascontiguousarray(digits_size), None, classes=None)
    for folder, words in ((wide, r"\[9, 9, 1\]"), (few, "in 5"), (unlabelled, "has no labels")):
        with pytest.raises(UsageError, match=words):
            train(tmp_path / "run", synthetic=(folder,))
    train(tmp_path / "run")
    with pytest.raises(UsageError, match="choose a source that fits"):
        accuracy(tmp_path / "run", open_images(wide), CPU)
    with pytest.raises(UsageError, match="has no labels"):
        accuracy(tmp_path / "run", open_images(unlabelled), CPU)


def test_a_diverging_run_is_one_line(tmp_path):
    with pytest.raises(SynthfastError, match="expected a finite number; lower --lr"):
        train(tmp_path, lr=1e30, steps=20)


def test_predictions_do_not_depend_on_the_batch_size(tmp_path):
    train(tmp_path, steps=20)
    model, _ = load_classifier(tmp_path, CPU)
    digits = open_images("digits:test")
    np.testing.assert_array_equal(predict(model, digits, CPU, 7), predict(model, digits, CPU, 1000))
