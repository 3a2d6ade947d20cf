"""Robust discriminators: what they reach where the best is known, which state is kept, and what does not matter."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from synthfast.errors import SynthfastError, UsageError
from synthfast.scoring import discriminator as module
from synthfast.scoring.arc_measure import MeasureSettings, measure
from synthfast.scoring.discriminator import (
    DiscriminatorSettings,
    DiscriminatorTraining,
    TrainingSets,
    learned,
    train_discriminator,
)

SIGMA = 0.06
LINEAR = DiscriminatorSettings(
    architecture="linear", steps=200, batch_size=128, lr=0.02, weight_decay=0.0, attack_steps=3, ema=0.97, patience=4
)
SMALL = DiscriminatorSettings(steps=10, batch_size=8, attack_steps=2, validate_every=5)


def gaussian(seed: int, count: int, shift: np.ndarray) -> torch.Tensor:
    """Images [count, 4, 4, 1] of N(1/2 + shift, SIGMA^2)."""
    x = 0.5 + shift + SIGMA * np.random.default_rng(seed).standard_normal((count, 4, 4, 1))
    return torch.from_numpy(np.rint(255 * x).clip(0, 255).astype(np.uint8))


SHIFT = np.linspace(0, 1, 16).reshape(4, 4, 1)
SHIFT *= 1.5 * SIGMA / np.linalg.norm(SHIFT)  # half of what the kinds are apart
SETS = TrainingSets(
    *(gaussian(k, n, s * SHIFT) for k, (n, s) in enumerate([(3000, 1), (3000, -1), (500, 1), (500, -1)]))
)
TINY = dataclasses.replace(
    SETS, real_validation=SETS.real_validation[:50], synthetic_validation=SETS.synthetic_validation[:50]
)  # for settings that are not about what is reached
HELD = gaussian(8, 3000, SHIFT), gaussian(9, 3000, -SHIFT)


def success(found, norm):
    return measure(found.attacked, *HELD, found.eps, norm, MeasureSettings(steps=5, restarts=1)).success()


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.0), ("l2", 0.04), ("linf", 0.01)])
def test_between_gaussians_it_comes_near_the_best_there_is(norm, eps):
    found = train_discriminator(SETS, eps, dataclasses.replace(LINEAR, norm=norm))
    if norm == "l2":
        best = ndtr((np.linalg.norm(SHIFT) - eps) / SIGMA)
    else:
        best = ndtr(np.linalg.norm(np.maximum(SHIFT - eps, 0)) / SIGMA)
    assert best - 0.03 < success(found, norm) < best + 0.02
    assert abs(found.validation_accuracy - best) < 0.05 and abs(found.training_accuracy - best) < 0.07
    assert 0 < found.best_step <= found.steps <= 200 and found.eps == eps
    assert not found.network.training


def test_training_with_balls_is_what_makes_it_robust():
    plain = train_discriminator(SETS, 0.0, dataclasses.replace(LINEAR, norm="linf"))
    eps = 0.02
    robust = train_discriminator(SETS, eps, dataclasses.replace(LINEAR, norm="linf"))
    of_plain = measure(plain.attacked, *HELD, eps, "linf", MeasureSettings(steps=5, restarts=1)).success()
    assert success(robust, "linf") > of_plain + 0.05


def states(found):
    return {name: tensor for name, tensor in found.network.state_dict().items() if "num_batches" not in name}


def equal(a, b):
    return all(torch.equal(tensor, states(b)[name]) for name, tensor in states(a).items())


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_the_same_arguments_give_the_same_network_and_nothing_global_changes(eps):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_discriminator(TINY, eps, SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(first, train_discriminator(TINY, eps, SMALL))
    assert not equal(first, train_discriminator(TINY, eps, dataclasses.replace(SMALL, seed=1)))


def test_several_radii_together_are_what_each_is_alone():
    start = train_discriminator(TINY, 0.0, SMALL).network.state_dict()
    settings = dataclasses.replace(SMALL, steps=4, validate_every=2)
    radii, starts = [0.0, 0.05, 0.3], [None, start, start]
    together = DiscriminatorTraining(TINY, radii, settings, starts).run()
    for found, eps, begin in zip(together, radii, starts, strict=True):
        alone = train_discriminator(TINY, eps, settings, start=begin)
        assert (found.eps, found.steps) == (eps, alone.steps)
        # Adam's first steps divide by gradients' size, so that rounding near 0 shows.
        assert found.validation_accuracy == pytest.approx(alone.validation_accuracy, abs=0.01)
        assert found.training_accuracy == pytest.approx(alone.training_accuracy, abs=0.1)
        if found.best_step == alone.best_step:
            for name, tensor in states(alone).items():
                assert torch.allclose(tensor, states(found)[name], atol=2e-3), name


def test_the_start_is_a_candidate_and_wins_where_training_breaks():
    good = train_discriminator(SETS, 0.04, LINEAR)
    broken = dataclasses.replace(LINEAR, lr=1e4, steps=20, validate_every=10)
    found = train_discriminator(SETS, 0.04, broken, start=good.network.state_dict())
    assert found.best_step == 0 and found.steps == 20 and equal(found, good)
    assert found.validation_accuracy == pytest.approx(good.validation_accuracy)


def test_a_warm_start_begins_where_it_should():
    good = train_discriminator(SETS, 0.0, LINEAR)
    found = train_discriminator(
        SETS, 0.01, dataclasses.replace(LINEAR, steps=2, lr=1e-9), start=good.network.state_dict()
    )
    for name, tensor in states(good).items():
        assert torch.allclose(tensor, states(found)[name], atol=1e-6)


def watch(monkeypatch, accuracies):
    """Validation says these, one after the other; what was done is returned by steps."""
    left = iter(accuracies)
    monkeypatch.setattr(DiscriminatorTraining, "_validate", lambda self, needed: [next(left)])


@pytest.mark.parametrize(
    ("accuracies", "patience", "best_step", "steps"),
    [
        ([0.6, 0.7, 0.65, 0.7, 0.6, 0.6, 0.6], 3, 8, 10),  # the later one of equals, which does not renew patience
        ([0.6, 0.7, 0.65, 0.8, 0.6, 0.6, 0.6], 3, 8, 14),
        ([0.5] * 3, 2, 6, 6),
        ([0.6, 0.5, 0.5], 2, 2, 6),
        ([0.6] * 10, 100, 20, 20),
    ],
)
def test_the_best_state_is_kept_and_patience_ends_training(monkeypatch, accuracies, patience, best_step, steps):
    watch(monkeypatch, accuracies)
    settings = dataclasses.replace(SMALL, steps=20, validate_every=2, patience=patience)
    told = []
    found = train_discriminator(SETS, 0.05, settings, report=told.append)
    assert (found.best_step, found.steps, found.validation_accuracy) == (best_step, steps, max(accuracies))
    assert told == list(range(1, steps + 1))


def test_without_balls_patience_waits_until_learning_has_begun(monkeypatch):
    settings = dataclasses.replace(SMALL, steps=20, validate_every=2, patience=2, lr=1e-9)
    watch(monkeypatch, [0.5] * 10)
    assert train_discriminator(SETS, 0.0, settings).steps == 20
    watch(monkeypatch, [0.7] + [0.5] * 10)
    assert train_discriminator(SETS, 0.0, settings).steps == 6


def test_the_state_that_is_kept_is_the_one_that_was_validated():
    settings = dataclasses.replace(LINEAR, steps=60, validate_every=10, patience=100)
    found = train_discriminator(SETS, 0.04, settings)
    x = torch.cat([SETS.synthetic_validation, SETS.real_validation])
    outcome = measure(found.attacked, x[500:], x[:500], 0.04, "l2", MeasureSettings(steps=6, restarts=1))
    assert outcome.success() == pytest.approx(found.validation_accuracy, abs=0.015)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("linf", 0.05)])
def test_training_images_are_in_their_balls_and_at_the_boundary(norm, eps):
    training = DiscriminatorTraining(SETS, [0.0, eps], dataclasses.replace(SMALL, norm=norm, attack_steps=5))
    x, index = training._batch(3)
    moved = training._adversarial(training.attacked, x, training.targets.repeat(2), index, 5)
    assert torch.equal(moved[:8], x) and moved.min() >= 0 and moved.max() <= 1
    away = (moved[8:] - x).flatten(1)
    distance = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
    assert (distance <= eps * (1 + 1e-6)).all() and distance.max() > 0.9 * eps


def test_batches_are_half_real_and_see_every_image():
    training = DiscriminatorTraining(SETS, [0.0], dataclasses.replace(SMALL, batch_size=100))
    seen = {0: [], 1: []}
    for step in range(60):
        x, index = training._batch(step)
        assert index.tolist() == list(range(100 * step, 100 * step + 100))
        for kind in (0, 1):
            seen[kind].append(x[50 * kind : 50 * kind + 50])
    assert training.targets.tolist() == [0] * 50 + [1] * 50
    for kind, images in ((0, SETS.synthetic), (1, SETS.real)):
        pixels = torch.cat(seen[kind]).flatten(1)
        assert torch.equal(pixels.sort(0)[0], (images.flatten(1) / 255.0).sort(0)[0])


def test_both_kinds_are_cropped_and_mirrored_alike():
    corner = torch.zeros(3000, 4, 4, 1, dtype=torch.uint8)
    corner[:, 1, 1] = 255
    sets = TrainingSets(corner, corner.clone(), corner[:50], corner[:50])
    training = DiscriminatorTraining(sets, [0.0], dataclasses.replace(SMALL, batch_size=3000, crop=1, flip=True))
    x, _ = training._batch(0)
    for kind in (0, 1):
        where = x[1500 * kind : 1500 * kind + 1500].mean(0)[0]
        expected = torch.zeros(4, 4)
        expected[0:3, 0:3] += 1 / 18
        expected[0:3, 1:4] += 1 / 18
        assert torch.allclose(where, expected, atol=0.03)
    plain, _ = DiscriminatorTraining(sets, [0.0], dataclasses.replace(SMALL, batch_size=3000))._batch(0)
    assert torch.equal(plain[0], plain[1])


def test_pixels_are_normalized_by_both_kinds():
    bright, dark = torch.full((50, 4, 4, 3), 200, dtype=torch.uint8), torch.zeros(50, 4, 4, 3, dtype=torch.uint8)
    network = module.make_network(TrainingSets(bright, dark, bright, dark), LINEAR)
    x = torch.cat([bright, dark]).permute(0, 3, 1, 2) / 255
    normalized = network.normalize(x)
    assert normalized.mean() == pytest.approx(0, abs=1e-4)
    assert normalized.std(correction=0) == pytest.approx(1, abs=1e-4)
    flat = torch.full((50, 4, 4, 1), 7, dtype=torch.uint8)  # no spread at all
    assert module.make_network(TrainingSets(flat, flat, flat, flat), LINEAR).normalize(flat / 255.0).isfinite().all()


def test_made_here_and_run_on_threads_gives_the_same():
    alone = [train_discriminator(TINY, eps, SMALL) for eps in (0.02, 0.1)]
    trainings = [DiscriminatorTraining(TINY, [eps], SMALL) for eps in (0.02, 0.1)]
    found: dict[int, list] = {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: trainings[k].run()})) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(found[k][0], alone[k]) for k in (0, 1))


def test_learned():
    assert learned(0.56, 400, 0.5) and not learned(0.54, 400, 0.5)  # two standard errors of 400 images are 0.05
    assert learned(0.5, 400, 0.8) and not learned(0.5, 400, 0.6)


@pytest.mark.parametrize(
    ("shape", "name"), [((8, 8, 1), "small-cnn"), ((16, 16, 3), "small-cnn"), ((17, 16, 3), "resnet-18")]
)
def test_the_network_where_none_is_named(shape, name):
    assert module.default_discriminator(shape) == name


@pytest.mark.parametrize(
    ("change", "eps", "message"),
    [
        ({"batch_size": 7}, 0.0, "batch_size must be even and at least 4, half of it is real, found 7"),
        ({"batch_size": 2}, 0.0, "batch_size must be even and at least 4"),
        ({}, -0.1, "eps must be a finite number >= 0 on pixels in"),
        ({}, float("nan"), "eps must be a finite number >= 0 on pixels in"),
        ({"architecture": "small"}, 0.0, "'small': no classifier has this name"),
    ],
)
def test_wrong_settings_are_refused(change, eps, message):
    with pytest.raises(UsageError, match=message):
        train_discriminator(SETS, eps, dataclasses.replace(SMALL, **change))


def test_images_of_several_shapes_are_refused():
    other = torch.zeros(10, 5, 4, 1, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"needs images of one shape, found \[4, 4, 1\], \[5, 4, 1\]"):
        train_discriminator(dataclasses.replace(SETS, synthetic=other), 0.0, SMALL)


def test_weights_that_are_not_finite_are_an_error():
    with pytest.raises(SynthfastError, match="weights that are not finite; lower the learning rate"):
        train_discriminator(SETS, 0.0, dataclasses.replace(SMALL, lr=1e38, steps=8))
