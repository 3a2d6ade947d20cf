"""CutMix: what is pasted, how much of it, and what the targets say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.training.augment import cutmix


def numbered(n, height=6, width=9):
    """Images whose every pixel is the image's number."""
    return torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, height, width).clone()


def test_boxes_of_one_other_image_and_targets_in_proportion():
    n, classes = 200, 50
    labels = torch.arange(n) % classes
    mixed, targets = cutmix(numbered(n), labels, classes, torch.arange(n), 3, 1.0)
    assert targets.shape == (n, classes) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    partners, areas = [], []
    for i in range(n):
        assert torch.equal(mixed[i, 0], mixed[i, 1])
        foreign = mixed[i, 0] != i
        others = set(mixed[i, 0][foreign].tolist())
        assert len(others) <= 1
        expected = torch.zeros(classes)
        expected[labels[i]] += 1 - foreign.float().mean()
        if others:
            (partner,) = others
            expected[labels[int(partner)]] += foreign.float().mean()
            partners.append(int(partner))
            rows, columns = foreign.any(1).nonzero()[:, 0], foreign.any(0).nonzero()[:, 0]
            box = foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all() and box.sum() == foreign.sum()  # one rectangle
        areas.append(float(foreign.float().mean()))
        torch.testing.assert_close(targets[i], expected)
    assert len(set(partners)) > 80 and len(set(areas)) > 15


def test_the_share_that_is_pasted_is_that_of_the_paper():
    """Algorithm of Yun et al., appendix A, in numpy: lambda uniform, a uniform centre, the box cut at the border."""
    random, n, size = np.random.default_rng(0), 20_000, 32
    share = 1 - random.random(n)
    half = (size * np.sqrt(share)) / 2
    x, y = random.random(n) * size, random.random(n) * size
    sides = [np.floor(np.clip(c + half, 0, size)) - np.floor(np.clip(c - half, 0, size)) for c in (x, y)]
    expected = sides[0] * sides[1] / size**2
    _, targets = cutmix(torch.zeros(n, 1, size, size), torch.arange(n) % 2, 2, torch.arange(n), 0, 1.0)
    # Every other partner has the same class; the share of the other class is half of the pasted area on average.
    found = 1 - targets[torch.arange(n), torch.arange(n) % 2]
    assert float(found.mean()) == pytest.approx(expected.mean() / 2, abs=0.01)
    quantiles = torch.quantile(found[found > 0], torch.tensor([0.25, 0.5, 0.75]))
    np.testing.assert_allclose(quantiles, np.quantile(expected[expected > 0], [0.25, 0.5, 0.75]), atol=0.02)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_probability_is_that_of_each_image(probability):
    n = 3000
    images = numbered(n, 16, 16)
    mixed, targets = cutmix(images, torch.zeros(n, dtype=torch.int64), 1, torch.arange(n), 1, probability)
    changed = (mixed != images).flatten(1).any(1).float().mean()
    assert float(changed) == pytest.approx(probability, abs=0.03)  # a few boxes are empty
    assert torch.equal(targets, torch.ones(n, 1))


def test_partners_are_all_the_others_alike():
    n = 5
    counts = torch.zeros(n, n)
    for step in range(400):
        index = torch.arange(step * n, step * n + n)
        _, targets = cutmix(torch.zeros(n, 1, 8, 8), torch.arange(n), n, index, 2, 1.0)
        counts += (targets > 0).float()
    others = counts[~torch.eye(n, dtype=torch.bool)]
    assert others.min() > 60 and others.max() < 140  # about 100 of 400 each


def test_draws_depend_on_seed_and_index_alone():
    labels = torch.arange(8) % 3
    index = torch.arange(100, 108)
    first = cutmix(numbered(8), labels, 3, index, 7, 1.0)
    torch.manual_seed(1)
    again = cutmix(numbered(8), labels, 3, index, 7, 1.0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for other in (cutmix(numbered(8), labels, 3, index, 8, 1.0), cutmix(numbered(8), labels, 3, index + 8, 7, 1.0)):
        assert not torch.equal(first[0], other[0])
