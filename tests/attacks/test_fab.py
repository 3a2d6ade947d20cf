"""FAB: its projection against a bisection in float64, its walk against the paper written out, known answers, torchattacks."""

from __future__ import annotations

import math

import pytest
import torch

from synthfast.attacks import FAB
from synthfast.attacks.fab import move_onto_plane
from synthfast.errors import UsageError


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def bisected_move(x, w, c, norm):
    """The smallest move of one point by bisection in float64, where plane and box meet; the corner nearest to it elsewhere."""
    x, w, c = x.double(), w.double(), float(c)
    direction = math.copysign(1, c) * w.sign()
    room = torch.where(direction > 0, 1 - x, x) * (w != 0)
    pace = torch.ones_like(w) if norm == "linf" else w.abs()
    if (w.abs() * room).sum() <= abs(c):
        return direction * room
    low, high = 0.0, 1.0
    while (w.abs() * torch.minimum(high * pace, room)).sum() < abs(c):
        high *= 2
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if (w.abs() * torch.minimum(t * pace, room)).sum() < abs(c) else (low, t)
    return direction * torch.minimum(high * pace, room)


def length(moves, norm):
    return moves.abs().amax(-1) if norm == "linf" else moves.norm(dim=-1)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 300])
def test_projection(norm, size, generator):
    n = 40
    x = torch.rand(n, size, generator=generator)
    x[:20] = (3 * x[:20] - 1).clamp(0, 1)  # many pixels on the faces of the box
    w = torch.randn(n, size, generator=generator)
    w[5:25][torch.rand(20, size, generator=generator) < 0.3] = 0
    w[30] = 0
    reach = (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1)
    c = reach * torch.linspace(0, 1.2, n)  # the last ones are out of the box
    c[::3] *= -1  # these have another reach, and some lie out of it
    moves = move_onto_plane(x, w, c, norm)
    expected = torch.stack([bisected_move(*row, norm) for row in zip(x, w, c, strict=True)])
    torch.testing.assert_close(length(moves, norm).double(), length(expected, norm), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(
        (w * moves).sum(1).double(), (w * expected).sum(1), rtol=1e-5, atol=1e-6 * size
    )  # on the plane, or as near as the box allows
    moved = x + moves
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    if norm == "l2":
        torch.testing.assert_close(moves.double(), expected, rtol=1e-4, atol=1e-5)


def test_projection_of_several_points_onto_the_same_planes(norm, generator):
    x, w = torch.rand(2, 5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    c = torch.randn(2, 5, generator=generator)
    both = move_onto_plane(x, w, c, norm)
    for k in (0, 1):
        assert torch.equal(both[k], move_onto_plane(x[k], w, c[k], norm))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_projection_of_tiny_and_huge_gradients(norm, scale, generator):
    """The plane stays the same when its equation is multiplied by a number, even if squares of that vanish in float32."""
    x, w = torch.rand(8, 20, generator=generator), torch.randn(8, 20, generator=generator)
    c = torch.randn(8, generator=generator)
    expected = move_onto_plane(x, w, c, norm)
    torch.testing.assert_close(move_onto_plane(x, scale * w, scale * c, norm), expected, rtol=1e-4, atol=1e-5)


def test_projection_of_nothing_and_of_what_is_not_a_number(norm):
    assert move_onto_plane(torch.zeros(2, 0, 3), torch.zeros(0, 3), torch.zeros(2, 0), norm).shape == (2, 0, 3)
    x, w = torch.full((3, 4), 0.5), torch.ones(3, 4)
    w[1], c = math.nan, torch.tensor([1.0, 1.0, math.nan])
    moves = move_onto_plane(x, w, c, norm)  # it ends, and the other rows do not notice
    torch.testing.assert_close(moves[0], torch.full((4,), 0.25))


class Curved:
    """Three classes with boundaries so curved that many steps fall short, image by image in float64, on [N, 1, 2, 3]."""

    def __init__(self, generator):
        self.centres = 0.1 + 0.8 * torch.rand(3, 6, generator=generator).double()

    def __call__(self, x):
        self.seen = [*getattr(self, "seen", []), x.detach().clone()]
        return -(x.double().flatten(1)[:, None] - self.centres).pow(6).sum(2) * torch.tensor([9.0, 8.0, 10.0])


def walk(model, x0, y, target, norm, steps):
    """FAB toward one class from the paper, for one image in float64: closest misclassified image and its distance."""
    x0 = x0.double()
    x, best, distance = x0.clone(), None, math.inf
    for _ in range(steps):
        point = x.clone().requires_grad_()
        z = model(point[None])[0]
        difference = z[target] - z[y]
        w = torch.autograd.grad(difference, point)[0].flatten()
        difference = difference.detach()
        moves = []
        for start in (x, x0):
            c = -difference + (w * (x - start).flatten()).sum()
            moves.append(bisected_move(start.flatten(), w, c, norm).view_as(x))
        from_x, from_x0 = (max(length(move.flatten(), norm).item(), 1e-8) for move in moves)
        alpha = min(from_x / (from_x + from_x0), 0.1)
        x = ((1 - alpha) * (x + 1.05 * moves[0]) + alpha * (x0 + 1.05 * moves[1])).clamp(0, 1)
        if model(x[None])[0].argmax() != y:
            if length((x - x0).flatten(), norm) < distance:
                best, distance = x.clone(), length((x - x0).flatten(), norm).item()
            x = x0 + 0.9 * (x - x0)
    return best, distance


def test_walk_as_in_the_paper(norm, generator):
    """A ball so small that nothing breaks: what the model is shown is compared, step by step, with the paper's algorithm."""
    model = Curved(generator)
    x = torch.rand(12, 1, 2, 3, generator=generator)
    y = model(x).argmax(1)
    model.seen = []
    FAB(norm, 1e-6, steps=12, targets=1).run(model, x, y)
    shown = torch.stack(model.seen[2:-1])[1::2]  # of each step, what is judged
    assert len(shown) == 12
    for k in range(len(x)):
        reference = Curved.__new__(Curved)
        reference.centres = model.centres
        z = reference(x[k : k + 1])[0]
        target = z.scatter(0, y[k : k + 1], -math.inf).argmax().item()
        reference.seen = []
        walk(reference, x[k], y[k].item(), target, norm, 12)
        expected = torch.cat(reference.seen[1::2])
        if norm == "l2":
            torch.testing.assert_close(shown[:, k].double(), expected, rtol=0, atol=2e-4)
        else:  # the move of least l-infinity norm is unique but for pixels without room
            distances = [(shown[:, k] - x[k]).flatten(1), (expected - x[k].double()).flatten(1)]
            torch.testing.assert_close(distances[0].double(), distances[1], rtol=0, atol=2e-4)


def box_distance(model, x, y, norm):
    """float64 [N]: how far the nearest misclassified point in the box is, by bisection for each class."""
    found = []
    for image, label in zip(x, y, strict=True):
        z = model(image[None])[0]
        per_class = []
        for other in range(len(z)):
            w, c = model.weight[other] - model.weight[label], z[label] - z[other]
            if other == label:
                continue
            move = bisected_move(image.flatten(), w, c, norm)
            reached = (w * move).sum() >= c - 1e-9
            per_class.append(length(move, norm).item() if reached else math.inf)
        found.append(min(per_class))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("classes", "shape"), [(2, (1, 4, 4)), (3, (3, 3, 5)), (5, (1, 7, 2)), (4, (1, 1, 1)), (5, (12,))]
)
def test_breaks_exactly_what_can_be_broken(norm, classes, shape, draw_linear, assert_inside):
    """On linear models, with images all over the box: the smallest perturbation is known, and FAB finds it to 1%."""
    model, images = draw_linear(60, classes=classes, shape=shape, spread=1.0)
    images.x[:20] = images.x[:20].round()
    images.y = model(images.x).argmax(1)
    distance = box_distance(model, images.x, images.y, norm)
    eps = distance[distance > 0].median().item()
    result = FAB(norm, eps, steps=20).run(model, images.x, images.y)
    assert_inside(result.images, images.x, norm, eps)
    clear = (distance / eps > 1) | (distance / eps < 0.99)
    assert clear.sum() >= 45
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])
    assert result.right.all()


