"""FGSM against closed forms and torchattacks."""

from __future__ import annotations

import pytest
import torch

from synthfast.attacks import FGSM


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_step_for_two_linear_classes(draw_linear, norm):
    """The gradient of a linear model is its best direction, so that one step decides: broken exactly where eps reaches."""
    model, images = draw_linear(200, classes=2)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    result = FGSM(norm, eps).run(model, images.x, images.y)
    clear = (distance / eps - 1).abs() > 1e-3
    assert clear.sum() > 150
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])
    # What is left of the distance: all of it minus eps.
    left = model.distance(result.images, images.y, norm)
    torch.testing.assert_close(left, (distance - eps).clamp(min=0), rtol=0, atol=1e-5)


def test_equals_torchattacks(network, digits):
    torchattacks = pytest.importorskip("torchattacks")
    x = digits.x[:256]
    y = network(x).argmax(1)
    found = FGSM("linf", 0.1)(network, x, y)
    torch.testing.assert_close(found, torchattacks.FGSM(network, eps=0.1)(x, y), rtol=0, atol=1e-6)
    assert (found - x).abs().max() > 0.09
