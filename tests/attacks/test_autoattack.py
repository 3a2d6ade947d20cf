"""AutoAttack: the published set, what few classes leave of it, the order, and the warning of gradient masking."""

from __future__ import annotations

import re

import pytest
import torch

from synthfast.attacks import (
    APGD,
    FAB,
    FGSM,
    AutoAttack,
    Square,
    autoattack,
    ce_only_reason,
    gradient_masking_warning,
    standard,
)
from synthfast.errors import UsageError


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def test_published_set(norm):
    assert standard(norm, 0.03, 10, seed=7) == [
        ("apgd-ce", APGD(norm, 0.03, seed=7, loss="ce", targets=0, steps=100, restarts=1)),
        ("apgd-t", APGD(norm, 0.03, seed=7, loss="dlr", targets=9, steps=100, restarts=1)),
        (
            "fab-t",
            FAB(norm, 0.03, seed=7, targets=9, steps=100, restarts=1, alpha_max=0.1, eta=1.05, beta=0.9),
        ),
        ("square", Square(norm, 0.03, seed=7, queries=5000, restarts=1, p_init=0.8)),
    ]
    assert standard(norm, 0.03, 1000) == standard(norm, 0.03, 10)
    assert ce_only_reason(10) is None


@pytest.mark.parametrize(("classes", "names"), [(2, "apgd-ce fab-t square"), (3, "apgd-ce fab-t square"), (4, None)])
def test_few_classes(classes, names):
    attacks = dict(standard("linf", 0.1, classes))
    assert list(attacks) == (names or "apgd-ce apgd-t fab-t square").split()
    assert attacks["fab-t"].targets == classes - 1
    if names is None:
        assert ce_only_reason(classes) is None and attacks["apgd-t"].targets == 3
    else:
        assert ce_only_reason(classes).startswith(f"with {classes} classes AutoAttack runs APGD-CE, FAB-T and Square")


def test_one_class_and_other_nonsense():
    with pytest.raises(UsageError, match="classes of the model must be 2 or more, found 1"):
        standard("linf", 0.1, 1)
    with pytest.raises(UsageError, match="classes of the model must be 2 or more, found 0"):
        AutoAttack("linf", 0.1, classes=0)
    with pytest.raises(UsageError, match="norm must be linf or l2"):
        standard("l1", 0.1, 10)


@pytest.mark.parametrize(("classes", "shape"), [(2, (1, 4, 4)), (4, (3, 3, 2))])
def test_breaks_exactly_what_can_be_broken(norm, classes, shape, draw_linear, assert_inside):
    model, images = draw_linear(20, classes=classes, shape=shape)
    images.y[::7] = (images.y[::7] + 1) % classes
    right = model(images.x).argmax(1) == images.y
    distance = model.distance(images.x, images.y, norm)
    eps = distance[right].median().item()
    result = AutoAttack(norm, eps, classes=classes).run(model, images.x, images.y)
    assert_inside(result.images, images.x, norm, eps)
    assert torch.equal(result.right, right)
    clear = (distance / eps - 1).abs() > 2e-3
    assert clear.sum() >= 15
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])


class Break(FGSM):
    """Turns images black from a level of grey on; says what it was given."""

    def _attack(self, model, x, y, index):
        seen.append(index.tolist())
        return torch.where(x >= self.seed / 10, torch.zeros_like(x), x)


seen = []


def test_each_attack_gets_what_the_ones_before_left(monkeypatch):
    def chosen(norm, eps, classes, seed):
        assert (norm, eps, classes, seed) == ("linf", 1.0, 2, 5)
        return [(str(level), Break("linf", 1.0, seed=level)) for level in (9, 6, 3, 1)]

    def model(x):  # class 0 is what is black
        return torch.stack([0.05 - x.flatten(1).mean(1), torch.zeros(len(x))], 1)

    monkeypatch.setattr(autoattack, "standard", chosen)
    x = torch.tensor([0.95, 0.4, 0.7, 0.0, 0.5, 0.35])[:, None, None, None].expand(-1, 1, 2, 2)
    y, index = torch.tensor([1, 1, 1, 1, 1, 1]), torch.arange(10, 16)
    seen.clear()
    result = AutoAttack("linf", 1.0, classes=2, seed=5).run(model, x, y, index)
    assert seen == [[10, 11, 12, 14, 15], [11, 12, 14, 15], [11, 14, 15]]  # the last is not needed any more
    assert result.fooled.all() and result.right.tolist() == [True, True, True, False, True, True]
    assert (result.images == 0).all()


def masked(x):
    """A linear model of two classes behind an input that is rounded to 16 levels, whose gradient is 0 everywhere."""
    x = (16 * x).round() / 16
    mean = x.flatten(1).mean(1) - 0.5
    return torch.stack([20 * mean, -20 * mean], 1)


def test_warns_of_a_model_that_hides_its_gradient(norm, generator):
    x = 0.5 + 0.2 * (torch.rand(40, 1, 4, 4, generator=generator) - 0.5)
    y = masked(x).argmax(1)
    eps = {"linf": 0.15, "l2": 0.6}[norm]
    broken, standing = {}, torch.arange(40)
    for name, attack in standard(norm, eps, 2):
        fooled = attack.run(masked, x[standing], y[standing], standing).fooled
        broken[name], standing = int(fooled.sum()), standing[~fooled]
    assert broken["square"] > 10
    line = gradient_masking_warning(broken, 40)
    assert line.startswith(f"gradient masking: Square, which sees no gradients, broke {broken['square']} of 40 images")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"apgd-ce": 400, "apgd-t": 20, "fab-t": 0, "square": 0}, None),
        ({"apgd-ce": 400, "apgd-t": 20, "fab-t": 3, "square": 10}, None),
        ({"apgd-ce": 400, "apgd-t": 20, "fab-t": 3, "square": 11}, "Square, .* broke 11 of 1000 images"),
        ({"apgd-ce": 0, "apgd-t": 0, "fab-t": 0, "square": 0}, None),
        ({"apgd-ce": 0, "apgd-t": 0, "fab-t": 2, "square": 8}, None),
        ({"apgd-ce": 2, "apgd-t": 3, "fab-t": 4, "square": 8}, "FAB-T and Square broke 12 of 1000 images, .* them 5"),
        (
            {"apgd-ce": 10, "apgd-t": 20, "fab-t": 31, "square": 0},
            "FAB-T and Square broke 31 of 1000 images, .* them 30",
        ),
        ({"apgd-ce": 10, "apgd-t": 20, "fab-t": 30, "square": 0}, None),
        ({"apgd-ce": 10, "fab-t": 4, "square": 5}, None),
        ({"apgd-ce": 300, "square": 300}, "Square"),
        ({}, None),
    ],
)
def test_rule_of_the_warning(broken, expected):
    line = gradient_masking_warning(broken, 1000)
    if expected is None:
        assert line is None
    else:
        assert re.match(f"gradient masking: .*{expected}", line)
