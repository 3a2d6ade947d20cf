"""Predictions, accuracy and its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from synthfast.data import ArrayImages
from synthfast.evaluation import accuracy, predict, wilson_interval
from synthfast.models import make_classifier

CPU = torch.device("cpu")


class Brightest(nn.Module):
    """Class k for an image whose pixel k is the brightest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and x.dtype == torch.float32
        assert x.min() == 0 and x.max() == torch.tensor(200 / 255)
        return x.flatten(1)


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


def test_accuracy_counts_what_the_model_gets_right():
    torch.manual_seed(0)
    toy = images(classes=2)  # no image of class 2, though there is one
    toy.classes = 3
    model = make_classifier("small-cnn", (4, 5, 3), 3).eval()
    right = predict(model, toy, CPU) == toy.labels
    assert 0 < right.sum() < 20
    result = accuracy(model, toy, CPU)
    assert result["metrics"]["accuracy"] == {
        "value": right.mean(),
        "ci": wilson_interval(int(right.sum()), 20),
        "count": 20,
    }
    assert list(result["groups"]["class"]) == ["0", "1"]
    for label, group in result["groups"]["class"].items():
        of_class = right[toy.labels == int(label)]
        assert (group["accuracy"]["value"], group["accuracy"]["count"]) == (of_class.mean(), len(of_class))


@pytest.mark.parametrize("count", [1, 7, 20, 30])
def test_accuracy_of_the_first_images(count):
    torch.manual_seed(0)
    toy, model = images(), make_classifier("small-cnn", (4, 5, 3), 3).eval()
    right = (predict(model, toy, CPU) == toy.labels)[:count]
    result = accuracy(model, toy, CPU, count=count)
    assert result["metrics"]["accuracy"]["value"] == right.mean()
    assert result["metrics"]["accuracy"]["count"] == min(count, 20)
    assert sum(group["accuracy"]["count"] for group in result["groups"]["class"].values()) == min(count, 20)


def test_intervals_are_symmetric_narrow_with_more_images_and_hold_the_share():
    for count in (1, 10, 1000):
        for successes in {0, 1, count // 2, count}:
            low, high = wilson_interval(successes, count)
            assert 0 <= low <= successes / count <= high <= 1
            mirrored = wilson_interval(count - successes, count)
            assert mirrored == pytest.approx([1 - high, 1 - low], abs=1e-12)
    widths = [high - low for low, high in (wilson_interval(count // 2, count) for count in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
