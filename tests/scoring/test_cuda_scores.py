"""Scores computed on a GPU against those of the CPU: equal counts, and ARC within the interval.

SYNTHFAST_TEST_DEVICE=cpu runs them where there is no GPU, to see that the tests themselves work.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from synthfast.data import ArrayImages, Chosen, open_images
from synthfast.models import freeze, make_classifier
from synthfast.models.bank import Bank
from synthfast.scoring.arc import ArcSettings, arc
from synthfast.scoring.arc_measure import MeasureSettings
from synthfast.scoring.discriminator import DiscriminatorSettings
from synthfast.scoring.neighbours import k_nearest, within_counts
from synthfast.scoring.prdc import prdc

DEVICE = torch.device(os.environ.get("SYNTHFAST_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("shape", [(65, 40), (1500, 64), (20_000, 48)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_neighbours(generator, shape, offset):
    a, b = (torch.randn(shape, generator=generator) * scale + offset for scale in (1, 1.1))
    for base in (None, b):
        expected = k_nearest(a, base, 5)
        found = k_nearest(a.to(DEVICE), None if base is None else base.to(DEVICE), 5)
        for one, other in zip(found, expected, strict=True):
            assert one.device.type == DEVICE.type and torch.equal(one.cpu(), other)
    radii = expected[0][:, -1]
    counts = within_counts(a.to(DEVICE), b.to(DEVICE), radii.to(DEVICE))
    assert torch.equal(counts.cpu(), within_counts(a, b, radii))


def test_precision_recall_density_coverage(generator):
    real, synthetic = (torch.randn(3000, 64, generator=generator) * scale for scale in (1, 1.05))
    found, expected = prdc(real.to(DEVICE), synthetic.to(DEVICE), 5), prdc(real, synthetic, 5)
    for name in ("real_radii", "synthetic_radii", "hits", "covered", "recalled"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(("name", "shape"), [("small-cnn", (8, 8, 1)), ("preact-resnet-18", (32, 32, 3))])
def test_a_bank_of_networks(generator, name, shape):
    """In float64, so that only mistakes are seen: outputs, and gradients of images and weights."""
    networks = [make_classifier(name, shape, 3).double().to(DEVICE) for _ in range(3)]
    bank = Bank(networks)
    x = torch.rand(12, shape[2], *shape[:2], generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    y = (torch.arange(12) % 3).to(DEVICE)
    expected = torch.cat([network(part) for network, part in zip(networks, x.chunk(3), strict=True)])
    found = bank(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    wanted, *_ = torch.autograd.grad(F.cross_entropy(expected, y, reduction="sum"), x)
    loss = F.cross_entropy(found, y, reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], wanted, rtol=1e-7, atol=1e-9)
    F.cross_entropy(torch.cat([n(p) for n, p in zip(networks, x.chunk(3), strict=True)]), y, reduction="sum").backward()
    loss.backward()
    for key, parameter in networks[1].named_parameters():
        gradient = bank.part(bank.network.get_parameter(key).grad, key)[1]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-8)


def test_a_frozen_bank(generator):
    networks = [make_classifier("small-cnn", (8, 8, 1), 3).to(DEVICE).eval() for _ in range(3)]
    x = torch.rand(12, 1, 8, 8, generator=generator).to(DEVICE)
    expected = torch.cat([network(part) for network, part in zip(networks, x.chunk(3), strict=True)])
    torch.testing.assert_close(freeze(Bank(networks))(x), expected, rtol=1e-3, atol=1e-4)


def test_arc():
    ndimage = pytest.importorskip("scipy.ndimage")
    digits = open_images("digits:test")
    order = np.random.default_rng(0).permutation(len(digits))
    first, second = Chosen(digits, order[:240]), Chosen(digits, order[240:480])
    pixels = ndimage.gaussian_filter(second.read(np.arange(240)).astype(float), (0, 0.5, 0.5, 0))
    blurred = ArrayImages("blurred", [np.rint(pixels).astype(np.uint8)], second.labels, second.classes)
    training = DiscriminatorSettings(
        steps=75, batch_size=32, attack_steps=3, ema=0.95, validate_every=25, patience=2, warm_patience=2
    )
    settings = ArcSettings(
        training=training,
        measuring=MeasureSettings(steps=10, restarts=2),
        radii=(0.0, 0.15, 0.3, 0.45),
        held_out=0.3,
        draws=200,
    )
    found, expected = (arc(first, blurred, settings, device).area for device in (DEVICE, torch.device("cpu")))
    assert found.value > 0.05
    assert found.ci[0] < expected.ci[1] and expected.ci[0] < found.ci[1]
