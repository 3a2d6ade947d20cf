"""The classifier of small images."""

from __future__ import annotations

import pytest
import torch

from synthfast.models import build_classifier, describe_classifier, make_classifier


def small(channels, classes, widths, activation=""):
    return build_classifier(describe_classifier(f"small-cnn{activation}", (8, 8, channels), classes, widths=widths))


@pytest.mark.parametrize("activation", ["", "-swish"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (7, 3), (32, 3)])
def test_logits_for_any_size_in_any_layout(size, channels, activation):
    torch.manual_seed(0)
    model = small(channels, 5, [8, 16], activation).eval()
    images = torch.rand(4, channels, size, size)
    logits = model(images)
    assert logits.shape == (4, 5)
    torch.testing.assert_close(logits, model.head(model.features(images * 2 - 1).flatten(2).mean(2)))
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), logits)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_stage_but_the_first_halves_the_resolution():
    model = small(1, 10, [4, 8, 16]).eval()
    assert model.features(torch.zeros(1, 1, 8, 8)).shape == (1, 16, 2, 2)


def test_it_has_the_parameters_that_its_sizes_say():
    model = small(3, 7, [4, 6])
    convolutions = 9 * (3 * 4 + 4 * 4 + 4 * 6 + 6 * 6)
    norms, head = 2 * (4 + 4 + 6 + 6), 6 * 7 + 7
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + norms + head
    assert model.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_an_image_is_classified_on_its_own():
    torch.manual_seed(0)
    model = make_classifier("small-cnn", (8, 8, 1), 10).eval()
    images = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), model(images))
