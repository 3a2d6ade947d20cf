"""ARC where the answer is known: Gaussians, halves of a set, degraded images, noise; and what must not matter."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.special import ndtr

from synthfast.data import ArrayImages, Chosen, open_images
from synthfast.scoring.arc import ArcSettings, arc, scores
from synthfast.scoring.arc_measure import MeasureSettings
from synthfast.scoring.discriminator import DiscriminatorSettings

CPU = torch.device("cpu")
SIGMA = 0.06
LINEAR = DiscriminatorSettings(
    architecture="linear", steps=200, batch_size=256, lr=0.01, weight_decay=0.0, attack_steps=3, ema=0.98, patience=4
)
SMALL = DiscriminatorSettings(
    steps=75, batch_size=32, attack_steps=3, ema=0.95, validate_every=25, patience=2, warm_patience=2
)
QUICK = MeasureSettings(steps=10, restarts=2)


def gaussians(shape, half, count, seed=0):
    """Two sets of N(1/2 -+ half, SIGMA^2), so narrow that no pixel meets its bounds."""
    rng = np.random.default_rng(seed)
    pixels = [0.5 + sign * half + SIGMA * rng.standard_normal((count, *shape)) for sign in (-1, 1)]
    made = [np.rint(255 * x).astype(np.uint8) for x in pixels]
    return ArrayImages("minus", [made[0]]), ArrayImages("plus", [made[1]])


def closed_form(half, norm):
    """The integral of Phi(distance / SIGMA) - 1/2, where the balls leave so much of half the distance."""
    half = np.abs(half).ravel()
    last = np.linalg.norm(half) if norm == "l2" else half.max()
    eps = np.linspace(0, last, 20_001)
    left = last - eps if norm == "l2" else np.linalg.norm(np.maximum(half - eps[:, None], 0), axis=1)
    return np.trapezoid(ndtr(left / SIGMA) - 0.5, eps) * (1 if norm == "l2" else 255)


PATTERNS = {
    "flat": lambda d: np.ones(d),
    "ramp": lambda d: np.linspace(-1, 1, d),
    "one": lambda d: np.eye(1, d, d // 2)[0],
}


@pytest.mark.parametrize(
    ("shape", "pattern", "height", "norm", "most"),
    [
        ((4, 4, 1), "ramp", 1.5, "l2", 9),
        ((8, 8, 3), "flat", 2.5, "l2", 9),
        ((4, 4, 1), "ramp", 1.5, "linf", 10),
        ((8, 8, 1), "flat", 2.0, "linf", 9),
        ((8, 8, 1), "one", 1.5, "linf", 10),
    ],
)
def test_gaussians_against_the_closed_form(shape, pattern, height, norm, most):
    half = PATTERNS[pattern](int(np.prod(shape)))
    half = (half / np.linalg.norm(half) * height * SIGMA).reshape(shape)
    real, synthetic = gaussians(shape, half, 8000)
    training = dataclasses.replace(LINEAR, norm=norm)
    measuring = MeasureSettings(steps=5, restarts=1, batch_size=2000)  # exact for a linear network
    settings = ArcSettings(training=training, measuring=measuring, most=most, held_out=0.5, draws=200)
    found, truth = arc(real, synthetic, settings, CPU), closed_form(half, norm)
    assert found.value == pytest.approx(truth, rel=0.05)
    assert found.area.accuracy[0] == pytest.approx(ndtr(height), abs=0.015)
    low, high = found.area.ci
    assert low - 0.03 * truth < truth < high + 0.03 * truth


DIGITS = open_images("digits:test")
ORDER = np.random.default_rng(0).permutation(len(DIGITS))
FIRST, SECOND = Chosen(DIGITS, ORDER[:240]), Chosen(DIGITS, ORDER[240:480])


def degraded(images, kind, amount):
    pixels = images.read(np.arange(len(images))).astype(np.float64)
    if kind == "blur":
        pixels = scipy.ndimage.gaussian_filter(pixels, (0, amount, amount, 0))
    if kind == "noise":
        pixels = pixels + 255 * amount * np.random.default_rng(1).standard_normal(pixels.shape)
    return ArrayImages(kind, [np.rint(pixels).clip(0, 255).astype(np.uint8)], images.labels, images.classes)


def of_digits(real, synthetic, radii=(0.0, 0.15, 0.45), norm="l2", seed=0, **change):
    settings = ArcSettings(
        training=dataclasses.replace(SMALL, norm=norm, seed=seed, **change),
        measuring=QUICK,
        radii=radii,
        held_out=0.3,
        draws=200,
    )
    return arc(real, synthetic, settings, CPU)


def test_two_halves_of_a_set_cannot_be_told_apart():
    found = of_digits(FIRST, SECOND, radii=None, steps=300)
    assert found.area.ci[0] == 0 and found.value < 0.004
    assert found.measured[0].training_accuracy > 0.9  # by heart, so that it is not too little training


@pytest.mark.parametrize(("kind", "amounts"), [("blur", (0.4, 0.5, 0.9)), ("noise", (0.1, 0.3))])
def test_it_grows_as_images_are_degraded_step_by_step(kind, amounts):
    values = [of_digits(FIRST, degraded(SECOND, kind, amount)).area for amount in amounts]
    for less, more in itertools.pairwise(values):
        assert less.value < more.value and less.ci[1] < more.ci[1]
    assert values[0].value > 0 and values[-1].ci[0] > values[0].ci[1]


def test_noise_is_told_apart_at_every_radius():
    rng = np.random.default_rng(0)
    noise = ArrayImages("noise", [rng.integers(0, 256, (240, 8, 8, 1), dtype=np.uint8)])
    found = of_digits(FIRST, noise, radii=(0.0, 10 / 255, 20 / 255), norm="linf")
    assert found.eps == pytest.approx((0, 10, 20)) and found.last == pytest.approx(20)
    assert scores(found, "linf")["metrics"]["arc_normalized"]["value"] > 0.95


def test_the_sets_may_be_swapped():
    blurred = degraded(SECOND, "blur", 0.5)
    one, other = of_digits(FIRST, blurred).area, of_digits(blurred, FIRST).area
    assert one.ci[0] < other.ci[1] and other.ci[0] < one.ci[1]
    assert abs(one.value - other.value) < (np.ptp(one.ci) + np.ptp(other.ci)) / 2


def test_threads_and_the_batch_size_of_the_measurement_change_nothing():
    blurred = degraded(Chosen(SECOND, np.arange(120)), "blur", 0.9)
    training = dataclasses.replace(SMALL, steps=50, patience=3)
    found = []
    for threads, batch_size in ((1, 256), (2, 256), (1, 13)):
        torch.set_num_threads(threads)
        measuring = MeasureSettings(steps=5, batch_size=batch_size)
        settings = ArcSettings(training=training, measuring=measuring, radii=(0.0, 0.1, 0.3), draws=100)
        found.append(arc(Chosen(FIRST, np.arange(120)), blurred, settings, CPU))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert found[0].eps == found[1].eps == found[2].eps
    assert found[0].value == found[1].value == pytest.approx(found[2].value, rel=1e-3)
    pairs = [pair for pair in zip(found[0].measured, found[1].measured, strict=True) if pair[0] is not None]
    assert len(pairs) == 3
    for a, b in pairs:
        assert (a.outcomes.real == b.outcomes.real).all() and (a.outcomes.synthetic == b.outcomes.synthetic).all()