def test_targets_are_the_highest_logits_first(norm):
    """Class 1 is near in the logits and out of reach in the box; class 2, the other way, is far and near: it takes 2 targets."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [-5.0, -5.0, -5.0, -5.0]])
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)

    def model(x):
        return (x.flatten(1) - 0.5) @ weight.T + torch.tensor([0.0, -0.3, -1.0])

    eps = {"linf": 0.06, "l2": 0.12}[norm]  # 0.05 and 0.1 are needed for class 2
    assert not FAB(norm, eps, targets=1, steps=30).run(model, x, y).fooled.any()
    assert FAB(norm, eps, targets=2, steps=30).run(model, x, y).fooled.all()


def test_one_gradient_and_two_queries_for_a_step(network, digits, norm):
    x = digits.x[:10]
    y = network(x).argmax(1)
    result = FAB(norm, 1e-4, steps=7, targets=3, restarts=2).run(network, x, y)
    assert not result.fooled.any()
    assert result.gradients == 10 * 7 * 3 * 2
    assert result.queries == 10 * (2 * 7 * 3 * 2 + 1 + 1 + 1)  # before, for the targets, judging


def test_broken_images_leave_at_once(norm, draw_linear):
    """On a linear model one step onto the plane is enough; the images that cannot be broken are the only ones left then."""
    model, images = draw_linear(30, classes=2)
    distance = model.distance(images.x, images.y, norm)
    eps = 1.06 * distance.median().item()
    steps = 9
    result = FAB(norm, eps, steps=steps).run(model, images.x, images.y)
    first, standing = (distance < eps / 1.0501).sum().item(), (~result.fooled).sum().item()
    between = 30 - first - standing
    assert first >= 15 and standing >= 5
    low = first + standing * steps
    assert low + 2 * between <= result.gradients <= low + steps * between


def test_restarts_begin_in_half_the_ball(norm, draw_linear):
    """Two targets, three runs for each: the first of them at the image."""
    model, images = draw_linear(20, classes=3)
    eps = 0.3 * model.distance(images.x, images.y, norm).min().item()
    shown = []

    def record(x):
        shown.append(x.detach().clone())
        return model(x)

    FAB(norm, eps, steps=3, restarts=3).run(record, images.x, images.y)
    starts = shown[2:-1][::6]
    assert len(starts) == 6 and torch.equal(starts[0], images.x) and torch.equal(starts[3], images.x)
    random = [starts[k] for k in (1, 2, 4, 5)]
    for start in random:
        moved = length((start - images.x).flatten(1), norm)
        assert moved.max() <= eps / 2 * (1 + 1e-5) and moved.min() > eps / 10
    assert all(not torch.equal(random[i], random[j]) for i in range(4) for j in range(i))


def test_does_not_depend_on_the_other_images_nor_on_global_randomness(norm, draw_linear):
    model, images = draw_linear(40)
    images.y[::5] = (images.y[::5] + 1) % 5
    attack = FAB(norm, model.distance(images.x, images.y, norm).median().item(), steps=6, targets=3, restarts=2)
    index = torch.arange(40) + 1000
    torch.manual_seed(1)
    whole = attack.run(model, images.x, images.y, index)
    assert 5 <= (whole.fooled & whole.right).sum() < whole.right.sum()
    torch.manual_seed(2)
    for rows in (torch.arange(40), torch.arange(0, 40, 3), torch.tensor([7]), torch.arange(40).flip(0)):
        part = attack.run(model, images.x[rows], images.y[rows], index[rows])
        assert torch.equal(part.images, whole.images[rows]) and torch.equal(part.fooled, whole.fooled[rows])


def test_empty_and_all_wrong(norm, draw_linear):
    model, images = draw_linear(6)
    attack = FAB(norm, 0.1, steps=2)
    empty = attack.run(model, images.x[:0], images.y[:0])
    assert empty.images.shape == (0, 3, 4, 4) and empty.queries == 0
    wrong = attack.run(model, images.x, (images.y + 1) % 5)
    assert torch.equal(wrong.images, images.x) and wrong.fooled.all() and (wrong.queries, wrong.gradients) == (6, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(norm, dtype, draw_linear, assert_inside):
    model, images = draw_linear(30, spread=1.0)
    x = images.x.to(dtype)
    y = model(x).argmax(1)
    eps = model.distance(x, y, norm).median().item()
    result = FAB(norm, eps, steps=10).run(model, x, y)
    assert_inside(result.images, x, norm, eps)
    assert 5 <= result.fooled.sum() <= 25


def test_same_verdicts_as_torchattacks(network, digits, norm):
    """What torchattacks breaks is broken here, all but a point; and a little more, for the closest image is also tried in the
    ball if it lies just outside."""
    torchattacks = pytest.importorskip("torchattacks")
    eps = {"linf": 0.12, "l2": 0.65}[norm]
    x, y = digits.x[:150], digits.y[:150]
    name = {"linf": "Linf", "l2": "L2"}[norm]
    attack = torchattacks.FAB(network, norm=name, eps=eps, steps=10, multi_targeted=True, n_classes=10)
    theirs = network(attack(x, y)).argmax(1) != y
    ours = FAB(norm, eps, steps=10).run(network, x, y).fooled
    assert (theirs & ~ours).sum() <= 1
    assert (ours & ~theirs).sum() <= 5
    assert 30 < ours.sum() < 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "targets must be 1 or more, found 0"),
        ({"steps": 0}, "steps must be 1 or more, found 0"),
        ({"restarts": 0}, "restarts must be 1 or more, found 0"),
        ({"alpha_max": 1.5}, "alpha_max in .0, 1., .* found alpha_max 1.5"),
        ({"eta": 0.9}, "eta of 1 or more .* eta 0.9"),
        ({"beta": 1.0}, "beta in .0, 1., .* beta 1.0"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        FAB("linf", 0.1, **options)


def test_a_model_without_gradients(draw_linear):
    model, images = draw_linear(2)
    with pytest.raises(UsageError, match="the model gives no gradient for its input"):
        FAB("linf", 0.1)(lambda x: model(x.detach()), images.x, images.y)
