"""DiffAugment: what each augmentation does, that gradients pass, and what its draws depend on."""

from __future__ import annotations

import pytest
import torch

from synthfast.training.diffaugment import diff_augment

ALL = ("colour", "translation", "cutout")


def images(n: int = 40, channels: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Without a zero, so that zeros are what an augmentation put there."""
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def index_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x))


def test_nothing_is_done_without_a_policy():
    x = images()
    assert torch.equal(diff_augment(x, index_of(x), 0, ()), x)


@pytest.mark.parametrize(("size", "most"), [(8, 1), (12, 2), (28, 4)])
def test_translation_shifts_by_whole_pixels_and_fills_with_zeros(size, most):
    x = images(200, size=size)
    found = diff_augment(x, index_of(x), 3, ("translation",))
    padded = torch.nn.functional.pad(x, (most,) * 4)
    places = set()
    for k in range(len(x)):
        fits = [
            (i, j)
            for i in range(2 * most + 1)
            for j in range(2 * most + 1)
            if torch.equal(found[k], padded[k, :, i : i + size, j : j + size])
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 0.8 * (2 * most + 1) ** 2  # 200 draws of 9, 25 or 81 places


@pytest.mark.parametrize("size", [8, 9, 28])
def test_cutout_zeroes_a_square_around_any_place(size):
    x = images(300, size=size)
    zero = (diff_augment(x, index_of(x), 1, ("cutout",)) == 0).all(1)
    assert ((diff_augment(x, index_of(x), 1, ("cutout",)) == x).all(1) | zero).all()
    rows, columns = zero.any(2), zero.any(1)
    assert torch.equal(zero, rows[:, :, None] & columns[:, None, :])
    side = int(size / 2 + 0.5)
    counts = rows.sum(1)
    assert counts.max() == side and counts.min() >= side // 2
    assert all(not (r[:-2] & ~r[1:-1] & r[2:]).any() for r in rows)  # in one piece
    assert zero.any(0).all() and zero.float().mean() > 0.15


def test_colour_keeps_what_it_should():
    """Brightness adds a number, saturation keeps the mean of a pixel, contrast that of the image."""
    x = images(500)
    found = diff_augment(x, index_of(x), 2, ("colour",))
    shift = found.mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert -0.5 <= shift.min() < -0.4 and 0.4 < shift.max() <= 0.5
    grey, grey_found = (
        x.mean(1) - x.mean((1, 2, 3))[:, None, None],
        found.mean(1) - found.mean((1, 2, 3))[:, None, None],
    )
    contrast = (grey * grey_found).sum((1, 2)) / (grey**2).sum((1, 2))
    torch.testing.assert_close(grey_found, grey * contrast[:, None, None], rtol=1e-3, atol=1e-4)
    assert 0.5 <= contrast.min() < 0.6 and 1.4 < contrast.max() <= 1.5001
    colour, colour_found = x - x.mean(1, keepdim=True), found - found.mean(1, keepdim=True)
    both = (colour * colour_found).sum((1, 2, 3)) / (colour**2).sum((1, 2, 3))
    torch.testing.assert_close(colour_found, colour * both[:, None, None, None], rtol=1e-3, atol=1e-4)
    saturation = both / contrast
    assert 0 <= saturation.min() < 0.1 and 1.9 < saturation.max() <= 2.001


def test_grey_images_have_no_colour():
    x = images(channels=1)
    assert torch.equal(diff_augment(x, index_of(x), 0, ("colour",)), x)


@pytest.mark.parametrize("policy", [ALL, ("translation",), ("cutout",), ("colour",)])
def test_gradients_pass(policy):
    """By numbers, in float64."""
    x = images(4, size=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: diff_augment(y, index_of(x), 5, policy), x)
    out = diff_augment(x, index_of(x), 5, policy)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.abs().sum() > 0


def test_equal_images_at_equal_positions_are_augmented_alike():
    """As a real and a generated one of a training step are."""
    x = images()
    both = diff_augment(torch.cat([x, x]), index_of(x).repeat(2), 0, ALL)
    assert torch.equal(both[: len(x)], both[len(x) :])


def test_draws_depend_on_seed_position_and_step_alone():
    x = images()
    found = diff_augment(x, index_of(x), 0, ALL)
    assert torch.equal(diff_augment(x[5:9], torch.arange(5, 9), 0, ALL), found[5:9])
    layout = diff_augment(x.contiguous(memory_format=torch.channels_last), index_of(x), 0, ALL)
    assert torch.equal(layout, found)
    others = [
        diff_augment(x, index_of(x), 1, ALL),
        diff_augment(x, index_of(x) + 2**33, 0, ALL),
        diff_augment(x, index_of(x), 0, ALL, step=2),
    ]
    assert all((other != found).flatten(1).any(1).all() for other in others)
    state = torch.random.get_rng_state()
    diff_augment(x, index_of(x), 0, ALL)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_result_is_channels_last():
    x = images()
    for policy in (ALL, ("translation",), ("cutout",)):
        assert diff_augment(x, index_of(x), 0, policy).is_contiguous(memory_format=torch.channels_last)


def test_images_need_not_be_square():
    x = images()[:, :, :, :6]
    found = diff_augment(x, index_of(x), 0, ("translation",))
    padded = torch.nn.functional.pad(x, (1,) * 4)
    for k in range(len(x)):
        assert any(torch.equal(found[k], padded[k, :, i : i + 8, j : j + 6]) for i in range(3) for j in range(3))
