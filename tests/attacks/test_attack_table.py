"""Every attack in every norm: inside the ball and the box, blind to how the images are cut and ordered, repeatable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from synthfast.attacks import APGD, FGSM, PGD

MAKE = {
    "fgsm": lambda norm, eps: FGSM(norm, eps),
    "pgd": lambda norm, eps: PGD(norm, eps, steps=6),
    "pgd-cw-restarts": lambda norm, eps: PGD(norm, eps, steps=4, loss="cw", restarts=3),
    "pgd-targeted": lambda norm, eps: PGD(norm, eps, steps=3, loss="targeted"),
    "pgd-no-start": lambda norm, eps: PGD(norm, eps, steps=4, random_start=False),
    "pgd-late": lambda norm, eps: PGD(norm, eps, steps=4, stop_early=False),
    "apgd-ce": lambda norm, eps: APGD(norm, eps, steps=12),
    "apgd-dlr": lambda norm, eps: APGD(norm, eps, steps=12, loss="dlr", restarts=2),
    "apgd-t": lambda norm, eps: APGD(norm, eps, steps=8, loss="dlr", targets=9),
    "apgd-ce-t": lambda norm, eps: APGD(norm, eps, steps=8, targets=2),
}
RANDOM = [name for name in MAKE if name not in ("fgsm", "pgd-no-start")]


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


@pytest.fixture(params=MAKE)
def attack(request, norm):
    return lambda eps: MAKE[request.param](norm, eps)


@pytest.fixture
def half(draw_linear, norm):
    """A linear model, 40 images and the radius that reaches the nearest wrong point of half of them; 8 are wrong already."""
    model, images = draw_linear(40)
    eps = model.distance(images.x, images.y, norm).median().item()
    images.y[::5] = (images.y[::5] + 1) % 5
    return model, images, eps


def test_inside_ball_and_box(attack, norm, draw_linear, assert_inside):
    """Radii from tiny to larger than the box, images with pixels on and near its faces."""
    model, images = draw_linear(30, spread=1.0)
    images.x[:10] = images.x[:10].round()
    images.y = model(images.x).argmax(1)
    for eps in (1e-3, 8 / 255, 0.1, 0.3, 3.0):
        result = attack(eps).run(model, images.x, images.y)
        assert_inside(result.images, images.x, norm, eps)
        assert torch.equal(result.fooled, model(result.images).argmax(1) != images.y)
        assert (result.images != images.x).flatten(1).any(1).all()


def test_finds_some_and_leaves_wrong_images(attack, half):
    model, images, eps = half
    result = attack(eps).run(model, images.x, images.y)
    wrong = model(images.x).argmax(1) != images.y
    assert torch.equal(result.right, ~wrong) and wrong.sum() == 8
    assert torch.equal(result.images[wrong], images.x[wrong])
    broken = result.fooled & ~wrong
    assert broken.sum() >= 5 and not result.fooled.all()
    assert (
        model.distance(images.x, images.y, attack(eps).norm)[broken] <= eps
    ).all()  # nothing is broken that cannot be


def test_does_not_depend_on_the_other_images(attack, half):
    model, images, eps = half
    index = torch.arange(40) + 1000
    whole = attack(eps).run(model, images.x, images.y, index)
    for rows in (torch.arange(0, 40, 3), torch.tensor([7]), torch.arange(40).flip(0), torch.arange(40).roll(9)):
        part = attack(eps).run(model, images.x[rows], images.y[rows], index[rows])
        assert torch.equal(part.images, whole.images[rows]) and torch.equal(part.fooled, whole.fooled[rows])


def test_repeatable_without_global_randomness(attack, half):
    model, images, eps = half
    torch.manual_seed(1)
    first = attack(eps)(model, images.x, images.y)
    torch.manual_seed(2)
    assert torch.equal(attack(eps)(model, images.x, images.y), first)


@pytest.mark.parametrize("name", RANDOM)
def test_seed_and_index_key_the_start(name, norm, half):
    """In a ball so wide that many starts are broken already, what breaks shows where it started."""
    model, images, _ = half
    attack = MAKE[name](norm, {"linf": 0.5, "l2": 3.0}[norm])
    first = attack.run(model, images.x, images.y)
    for other, index in ((replace(attack, seed=1), None), (attack, torch.arange(40) + 40)):
        differs = (other(model, images.x, images.y, index) != first.images).flatten(1).any(1)
        assert differs[first.right].float().mean() > 0.5


def test_empty_and_all_wrong(attack, half):
    model, images, eps = half
    empty = attack(eps).run(model, images.x[:0], images.y[:0])
    assert empty.images.shape == (0, 3, 4, 4) and len(empty.fooled) == empty.queries == empty.gradients == 0
    wrong = attack(eps).run(model, images.x[::5], images.y[::5])
    assert (
        torch.equal(wrong.images, images.x[::5]) and wrong.fooled.all() and (wrong.queries, wrong.gradients) == (8, 0)
    )


def test_all_broken_at_once(attack, draw_linear):
    """A radius that breaks everything: the loops end with nobody standing."""
    model, images = draw_linear(20)
    assert attack(10.0).run(model, images.x, images.y).fooled.all()


def test_stronger_with_a_larger_radius(attack, half):
    model, images, eps = half
    broken = [attack(factor * eps).run(model, images.x, images.y).fooled.sum() for factor in (0.2, 1.0, 3.0)]
    assert broken[0] < broken[1] < broken[2]
