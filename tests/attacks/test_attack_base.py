"""What the base class owns: what is attacked, how candidates are judged, what is counted; and the set of standing images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from synthfast.attacks import FGSM, PGD, Attack
from synthfast.attacks.base import ActiveSet, float32_below, input_gradient, misclassified, project, take


@dataclass(frozen=True, kw_only=True)
class Add(Attack):
    """Adds a number to every pixel, whatever the ball says, and keeps what it was given."""

    amount: float = 0.0

    def _attack(self, model, x, y, index):
        seen.append((x, y, index))
        return x + self.amount


seen = []


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


def brightness(x):
    """Class 1 where the mean of the pixels is above 1/2."""
    mean = x.flatten(1).mean(1)
    return torch.stack([torch.full_like(mean, 0.5), mean], 1)


def grey(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()


def test_only_right_images_are_attacked_and_wrong_ones_come_back_unchanged():
    x, y = grey(0.1, 0.45, 0.8, 0.9), torch.tensor([0, 0, 0, 1])
    result = Add("linf", 0.1, amount=0.1).run(brightness, x, y, torch.tensor([7, 8, 9, 10]))
    ((images, classes, index),) = seen
    assert torch.equal(images, x[[0, 1, 3]]) and classes.tolist() == [0, 0, 1] and index.tolist() == [7, 8, 10]
    assert torch.equal(result.images[2], x[2])
    torch.testing.assert_close(result.images[[0, 1, 3]], grey(0.2, 0.55, 1.0))
    assert result.right.tolist() == [True, True, False, True]
    assert result.fooled.tolist() == [False, True, True, False]


def test_index_counts_up_if_not_given():
    Add("linf", 0.1).run(brightness, grey(0.1, 0.9, 0.2), torch.tensor([0, 0, 0]))
    assert seen[0][2].tolist() == [0, 2]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("amount", [5.0, -5.0])
def test_candidates_are_brought_into_the_ball_and_judged_there(norm, amount, assert_inside):
    x, y = grey(0.02, 0.3, 0.45, 0.7, 0.98), torch.tensor([0, 0, 0, 1, 1])
    eps = {"linf": 0.1, "l2": 0.2}[norm]  # both move each of the 4 pixels by 0.1
    result = Add(norm, eps, amount=amount).run(brightness, x, y)
    assert_inside(result.images, x, norm, eps)
    assert result.fooled.tolist() == [False, False, amount > 0, False, False]
    torch.testing.assert_close(result.images, (x + (0.1 if amount > 0 else -0.1)).clamp(0, 1))


@pytest.mark.parametrize("levels", [(), (0.1, 0.2)])
def test_nothing_to_attack(levels):
    x, y = grey(*levels), torch.ones(len(levels), dtype=torch.int64)
    result = Add("l2", 0.1, amount=1.0).run(brightness, x, y)
    assert not seen
    assert torch.equal(result.images, x) and result.images is not x
    assert result.fooled.all() and not result.right.any()
    assert (result.queries, result.gradients) == (len(x), 0)


def test_eps_zero_changes_nothing(draw_linear):
    model, images = draw_linear(10)
    for attack in (FGSM("linf", 0), PGD("l2", 0.0, steps=2)):
        assert torch.equal(attack(model, images.x, images.y), images.x)


def test_queries_and_gradients_are_counted():
    x, y = grey(0.1, 0.2, 0.8), torch.tensor([0, 0, 0])  # the third is wrong and costs one query
    result = PGD("linf", 0.1, steps=3, stop_early=False).run(brightness, x, y)
    assert result.queries == 3 + 2 * 3 + 2 + 2  # before, steps, last iterate, judging
    assert result.gradients == 2 * 3


def test_images_that_break_cost_nothing_more():
    x, y = grey(0.49, 0.1), torch.tensor([0, 0])
    result = PGD("linf", 0.1, steps=5, step_size=0.05, random_start=False).run(brightness, x, y)
    assert result.fooled.tolist() == [True, False]
    # The first breaks after one step: it is seen before, at the start, after that step and at the end.
    assert result.queries == (1 + 2 + 1) + (1 + 5 + 1 + 1)
    assert result.gradients == 2 + 5


def test_parameters_get_no_gradients_and_global_randomness_is_untouched(network, digits):
    x, y = digits.x[:20], digits.y[:20]
    state = torch.random.get_rng_state()
    result = PGD("linf", 0.1, steps=2).run(network, x, y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not result.images.requires_grad and not x.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(network, digits, mode):
    attack = PGD("linf", 0.1, steps=3)
    expected = attack.run(network, digits.x[:20], digits.y[:20])
    with mode():
        found = attack.run(network, digits.x[:20].clone(), digits.y[:20].clone())
    assert torch.equal(found.images, expected.images) and torch.equal(found.fooled, expected.fooled)


def test_inputs_that_require_gradients_are_left_alone(network, digits):
    x = digits.x[:5].clone().requires_grad_()
    found = FGSM("linf", 0.1)(network, x, digits.y[:5])
    assert x.grad is None and not found.requires_grad


def test_results_keep_the_layout_and_do_not_depend_on_it(draw_linear):
    model, images = draw_linear(12)
    attack = PGD("linf", 0.05, steps=3)
    contiguous = attack(model, images.x, images.y)
    channels_last = attack(model, images.x.contiguous(memory_format=torch.channels_last), images.y)
    assert contiguous.is_contiguous() and channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, channels_last)


def test_images_need_not_be_images():
    """Vectors [N, D] do as well, for a model of vectors."""
    x = torch.tensor([[0.4, 0.4], [0.1, 0.1]])
    result = PGD("l2", 0.2, steps=5).run(brightness, x, torch.tensor([0, 0]))
    assert result.fooled.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_two_bytes(draw_linear, assert_inside, dtype, norm):
    model, images = draw_linear(30, spread=1.0)
    x = images.x.to(dtype)
    result = PGD(norm, 0.1, steps=5).run(model, x, model(x).argmax(1))
    assert_inside(result.images, x, norm, 0.1)
    assert result.fooled.any() and not torch.equal(result.images, x)


def test_model_in_bfloat16_autocast(network, digits):
    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    x, y = digits.x[:200], digits.y[:200]
    assert model(x).dtype == torch.bfloat16
    attack = PGD("linf", 0.15)
    found, expected = (attack.run(f, x, y).fooled.float().mean() for f in (model, network))
    assert abs(found - expected) < 0.05
    assert expected > 0.2


def test_logits_that_are_not_numbers_count_as_wrong():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, 1], [nan, 1], [0, nan], [nan, nan], [0, inf], [1, 0], [-inf, -inf]])
    y = torch.ones(7, dtype=torch.int64)
    assert misclassified(logits, y).tolist() == [False, True, True, True, False, True, True]
    assert misclassified(logits[:, [1, 0]], 1 - y)[:4].tolist() == [False, True, True, True]


def test_model_that_fails_away_from_the_data():
    """What it cannot judge counts as broken. Where its gradient is not a number no step is taken, and images stay images."""

    def model(x):
        z = brightness(x)
        return z + torch.where(z[:, 1:] > 0.3, float("nan"), 0.0)

    def without_gradient(x):
        return brightness(x) + 0 * x.flatten(1).mean(1, keepdim=True).sub(x.flatten(1).mean(1, keepdim=True)).sqrt()

    x, y = grey(0.1, 0.25), torch.tensor([0, 0])
    for norm in ("linf", "l2"):
        result = PGD(norm, 0.15, steps=5, random_start=False).run(model, x, y)
        assert result.fooled.tolist() == [False, True]
        result = PGD(norm, 0.15, steps=5, random_start=False).run(without_gradient, x, y)
        assert torch.equal(result.images, x) and not result.fooled.any()


@pytest.mark.parametrize("eps", [8 / 255, 0.1, 0.3, 0.5, 1e-3, 0.0, 1 / 3, 2.0])
def test_radius_is_the_float32_below(eps):
    found = float32_below(eps)
    assert found <= eps and float(np.float32(found)) == found
    assert float(np.nextafter(np.float32(found), np.float32(10))) > eps
    assert FGSM("linf", eps).radius == found


def test_attacks_are_values():
    assert PGD("linf", 0.1, steps=3) == PGD("linf", 0.1, steps=3) != PGD("linf", 0.1, steps=4)
    assert len({PGD("linf", 0.1), PGD("linf", 0.1), PGD("l2", 0.1)}) == 2


class TestActiveSet:
    def active(self, count=6):
        x = torch.arange(count * 4.0).reshape(count, 1, 2, 2) / 100
        return ActiveSet(x, torch.arange(count), torch.arange(count) + 10)

    def test_broken_images_are_recorded_and_leave(self):
        active = self.active()
        images, state = active.origin + 1, torch.arange(6.0)
        images, state = active.retire(torch.tensor([0, 1, 0, 0, 1, 0]).bool(), images, images, state)
        assert active.rows.tolist() == active.y.tolist() == state.tolist() == [0, 2, 3, 5]
        assert active.index.tolist() == [10, 12, 13, 15] and len(active) == 4
        assert torch.equal(images, active.origin + 1)
        images, state = active.retire(torch.tensor([0, 0, 1, 0]).bool(), images + 1, images, state)
        assert active.rows.tolist() == state.tolist() == [0, 2, 5]
        moved = (active.found - self.active().origin)[:, 0, 0, 0]
        torch.testing.assert_close(moved, torch.tensor([0.0, 1, 0, 2, 1, 0]))

    def test_same_objects_if_none_broke(self):
        active = self.active()
        images, state = torch.zeros(6, 1, 2, 2), torch.zeros(6)
        found = active.retire(torch.zeros(6).bool(), images, images, state)
        assert found[0] is images and found[1] is state and len(active) == 6

    def test_empty_when_all_broke(self):
        active = self.active(2)
        (state,) = active.retire(torch.ones(2).bool(), active.origin + 1, torch.zeros(2))
        assert not active and len(state) == 0
        torch.testing.assert_close(active.found, self.active(2).origin + 1)

    def test_keeps_what_has_the_highest_score(self):
        active = self.active(3)
        origin = active.origin
        active.keep(origin + 1, torch.tensor([1.0, 1, float("nan")]))
        active.retire(torch.tensor([1, 0, 0]).bool(), origin + 7)
        active.keep(origin[1:] + 2, torch.tensor([0.5, 3.0]))
        active.keep(origin[1:] + 3, torch.tensor([1.0, 2.0]))
        torch.testing.assert_close((active.found - origin)[:, 0, 0, 0], torch.tensor([7.0, 1, 2]))
        assert active.score[1:].tolist() == [1.0, 3.0]
        active.keep(origin[1:] + 4)
        torch.testing.assert_close((active.found - origin)[:, 0, 0, 0], torch.tensor([7.0, 4, 4]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_take_keeps_the_layout(layout):
    x = torch.rand(5, 3, 2, 2).contiguous(memory_format=layout)
    found = take(x, torch.tensor([3, 0, 0]))
    assert torch.equal(found, x[[3, 0, 0]]) and found.is_contiguous(memory_format=layout)
    assert take(x, torch.tensor([], dtype=torch.int64)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_leaves_what_is_inside(norm, generator):
    x = torch.rand(20, 3, 4, 4, generator=generator)
    inside = (x + 0.001 * torch.rand(x.shape, generator=generator)).clamp(0, 1)
    torch.testing.assert_close(project(inside, x, 0.5, norm), inside, rtol=0, atol=1e-7)


def test_input_gradient_is_for_the_images_alone():
    layer = nn.Linear(4, 3)
    x = torch.rand(2, 4).requires_grad_()
    gradient = input_gradient(layer(x)[:, 1], x)
    assert torch.equal(gradient, layer.weight[1].detach().expand(2, 4))
    assert layer.weight.grad is None and x.grad is None
