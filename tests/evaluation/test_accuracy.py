"""Predictions, accuracy and its interval; classifiers that do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthfast.artifacts import save_checkpoint
from synthfast.data import ArrayImages
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation import accuracy, load_classifier, predict, wilson_interval
from synthfast.models.small_cnn import SmallCNN, SmallCNNConfig

CPU = torch.device("cpu")


class Brightest(nn.Module):
    """Class k for an image whose pixel k is the brightest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and x.min() >= -1 and x.max() <= 1
        return x.flatten(1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A classifier of 4x5 colour images in 3 classes with random weights."""
    torch.manual_seed(0)
    config = SmallCNNConfig(3, 3, (4, 8))
    model = {"name": "small-cnn", **dataclasses.asdict(config)}
    description = {"name": "small-cnn", "shape": [4, 5, 3], "classes": 3, "class_names": None, "model": model}
    save_checkpoint(tmp_path / "cnn", "classifier", description, SmallCNN(config).state_dict())
    return tmp_path / "cnn"


def images(count: int = 20, shape: tuple[int, int, int] = (4, 5, 3), classes: int = 3) -> ArrayImages:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, *shape), np.uint8)
    return ArrayImages("toy", [pixels], random.integers(0, classes, count), classes)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_every_image_is_predicted_once_and_in_order(batch_size):
    pixels = np.zeros((20, 2, 5, 1), np.uint8)
    expected = np.arange(20) * 7 % 10
    pixels.reshape(20, 10)[np.arange(20), expected] = 200
    found = predict(Brightest(), ArrayImages("toy", [pixels]), CPU, batch_size)
    assert found.dtype == np.int64 and np.array_equal(found, expected)


def test_accuracy_counts_what_the_model_gets_right(checkpoint):
    toy = images(classes=2)  # no image of class 2, though there is one
    toy.classes = 3
    model, _ = load_classifier(checkpoint, CPU)
    right = predict(model, toy, CPU) == toy.labels
    result = accuracy(checkpoint, toy, CPU)
    assert result["metrics"]["accuracy"] == {
        "value": right.mean(),
        "ci": wilson_interval(int(right.sum()), 20),
        "count": 20,
    }
    assert list(result["groups"]["class"]) == ["0", "1"]
    for label, group in result["groups"]["class"].items():
        of_class = right[toy.labels == int(label)]
        assert (group["accuracy"]["value"], group["accuracy"]["count"]) == (of_class.mean(), len(of_class))


def test_a_classifier_is_loaded_in_evaluation_mode(checkpoint):
    model, config = load_classifier(checkpoint, CPU)
    assert not any(module.training for module in model.modules())
    assert (config["shape"], config["classes"]) == ([4, 5, 3], 3)
    x = torch.randn(5, 3, 4, 5)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (
            images(shape=(5, 4, 3)),
            "expected images [4, 5, 3] in 3 classes as FOLDER was trained on, found [5, 4, 3] in 3",
        ),
        (
            images(shape=(4, 5, 1)),
            "expected images [4, 5, 3] in 3 classes as FOLDER was trained on, found [4, 5, 1] in 3",
        ),
        (images(classes=4), "expected images [4, 5, 3] in 3 classes as FOLDER was trained on, found [4, 5, 3] in 4"),
        (ArrayImages("toy", [np.zeros((2, 4, 5, 3), np.uint8)]), "has no labels, accuracy needs them"),
    ],
)
def test_images_that_do_not_fit_are_refused(checkpoint, toy, message):
    with pytest.raises(UsageError) as caught:
        accuracy(checkpoint, toy, CPU)
    assert str(caught.value).startswith("toy: " + message.replace("FOLDER", str(checkpoint)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"model": None},
        {"model": [1]},
        {"model": {"name": "small-cnn"}},
        {"model": {"name": "small-cnn", "channels": 3, "classes": 3, "widths": [4, 9]}},
        {"model": {"name": "small-cnn", "channels": 3, "classes": 3, "widths": [4, 8], "depth": 1}},
        {"model": {"name": "small-cnn", "channels": "3", "classes": 3, "widths": [4, 8]}},
        {"shape": None},
        {"shape": [4, 5]},
        {"shape": [4, 5, 1]},
        {"classes": 4},
        {"classes": None},
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(checkpoint, values):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(SynthfastError, match=r"the weights do not fit config\.json") as caught:
        load_classifier(checkpoint, CPU)
    assert str(caught.value).startswith(f"{checkpoint}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "shape", "classes"])
def test_a_missing_key_is_named(checkpoint, key):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(SynthfastError, match=rf"the weights do not fit config\.json \('{key}'\)"):
        load_classifier(checkpoint, CPU)


def test_intervals_are_symmetric_narrow_with_more_images_and_hold_the_share():
    for count in (1, 10, 1000):
        for successes in {0, 1, count // 2, count}:
            low, high = wilson_interval(successes, count)
            assert 0 <= low <= successes / count <= high <= 1
            mirrored = wilson_interval(count - successes, count)
            assert mirrored == pytest.approx([1 - high, 1 - low], abs=1e-12)
    widths = [high - low for low, high in (wilson_interval(count // 2, count) for count in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
